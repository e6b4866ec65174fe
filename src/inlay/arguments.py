"""What modules of transformers take and use: names of arguments and of globals, what a cache holds, which labels count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

IGNORED = -100
"""The label that losses leave out."""


def named_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a module by name.

    Raises:
        TypeError: there are more positional arguments than the module takes.
    """
    if not args:
        return dict(kwargs)
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call whose positional arguments have these names, in order; for names that are looked up once."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cached_length(cache: Any) -> Any:
    """Return how many keys a cache holds: 0 for None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return cache.get_seq_length()
    return cache[0][0].shape[-2] if len(cache) and cache[0] is not None else 0


def parameters_of(module: nn.Module) -> frozenset[str]:
    """Return the names of what a module's ``forward`` takes."""
    return frozenset(inspect.signature(type(module).forward).parameters)


def names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """Return the names of globals and attributes that a module's ``forward`` uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()
