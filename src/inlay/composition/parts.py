"""The parts of a composition as one layer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..method import Slot
from . import BatchSplit, Block, Child, Fuse, Parallel, Split, Stack, blocks_in
from .rows import runs_of

if TYPE_CHECKING:
    from ..layers.layer import AdaptedLayer

Node = Child | None
"""A part of a composition as one layer sees it: None is the base layer alone."""


def pruned(layer: AdaptedLayer, node: Child) -> Node:
    """Leave out what does not sit on the layer. Blocks that weigh or divide keep a child's place."""
    if not isinstance(node, Block):
        return node if node in layer.slots else None
    children = [pruned(layer, child) for child in node.children]
    present = [child for child in children if child is not None]
    if not present:
        return None
    if isinstance(node, (Stack, Fuse)):  # a softmax over one member is 1
        return present[0] if len(present) == 1 else node.with_children(present)
    return node.with_children(children)  # type: ignore[arg-type]


def slots_of(layer: AdaptedLayer, node: Node) -> Iterator[Slot]:
    """Yield the adapters of a part that sit on the layer."""
    if isinstance(node, Block):
        for child in node.children:
            yield from slots_of(layer, child)
    elif node is not None and node in layer.slots:
        yield layer.slots[node]


def only_adds(slot: Slot) -> bool:
    """Whether an adapter adds to an output, whatever that comes from."""
    return slot.method.additive and slot.method.works_on_activations() and slot.kind.direct


def flat(stack: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return parts one after the other, without stacks inside."""
    found: list[Node] = []
    for node in stack:
        if isinstance(node, Stack):
            found += flat(node.children)
        elif node is not None:
            found.append(node)
    return tuple(found)


def stack_of(*nodes: Node) -> Child:
    """Return the parts that are there as one."""
    present = [node for node in nodes if node is not None]
    return present[0] if len(present) == 1 else Stack(*present)


def dividing(stack: tuple[Node, ...]) -> Block | None:
    """Return a block among the parts that gives rows or positions to different children, if there is one."""
    inside = (block for node in stack if node is not None for block in blocks_in(node))
    return next((block for block in inside if isinstance(block, (Split, BatchSplit, Parallel))), None)


def pairs_of(node: Block, values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each child with what belongs to it."""
    return zip(node.children, values, strict=True)


def axis_and_sizes(layer: AdaptedLayer, node: Block, x: Tensor, whole: bool = False) -> tuple[int, list[int]]:
    """Return the axis along which a block divides what a layer reads, and the sizes of the parts.

    Args:
        layer: the layer.
        node: the block.
        x: what is to be divided.
        whole: whether the layer was given more than x, which cannot be divided.

    Raises:
        ValueError: the layer or the sizes of x do not allow it.
    """
    name = type(layer.get_base_layer()).__name__
    if not layer.kind.by_rows or whole:
        raise ValueError(
            f"{type(node).__name__} is not supported on {name} layers, which need the batch as a whole"
        )
    if isinstance(node, Split):
        axes, length = 3 - (not x.is_floating_point()), x.shape[1] if x.dim() > 1 else 0
        if x.dim() != axes or layer.kind.spread(x.new_empty(1)).dim() != 1:
            raise ValueError(
                f"{node!r} needs layers that read [batch, sequence, features], but a {name} layer received "
                f"{list(x.shape)}; leave it out with exclude_modules"
            )
        if sum(node.splits) != length:
            raise ValueError(
                f"{node!r} has {sum(node.splits)} positions but the sequence has {length}; cached generation feeds one "
                "token at a time, so it cannot be done under a Split"
            )
        return 1, list(node.splits)
    return 0, runs_of(node, x.shape[0] if x.dim() else 1, "a layer")
