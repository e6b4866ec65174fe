"""How several adapters act together, written as plain objects: ``model.set_adapter(Stack("lang", "task"))``.

    Stack("a", "b")                              b acts on what a has made; the same as ["a", "b"]
    Average("a", "b", weights=[0.25, 0.75])      the layer's own output, plus a weighted sum of what each changes
    Fuse("a", "b")                               the same with weights that a trained fusion chooses for each token
    BatchSplit("a", "b", batch_sizes=[2, 1])     rows 0 and 1 of the batch through a, row 2 through b
    Split("a", "b", splits=[3, 4])               positions 0 to 2 of each sequence through a, 3 to 6 through b
    Parallel("a", "b")                           the whole batch once through each: rows of a, then rows of b

A child is an adapter's name or another block. Blocks are values: frozen, comparable, hashable. This file knows names only; what a
block does on a layer is in ``composed.py``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
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


# ---------------------------------------------------------------------- what a model makes of a request


@dataclass(frozen=True)
class Choice:
    """What ``set_adapter`` was asked for, made out.

    Attributes:
        active: names of all adapters that take part, in order.
        composition: how they act together; None where they simply act in that order.
        frozen: those that are not trained, being members of a fusion that trains only itself.
    """

    active: tuple[str, ...]
    composition: Block | None = None
    frozen: frozenset[str] = frozenset()


def choose(asked: Child | Sequence[Child], configs: Mapping[str, Any]) -> Choice:
    """Make out a request.

    Args:
        asked: a name, a block, or several in the order in which they act.
        configs: the model's configurations by name.

    Raises:
        ValueError: an adapter is unknown, or blocks are nested in a way that has no meaning.
    """
    several = not isinstance(asked, (str, Block))
    if several and not asked:
        return Choice(())
    tree = _made_out(Stack(*asked) if several else asked, configs)  # type: ignore[misc]
    _check_nesting(tree)
    names = tuple(dict.fromkeys(names_in(tree)))
    if isinstance(tree, str) or (isinstance(tree, Stack) and all(isinstance(c, str) for c in tree.children)):
        return Choice(names)
    fused = [block for block in blocks_in(tree) if isinstance(block, Fuse)]
    frozen = {m for f in fused if not configs[str(f.name)].train_members for m in names_in(f) if m != f.name}
    return Choice(names, tree, frozenset(frozen))


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


def is_fusion(config: Any) -> bool:
    """Whether a configuration is that of a fusion."""
    return bool(config.method_name() == "FUSION")


def fusions_of(name: str, configs: Mapping[str, Any]) -> list[str]:
    """Return the fusions that an adapter is a member of."""
    return [fusion for fusion, c in configs.items() if is_fusion(c) and name in c.members]


def unknown_adapter(name: str, known: Mapping[str, Any]) -> ValueError:
    """Return the error for an adapter that is not there."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"Adapter {name} not found{hint} There are: {sorted(known)}")


def _made_out(node: Child, configs: Mapping[str, Any]) -> Child:
    """Check the names, turn the name of a fusion into its block, and leave out stacks that say nothing."""
    if isinstance(node, str):
        if node not in configs:
            raise unknown_adapter(node, configs)
        return Fuse(*configs[node].members, name=node) if is_fusion(configs[node]) else node
    if isinstance(node, Fuse):
        return _named(node, configs)
    children = [_made_out(child, configs) for child in node.children]
    if isinstance(node, Stack):
        flat = [c for child in children for c in (child.children if isinstance(child, Stack) else (child,))]
        return flat[0] if len(flat) == 1 else Stack(*flat)
    return node.with_children(children)


def _named(node: Fuse, configs: Mapping[str, Any]) -> Fuse:
    for member in node.children:
        if member not in configs:
            raise unknown_adapter(str(member), configs)
    found = [n for n, c in configs.items() if is_fusion(c) and tuple(c.members) == node.children]
    if node.name is not None and node.name not in found:
        raise ValueError(
            f"there is no fusion {node.name!r} of {list(node.children)}; those of these members are {found}"
        )
    if not found:
        members = list(node.children)
        raise ValueError(
            f"there is no fusion of {members}; add one: model.add_adapter('name', FusionConfig(members={members}))"
        )
    if node.name is None and len(found) > 1:
        raise ValueError(
            f"several fusions have the members {list(node.children)}: name one of {found} in {node!r}"
        )
    return Fuse(*configs[found[0]].members, name=node.name or found[0])


def _check_nesting(tree: Child) -> None:
    """Refuse a ``Parallel`` that is not alone at the top or in a stack: its children would have no rows of their own."""

    def visit(node: Child, free: bool) -> None:
        if not isinstance(node, Block):
            return
        if isinstance(node, Parallel) and not free:
            raise ValueError(f"{node!r} can stand alone or in a Stack, not inside another block: {tree!r}")
        for child in node.children:
            visit(child, free and isinstance(node, Stack))

    visit(tree, True)
    if sum(isinstance(block, Parallel) for block in blocks_in(tree)) > 1:
        raise ValueError(f"there can be one Parallel, which the inputs are repeated for: {tree!r}")
