"""What a composition of adapters computes on one layer. Entered by ``AdaptedLayer`` only where the switch holds one.

Two questions are asked of a block, for the same input x:

    output(blocks, x)     what the layer puts out under blocks one after the other, its base product included
    after(block, x, y)    what becomes of an output y that is there already

    Stack     one after the other
    Average   y + sum w_i d_i, where d_i is what child i changes
    Fuse      y + W_v sum w_i d_i, with weights w_i that the fusion's slot finds for each token
    Parallel, BatchSplit, Split     the parts of x (and of y) through the children, put together again

An adapter that only adds to y (LoRA, BitFit) has its change d_i without another base product. Of others (DoRA, (IA)3) it is the
difference of two outputs, each by the adapter's own fastest path. What does not sit on the layer is left out there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..method import Slot
from . import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    Parallel,
    Split,
    Stack,
    beyond_weights,
    names_in,
)
from .parts import Node, axis_and_sizes, dividing, flat, only_adds, pairs_of, pruned, slots_of, stack_of
from .weights import composed_tensors

if TYPE_CHECKING:
    from ..layers.layer import AdaptedLayer
    from ..layers.taps import Tap


def run_composed(layer: AdaptedLayer, tree: Block, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a layer under a composition.

    Raises:
        ValueError: the composition has no meaning on this layer.
    """
    here = pruned(layer, tree)
    if isinstance(here, Block) and not layer.kind.direct and beyond_weights(here) is None:
        return layer._run_with(composed_tensors(layer, here), x, *args, **kwargs)
    return _Pass(layer, args, kwargs).output((here,), x)


def after_composed(layer: AdaptedLayer, tree: Node, x: Tensor, y: Tensor, norm: Tap | None) -> Tensor:
    """Return what a composition makes of a module's output.

    Args:
        layer: the wrapper of the module.
        tree: the composition.
        x: what its adapters read beside y.
        y: the output.
        norm: where an adapter leaves what is to go on in place of the model's normalisation.

    Raises:
        ValueError: the composition has no meaning on this layer.
    """
    return _Pass(layer, norm=norm).after(tree, x, y)


