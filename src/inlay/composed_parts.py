"""The parts of a composition as one layer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .composition import BatchSplit, Block, Child, Fuse, Parallel, Split, Stack, blocks_in
from .method import Slot

if TYPE_CHECKING:
    from .layer import AdaptedLayer

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
