"""The weight that a stack or an average of adapters makes, which ``merge`` writes and layers without a plain product run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import Average, Block, beyond_weights
from .parts import Node, pairs_of, pruned, slots_of

if TYPE_CHECKING:
    from ..layers.layer import AdaptedLayer


def composed_tensors(layer: AdaptedLayer, tree: Block) -> dict[str, Tensor]:
    """Return the base layer's parameters as a composition would have them.

    Raises:
        ValueError: it does more than weights can say.
    """
    if (block := beyond_weights(tree)) is not None:
        raise ValueError(f"{block!r} depends on what a layer reads, so it cannot be written into a weight")
    here = pruned(layer, tree)
    layer.check_mergeable(list(slots_of(layer, here)))
    return layer.merged_tensors(lambda w, b: _merged(layer, here, w, b))


def _merged(layer: AdaptedLayer, node: Node, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias that a stack or an average makes of these."""
    if node is None:
        return w, b
    if not isinstance(node, Block):
        slot = layer.slots[node]
        return slot.method.merge(slot, w, b)
    if isinstance(node, Average):
        return _merged_average(node, w, b, lambda child: _merged(layer, child, w, b), layer.kind.widen)
    for child in node.children:
        w, b = _merged(layer, child, w, b)
    return w, b


def _merged_average(
    node: Average,
    w: Tensor,
    b: Tensor | None,
    merged: Callable[[Node], tuple[Tensor, Tensor | None]],
    widen: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    total_w, total_b = w, b
    for child, share in pairs_of(node, node.weights):
        w_i, b_i = merged(child)
        if w_i.shape != w.shape:  # a low-rank update joins the groups of a convolution
            w, total_w = widen(w), widen(total_w) if total_w.shape != w_i.shape else total_w
        total_w = total_w + share * (w_i - w)
        if b_i is not None:
            zero = torch.zeros_like(b_i)
            total_b = (zero if total_b is None else total_b) + share * (b_i - (zero if b is None else b))
    return total_w, total_b
