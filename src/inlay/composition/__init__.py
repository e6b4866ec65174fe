"""How several adapters act together, written as plain objects: ``model.set_adapter(Stack("lang", "task"))``.

    Stack("a", "b")                              b acts on what a has made; the same as ["a", "b"]
    Average("a", "b", weights=[0.25, 0.75])      the layer's own output, plus a weighted sum of what each changes
    Fuse("a", "b")                               the same with weights that a trained fusion chooses for each token
    BatchSplit("a", "b", batch_sizes=[2, 1])     rows 0 and 1 of the batch through a, row 2 through b
    Split("a", "b", splits=[3, 4])               positions 0 to 2 of each sequence through a, 3 to 6 through b
    Parallel("a", "b")                           the whole batch once through each: rows of a, then rows of b

A child is an adapter's name or another block. Blocks are values: frozen, comparable, hashable. This file knows names only; what a
block does on a layer is in ``on_layers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union

Child = Union[str, "Block"]


@dataclass(frozen=True, init=False, repr=False)
class Block:
    """Children that act together. Use one of its kinds."""

    children: tuple[Child, ...]

    def __init__(self, *children: Child, **settings: Any) -> None:
        name = type(self).__name__
        if not children:
            raise ValueError(f"{name}() has no child; name at least one adapter: {name}('a')")
        for child in children:
            if not isinstance(child, (str, Block)):
                raise TypeError(f"{name} takes names of adapters and blocks, not {child!r}")
        object.__setattr__(self, "children", tuple(children))
        for key, value in settings.items():
            object.__setattr__(self, key, value)

    def __repr__(self) -> str:
        own = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "children"]
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *own])})"

    def with_children(self, children: Sequence[Child]) -> Block:
        """Return the same block over other children."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self) | {"children": tuple(children)})
        return twin


@dataclass(frozen=True, init=False, repr=False)
class Stack(Block):
    """One child after another, each on what those before it have made.

    Adapters that change a weight add up: ``W + dW_a + dW_b``. (AdapterHub feeds the delta of one LoRA to the next.)

    Raises:
        ValueError: there is no child.
    """

    def __init__(self, *children: Child) -> None:
        super().__init__(*children)


@dataclass(frozen=True, init=False, repr=False)
class Average(Block):
    """``y + sum_i w_i (y_i - y)``: the layer's own output y, and y_i as child i alone would make it.

    Args:
        *children: adapters or blocks.
        weights: one number for each child, used as they are; 1/n by default. They need not sum to 1, and may be negative.

    Raises:
        ValueError: there is no child, or another number of weights.
    """

    weights: tuple[float, ...]

    def __init__(self, *children: Child, weights: Sequence[float] | None = None) -> None:
        values = [1 / max(len(children), 1)] * len(children) if weights is None else list(weights)
        if len(values) != len(children):
            raise ValueError(f"Average has {len(children)} children but {len(values)} weights: {values}")
        if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in values):
            raise ValueError(f"weights must be finite numbers, not {values}")
        super().__init__(*children, weights=tuple(float(w) for w in values))


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Block):
    """Rows of the batch by position: the first ``batch_sizes[0]`` through the first child, and so on.

    Args:
        *children: adapters or blocks.
        batch_sizes: rows of each child, or one number for all.

    Raises:
        ValueError: there is no child, another number of sizes, or one below 1.
    """

    batch_sizes: tuple[int, ...]

    def __init__(self, *children: Child, batch_sizes: int | Sequence[int]) -> None:
        super().__init__(*children, batch_sizes=_sizes("batch_sizes", batch_sizes, children))


@dataclass(frozen=True, init=False, repr=False)
class Split(Block):
    """Positions of each sequence: the first ``splits[0]`` through the first child, and so on.

    Args:
        *children: adapters or blocks.
        splits: positions of each child, or one number for all; together the length of the sequences.

    Raises:
        ValueError: there is no child, another number of sizes, or one below 1.
    """

    splits: tuple[int, ...]

    def __init__(self, *children: Child, splits: int | Sequence[int]) -> None:
        super().__init__(*children, splits=_sizes("splits", splits, children))


@dataclass(frozen=True, init=False, repr=False)
class Parallel(Block):
    """The whole batch once through each child. The output has n times as many rows: those of the first child first.

    The model's inputs are repeated by themselves, labels included.

    Raises:
        ValueError: there is no child.
    """

    def __init__(self, *children: Child) -> None:
        super().__init__(*children)


@dataclass(frozen=True, init=False, repr=False)
class Fuse(Block):
    """Adapters mixed token by token by a trained fusion, which is an adapter itself: see ``FusionConfig``.

    Args:
        *children: the names of the fusion's members, in its order.
        name: the fusion's name, needed only where several have these members.

    Raises:
        ValueError: there are fewer than two members, or one is named twice.
        TypeError: a member is a block.
    """

    name: str | None

    def __init__(self, *children: str, name: str | None = None) -> None:
        check_members(children)
        super().__init__(*children, name=name)


def check_members(members: Sequence[Any]) -> None:
    """Check the members of a fusion.

    Raises:
        ValueError: there are fewer than two members, or one is named twice.
        TypeError: a member is no name.
    """
    if any(not isinstance(m, str) for m in members):
        raise TypeError(f"a fusion mixes single adapters, so its members are names, not {list(members)}")
    if len(members) < 2 or len(set(members)) != len(members):
        raise ValueError(f"a fusion needs two or more different members, not {list(members)}")


def _sizes(field: str, given: int | Sequence[int], children: Sequence[Child]) -> tuple[int, ...]:
    sizes = [given] * len(children) if isinstance(given, int) else list(given)
    if len(sizes) != len(children):
        raise ValueError(f"there are {len(children)} children but {len(sizes)} {field}: {sizes}")
    if not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes):
        raise ValueError(f"{field} must be whole numbers of 1 or more, not {sizes}")
    return tuple(sizes)


def names_in(node: Child) -> Iterator[str]:
    """Yield the adapters in a block, in order; a fusion after its members."""
    if isinstance(node, str):
        yield node
        return
    for child in node.children:
        yield from names_in(child)
    if isinstance(node, Fuse) and node.name is not None:
        yield node.name


def blocks_in(node: Child) -> Iterator[Block]:
    """Yield a block and those inside it, outer ones first."""
    if isinstance(node, Block):
        yield node
        for child in node.children:
            yield from blocks_in(child)


def divides_rows(node: Child | None) -> Block | None:
    """Return the block that gives rows of the batch to different children, if there is one."""
    found = blocks_in(node) if node is not None else iter(())
    return next((block for block in found if isinstance(block, (BatchSplit, Parallel))), None)


def beyond_weights(tree: Child) -> Block | None:
    """Return the block that no merged weight can express, if there is one."""
    return next((block for block in blocks_in(tree) if not isinstance(block, (Stack, Average))), None)