class _Pass:
    """One forward pass of one layer."""

    def __init__(
        self, layer: AdaptedLayer, args: tuple[Any, ...] = (), kwargs: Any = None, norm: Tap | None = None
    ) -> None:
        self.layer, self.args, self.kwargs, self.norm = layer, args, kwargs or {}, norm

    def output(self, stack: tuple[Node, ...], x: Tensor) -> Any:
        """Return what the layer puts out under parts that act one after the other."""
        stack = flat(stack)
        if all(isinstance(node, str) for node in stack):
            return self._run([self.layer.slots[str(node)] for node in stack], x)
        head, last = stack[:-1], stack[-1]
        if head and self._acts_after(last):
            return self.after(last, x, self.output(head, x))
        if isinstance(last, Average):
            return self._averaged(head, last, x)
        if isinstance(last, Fuse):
            y = self.output(head, x)
            return self._fused(last, x, y, [self._change_upon(head, child, x, y) for child in last.children])
        if isinstance(last, Block):
            return self._divided(head, last, x)
        return self._weight_upon(head, last, x)

    def after(self, node: Node, x: Tensor, y: Tensor) -> Tensor:
        """Return what becomes of an output."""
        if not isinstance(node, Block):
            slot = self.layer.slots.get(node) if node is not None else None
            return y if slot is None else self._act(slot, x, y)
        if isinstance(node, Stack):
            for child in node.children:
                y = self.after(child, x, y)
            return y
        if isinstance(node, Average):
            pairs = [(child, w) for child, w in pairs_of(node, node.weights) if self._sits(child)]
            return y + _weighted([(w, self.change(child, x, y)) for child, w in pairs]) if pairs else y
        if isinstance(node, Fuse):
            changes = [self.change(child, x, y) for child in node.children if self._sits(child)]
            if len(changes) > 1:
                return self._fused(node, x, y, changes)
            return y + changes[0] if changes else y
        axis, sizes = self._parts(node, y)
        halves = zip(torch.split(x, sizes, axis), torch.split(y, sizes, axis), strict=True)
        parts = []
        for child, (x_part, y_part) in pairs_of(node, halves):
            with self._under(child):
                parts.append(self.after(child, x_part, y_part))
            self._check_norm(child)
        return torch.cat(parts, axis)

    def change(self, node: Node, x: Tensor, y: Tensor) -> Tensor:
        """Return what a part adds to an output: of one that only adds, without the rounding of a difference."""
        slots = list(slots_of(self.layer, node))
        if isinstance(node, str):
            self._forget_norm()
            change = slots[0].method.change(slots[0], x, y)
        elif all(only_adds(slot) for slot in slots):
            change = self.after(node, x, y.new_zeros(()).expand_as(y))
        else:
            change = self.after(node, x, y) - y
        self._check_norm(node)
        return change

    # ------------------------------------------------------------------ the model's own norm, behind an adapted output

    def _act(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        self._forget_norm()
        return slot.method.after(slot, x, y)

    def _forget_norm(self) -> None:
        if self.norm is not None:  # whether it is passed by is up to the last adapter
            self.norm.park(None)

    def _check_norm(self, node: Node) -> None:
        """Refuse to mix what an adapter puts in place of the model's norm with what goes through it."""
        if self.norm is not None and self._sits(node) and self.norm.take() is not None:
            raise ValueError(
                f"{node!r} passes the model's normalisation by (original_ln_after=False), which it can alone or in a Stack only"
            )

    @contextmanager
    def _under(self, child: Node) -> Iterator[None]:
        """Let an adapted norm, which adapters of an output may ask, know which part of the batch it is given."""
        norm = self.layer.norm() if self.norm is not None else None
        if child is None or not hasattr(norm, "slots"):
            yield
            return
        tree = child if isinstance(child, Block) else None
        with self.layer.switch.within(active=tuple(names_in(child)), composition=tree):
            yield

    # ------------------------------------------------------------------ running the layer

    def _run(self, slots: Sequence[Slot], x: Tensor) -> Any:
        # Values that stand in the weight itself would invalidate what the other members have saved of it for their gradients.
        if any(slot.method.in_weight for slot in slots):
            return self.layer._run_merged(slots, x, *self.args, **self.kwargs)
        return self.layer._run(slots, x, *self.args, **self.kwargs)

    def _averaged(self, head: tuple[Node, ...], node: Average, x: Tensor) -> Tensor:
        """Return ``(1 - sum of w_i) y + sum of w_i y_i`` over children with paths of their own, and add the others' changes."""
        present = [(child, w) for child, w in pairs_of(node, node.weights) if child is not None]
        own = [(child, w) for child, w in present if not self._acts_after(child)]
        others = [(child, w) for child, w in present if self._acts_after(child)]
        rest = 1.0 - sum(w for _, w in own)
        terms = [(w, self.output((*head, child), x)) for child, w in own]
        if not others and abs(rest) <= 1e-12:
            return _weighted(terms)
        y = self.output(head, x)
        terms += [(w, self.change(child, x, y)) for child, w in others]
        return torch.add(_weighted(terms), y, alpha=rest)

    def _change_upon(self, head: tuple[Node, ...], child: Node, x: Tensor, y: Tensor) -> Tensor:
        return self.change(child, x, y) if self._acts_after(child) else self.output((*head, child), x) - y

    def _divided(self, head: tuple[Node, ...], node: Block, x: Tensor) -> Tensor:
        """Run each part of the input through everything that comes before the block, and its own child."""
        if (block := dividing(head)) is not None:
            raise ValueError(
                f"{node!r} cannot divide what {block!r} has divided: one of its adapters changes the layer's weight"
            )
        axis, sizes = self._parts(node, x)
        parts = pairs_of(node, torch.split(x, sizes, axis))
        # Contiguous, because GPT-2's layers view their input; parts along the first axis are so already.
        return torch.cat([self.output((*head, child), part.contiguous()) for child, part in parts], axis)

    def _weight_upon(self, head: tuple[Node, ...], name: Node, x: Tensor) -> Any:
        """Run an adapter that changes the weight, such as DoRA, upon blocks: in their merged weight."""
        before = head[-1]
        if isinstance(before, (Split, BatchSplit, Parallel)):
            children = [stack_of(child, name) for child in before.children]
            return self.output((*head[:-1], before.with_children(children)), x)
        tree = Stack(*head, name)  # type: ignore[arg-type]
        if (block := beyond_weights(tree)) is not None:
            raise ValueError(
                f"{name!r} changes the layer's weight, so it cannot act upon {block!r}; put it first"
            )
        return self.layer._run_with(composed_tensors(self.layer, tree), x, *self.args, **self.kwargs)

    def _fused(self, node: Fuse, x: Tensor, y: Tensor, changes: list[Tensor]) -> Tensor:
        slot = self.layer.slots.get(str(node.name))
        if slot is None:
            raise ValueError(
                f"members {list(node.children)} of the fusion {node.name!r} meet on a layer that the fusion does not sit on; "
                "add the fusion after all of them"
            )
        first = next(self.layer.slots[str(child)] for child in node.children if child in self.layer.slots)
        return y + slot.method.mix(slot, first.method.query(first, x, y), changes)

    def _sits(self, node: Node) -> bool:
        return next(slots_of(self.layer, node), None) is not None

    def _acts_after(self, node: Node) -> bool:
        return all(only_adds(slot) for slot in slots_of(self.layer, node))

    def _parts(self, node: Block, x: Tensor) -> tuple[int, list[int]]:
        return axis_and_sizes(self.layer, node, x, whole=bool(self.args or self.kwargs))


def _weighted(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    (weight, first), *others = terms
    total = weight * first
    for weight, term in others:
        total = torch.add(total, term, alpha=weight)
    return total
