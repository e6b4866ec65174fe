"""Adapted models of the cases, and what they must compute, in float64 and without Inlay's mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inlay import PeftModel, get_peft_model
from law_cases import KindCase, MethodCase, Spot
from law_checks import seeded, train


def adapted(
    method: MethodCase,
    kind: KindCase,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    **settings: Any,
) -> PeftModel:
    """Return a model with one adapter, "default", whose values are as after some training."""
    with seeded():
        model = get_peft_model(kind.build(dtype), method.on(kind, **settings))
    model.eval()
    if trained:
        train(model, "default")
    return model


def add(model: PeftModel, name: str, method: MethodCase, kind: KindCase, **settings: Any) -> None:
    """Add another trained adapter, which is not active."""
    with seeded():
        model.add_adapter(name, method.on(kind, **settings))
    train(model, name)


def parameters_of(model: nn.Module, spot: Spot, name: str = "default") -> dict[str, nn.Parameter]:
    """Return an adapter's parameters at a spot by column, read off their names in memory."""
    found = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        head, separator, tail = key.removeprefix("base_model.model.").rpartition(f".{name}")
        path, _, column = head.rpartition(".")
        if separator and path == spot.layer and (not tail or tail.startswith(".")):
            found[column + tail] = p
    return found


def reference(
    kind: KindCase,
    stack: Sequence[tuple[MethodCase, Sequence[dict[str, Tensor]]]],
    x: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return in float64 what the model computes with adapters in this order; each gives its parameters spot by spot."""
    bare = kind.build(dtype).double()
    tensors: dict[str, Tensor] = {}
    sizes = [spot.size(getattr(bare.get_submodule(spot.path), spot.param)) for spot in kind.spots]
    largest = (max(rows for rows, _ in sizes), max(columns for _, columns in sizes))
    for index, spot in enumerate(kind.spots):
        module = bare.get_submodule(spot.path)
        w = getattr(module, spot.param).detach()
        b = (
            getattr(module, spot.bias).detach()
            if spot.bias and getattr(module, spot.bias) is not None
            else None
        )
        if spot.groups > 1:
            w, module.groups = (
                torch.block_diag(*w.flatten(1).chunk(spot.groups)).unflatten(1, (-1, *w.shape[2:])),
                1,
            )
        padding = getattr(module, "padding_idx", None)
        spot = replace(spot, base=(w, b), largest=largest, padding=padding)
        for method, parameters in stack:
            w, b = method.formula(spot, w, b, parameters[index])
        tensors[f"{spot.path}.{spot.param}"] = w
        if b is not None:
            setattr(module, spot.bias, nn.Parameter(torch.zeros_like(b)))
            tensors[f"{spot.path}.{spot.bias}"] = b
    y: Tensor = functional_call(bare, tensors, (x,))
    return y


def exact_copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return parameters as float64 leaves of their own."""
    return {key: p.detach().double().requires_grad_() for key, p in parameters.items()}
