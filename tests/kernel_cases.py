"""Tensors, reference formulas and the comparison that the tests of the kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.kernels import dora_linear, lora_linear
from inlay.kernels.dropout import keep_mask

SCALE = 1.7
# Largest error, relative to the largest entry of the true value, that rounding to the compute dtype explains.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
NAMES = ("x", "weight", "bias", "a", "b", "magnitude")


def make_tensors(
    shape: tuple[int, ...] = (3, 4, 24),
    out: int = 20,
    r: int = 4,
    dtype: torch.dtype = torch.float64,
    master: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """x, weight, bias, a, b, magnitude: values are those of a float64 draw rounded to their dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    columns, master = shape[-1], master or dtype
    return {
        "x": draw(*shape).to(dtype),
        "weight": (draw(out, columns) / columns**0.5).to(dtype),
        "bias": draw(out).to(dtype) if bias else None,
        "a": (draw(r, columns) / columns**0.5).to(master),
        "b": (draw(out, r) * 0.3).to(master),
        "magnitude": (1.0 + 0.3 * draw(out)).to(master),
    }


def reference(tensors: dict[str, Tensor | None], keep: Tensor | None, p: float, dora: bool) -> Tensor:
    """The formula in float64 on leaves of the same values; `keep` is 0/1 or None."""
    x, weight, bias, a, b, magnitude = (tensors[name] for name in NAMES)
    dropped = x if keep is None else x * keep.view(x.shape) / (1.0 - p)
    y = x @ weight.T + SCALE * (dropped @ a.T) @ b.T
    if dora:
        y = y * (magnitude / (weight + SCALE * b @ a).norm(dim=1).detach())
    return y if bias is None else y + bias


def fused(tensors: dict[str, Tensor | None], p: float, dora: bool) -> Tensor:
    x, weight, bias, a, b, magnitude = (tensors[name] for name in NAMES)
    if dora:
        return dora_linear(x, weight, bias, a, b, magnitude, SCALE, p)
    return lora_linear(x, weight, bias, a, b, SCALE, p)


def leaves(
    tensors: dict[str, Tensor | None], needed: set[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    return {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(name in needed)
        for name, t in tensors.items()
    }


def gradients(y: Tensor, tensors: dict[str, Tensor | None], needed: set[str]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    names = [name for name in NAMES if name in needed]
    return dict(zip(names, torch.autograd.grad(y, [tensors[name] for name in names], dy), strict=True))


def relative_error(value: Tensor, truth: Tensor) -> float:
    if not truth.numel():
        return 0.0
    value, truth = value.detach().double(), truth.detach()
    return ((value - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def check(
    tensors: dict[str, Tensor | None],
    needed: set[str],
    p: float = 0.0,
    dora: bool = False,
    tolerance: float | None = None,
) -> None:
    needed = {name for name in needed if tensors[name] is not None}
    mine, truth = leaves(tensors, needed), leaves(tensors, needed, torch.float64)
    state = torch.get_rng_state()
    keep = keep_mask(tensors["x"], p).ne(0) if p else None
    torch.set_rng_state(state)
    y, expected = fused(mine, p, dora), reference(truth, keep, p, dora)
    limit = tolerance or TOLERANCE[tensors["x"].dtype]
    assert y.shape == expected.shape and y.dtype == tensors["x"].dtype
    assert relative_error(y, expected) <= limit
    if not needed:
        assert not y.requires_grad
        return
    wanted = gradients(expected, truth, needed)
    for name, got in gradients(y, mine, needed).items():
        assert got.dtype == tensors[name].dtype and got.shape == tensors[name].shape, name
        assert relative_error(got, wanted[name]) <= limit, name


EVERYTHING = set(NAMES[:5])
