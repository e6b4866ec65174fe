"""Taking back, in front of a model's head, what invertible adapters have done to its embeddings.

The adapters sit on the output of the embeddings (``AdaptedOutput`` of the kind ``Embedded``). An ``InverseTap`` on the head
changes what the head reads: adapters are undone by their own parameters, the last one first, each sample by its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..composition import Average, Block, Child, Fuse, Stack, blocks_in
from ..composition.parts import Node, axis_and_sizes, pairs_of, pruned
from ..composition.rows import groups_of
from .taps import Tap, first_input

if TYPE_CHECKING:
    from .output import AdaptedOutput


class InverseTap(Tap):
    """A forward pre-hook on a head, which gives it the embeddings' space back."""

    before = True

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the inputs of the head as it is to see them, while an adapter of the layer is on."""
        if not self.layer.acts():
            return None
        argument = self.layer.kind.head.argument  # type: ignore[attr-defined]
        h = undone(self.layer, first_input(module, argument, args, kwargs))
        return ((h, *args[1:]), kwargs) if args else (args, kwargs | {argument: h})


def undone(layer: AdaptedOutput, h: Tensor) -> Tensor:
    """Return what the embeddings would have to be for the adapters that are on to make h of them.

    Raises:
        ValueError: a composition is on that has no inverse, or the batch does not fit it.
    """
    setting = layer.setting()
    if setting.route is not None:
        groups = groups_of(setting.route, layer.slots, len(h), "a head")
        return groups.run(lambda name, rows: _undone(layer, name, rows), h)
    if setting.composition is not None:
        return _undone(layer, pruned(layer, setting.composition), h)
    for slot in reversed(layer.live_slots(setting)):
        h = slot.method.undo(slot, h)
    return h


def _undone(layer: AdaptedOutput, node: Node, h: Tensor) -> Tensor:
    if not isinstance(node, Block):
        slot = layer.slots.get(node) if node is not None else None
        return h if slot is None else slot.method.undo(slot, h)
    if isinstance(node, Stack):
        for child in reversed(node.children):
            h = _undone(layer, child, h)
        return h
    axis, sizes = axis_and_sizes(layer, node, h)
    return torch.cat(
        [_undone(layer, child, part) for child, part in pairs_of(node, torch.split(h, sizes, axis))], axis
    )


def invertible_part(layer: AdaptedOutput, tree: Child) -> Node:
    """Return what a composition is to the embeddings.

    Raises:
        ValueError: it mixes what its members do to them; such a mixture has no inverse.
    """
    here = pruned(layer, tree)
    for block in blocks_in(here) if here is not None else ():
        if isinstance(block, (Average, Fuse)):
            raise ValueError(
                f"{block!r} mixes invertible adapters, and a mixture has no inverse to put in front of the head; use a Stack, "
                "or adapters without inv_adapter"
            )
    return here
