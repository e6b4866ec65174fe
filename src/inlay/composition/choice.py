"""What ``set_adapter`` is asked for, checked against the adapters that a model has and made out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import Block, Child, Fuse, Parallel, Stack, blocks_in, names_in


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
    if not isinstance(asked, (str, Block)):
        if not asked:
            return Choice(())
        asked = Stack(*asked)
    tree = _made_out(asked, configs)
    _check_nesting(tree)
    _check_prompts(tree, configs)
    names = tuple(dict.fromkeys(names_in(tree)))
    if isinstance(tree, str) or (isinstance(tree, Stack) and all(isinstance(c, str) for c in tree.children)):
        return Choice(names)
    fused = [block for block in blocks_in(tree) if isinstance(block, Fuse)]
    _check_members_run_once(tree)
    frozen = {m for f in fused if not configs[str(f.name)].train_members for m in names_in(f) if m != f.name}
    return Choice(names, tree, frozenset(frozen))


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


def _check_members_run_once(tree: Child) -> None:
    """Refuse a stack of a fusion and its own members: somebody has taken ``active_adapters`` for what was asked."""
    for block in blocks_in(tree):
        if isinstance(block, Stack):
            for fusion in (child for child in block.children if isinstance(child, Fuse)):
                if twice := [child for child in block.children if child in fusion.children]:
                    raise ValueError(
                        f"the fusion {fusion.name!r} runs its members {twice} itself; name the fusion alone, or a block"
                    )


def _check_prompts(tree: Child, configs: Mapping[str, Any]) -> None:
    """Refuse a prompt inside a block that weighs or divides what layers put out: a prompt is there before any layer."""
    for block in (c for c in (tree.children if isinstance(tree, Stack) else (tree,)) if isinstance(c, Block)):
        if prompts := [name for name in names_in(block) if configs[name].is_prompt_learning]:
            raise ValueError(
                f"the prompts {prompts} act on the model's inputs, so they cannot be part of {block!r}; name them beside it, "
                "Stack('prompt', block), or give each sample its own with adapter_names"
            )


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
