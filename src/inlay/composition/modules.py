"""What a composition makes of modules that adapters train and save whole, such as heads.

Rows and positions go to the copies of their own adapters, an average is that of the copies' outputs, a fusion uses its own
copy. In a stack the first adapter that has a copy decides, as it does where several adapters act in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import Average, Block, Child, Fuse, Split, Stack, names_in
from .rows import runs_of


def chosen_copy(node: Child, copies: Mapping[str, nn.Module], original: nn.Module) -> nn.Module | Block:
    """Return the one module that a composition comes down to, or the block that needs several.

    Raises:
        ValueError: members of a fusion have copies, and the fusion itself has none.
    """
    if not isinstance(node, Block):
        return copies.get(node, original)
    having = [name for name in dict.fromkeys(names_in(node)) if name in copies]
    if not having:
        return original
    if isinstance(node, Stack):
        first = next(child for child in node.children if any(name in copies for name in names_in(child)))
        return chosen_copy(first, copies, original)
    if not isinstance(node, Fuse):
        return node
    if node.name in copies:
        return copies[str(node.name)]
    if len(having) > 1:
        raise ValueError(
            f"the members {having} of the fusion {node.name!r} each saved a {type(original).__name__} of their own, which "
            "cannot be fused; let the fusion train one: FusionConfig(modules_to_save=[...])"
        )
    return copies[having[0]]


def run_copies(
    node: Child, copies: Mapping[str, nn.Module], original: nn.Module, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run a saved module under a composition.

    Raises:
        ValueError: the input cannot be divided as a block asks.
    """

    def run(node: Child, x: Tensor) -> Any:
        chosen = chosen_copy(node, copies, original)
        if not isinstance(chosen, Block):
            return chosen(x, *args, **kwargs)
        if isinstance(chosen, Average):
            rest = 1.0 - sum(chosen.weights)
            terms = [w * run(child, x) for child, w in zip(chosen.children, chosen.weights, strict=True)]
            if abs(rest) > 1e-12:
                terms.append(rest * original(x, *args, **kwargs))
            return torch.stack(terms).sum(0)
        axis, sizes = _parts(chosen, x)
        parts = zip(chosen.children, torch.split(x, sizes, axis), strict=True)
        return torch.cat([run(child, part) for child, part in parts], axis)

    return run(node, x)


def _parts(block: Block, x: Tensor) -> tuple[int, list[int]]:
    if isinstance(block, Split):
        if x.dim() < 3 or x.shape[1] != sum(block.splits):
            raise ValueError(f"{block!r} does not fit a saved module that received {list(x.shape)}")
        return 1, list(block.splits)
    return 0, runs_of(block, x.shape[0], "a saved module")
