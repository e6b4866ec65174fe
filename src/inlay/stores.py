"""Stores: how the numbers of a frozen base weight are kept.

A store reads a weight as a plain floating-point tensor and writes one back. Optional libraries register theirs for the
tensor types they bring, and are looked for in ``sys.modules`` only: nothing is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

StoreT = TypeVar("StoreT", bound="type[WeightStore]")

_STORES: list[tuple[str, Callable[[nn.Module, str], bool], type[WeightStore]]] = []


def weight_store(library: str, test: Callable[[nn.Module, str], bool]) -> Callable[[StoreT], StoreT]:
    """Register a store for every ``(layer, parameter name)`` for which ``test`` holds once ``library`` is imported."""

    def register(cls: StoreT) -> StoreT:
        _STORES.insert(0, (library, test, cls))
        return cls

    return register


def store_of(layer: nn.Module, param: str) -> WeightStore:
    """Return the store that keeps a layer's parameter."""
    for library, test, cls in _STORES:
        if library in sys.modules and test(layer, param):
            return cls()
    weight = getattr(layer, param, None)  # an adapted output has none
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise ValueError(
            f"{type(layer).__name__}.{param} holds {weight.dtype} numbers (class {type(weight).__name__}) "
            "that Inlay cannot read; "
            "register a WeightStore for them with inlay.stores.weight_store"
        )
    return WeightStore()


class WeightStore:
    """A plain floating-point parameter. Stores of quantised weights subclass it."""

    plain = True

    def read(self, layer: nn.Module, param: str) -> Tensor:
        """Return the weight as a floating-point tensor of the layer's own shape."""
        weight: Tensor = getattr(layer, param)
        return weight

    def wrap(self, layer: nn.Module, param: str, w: Tensor) -> nn.Parameter:
        """Return a parameter of the layer's own storage format that holds ``w``, frozen as the present one is."""
        old = getattr(layer, param)
        return nn.Parameter(w.to(old.dtype), requires_grad=old.requires_grad)
