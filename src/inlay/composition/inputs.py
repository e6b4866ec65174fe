"""The inputs of a model under ``Parallel``: the whole batch once for each child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import Child, Parallel, blocks_in

WITHOUT_ROWS = ("logits_to_keep", "cache_position")
"""Arguments whose tensors have no axis for the batch."""


def copies_for(tree: Child | None) -> int:
    """Return how often a composition needs the batch."""
    found = blocks_in(tree) if tree is not None else ()
    return next((len(block.children) for block in found if isinstance(block, Parallel)), 1)


def repeated(
    args: Sequence[Any], kwargs: Mapping[str, Any], copies: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the rows of every tensor of the batch repeated: all of them, then all of them again.

    The batch's size is that of the first tensor. Tensors in tuples, lists and dictionaries are repeated as well; what has
    another number of rows is passed on as it is, such as a cache that an earlier call has filled; so are positions.
    """
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
    if copies == 1 or first is None:
        return tuple(args), dict(kwargs)
    batch = len(first)

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = value.dim() > 0 and len(value) == batch
            return value.repeat(copies, *[1] * (value.dim() - 1)) if whole else value
        if type(value) in (tuple, list):
            return type(value)(repeat(v) for v in value)
        if (
            isinstance(value, dict) and type(value).__module__ != "builtins"
        ):  # an output of transformers, such as an encoder's
            return type(value)(**{k: repeat(v) for k, v in value.items()})
        return {k: repeat(v) for k, v in value.items()} if type(value) is dict else value

    return tuple(repeat(v) for v in args), {
        k: v if k in WITHOUT_ROWS else repeat(v) for k, v in kwargs.items()
    }
