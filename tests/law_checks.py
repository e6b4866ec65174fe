"""What the tests of adapters share: trained values that are the same at every call, and what must agree or must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from law_models import ROWS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}
"""Largest deviation allowed, relative to the largest number of the reference."""


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from the default generator as if it were fresh, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def train(model: nn.Module, name: str) -> None:
    """Move an adapter's parameters to where training could have left them; each name has values of its own."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for key, p in model.named_parameters():
        if name in key.split("."):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if "lora_embedding_A" in key or (".lora_A." in key and p.shape[-1] == ROWS):
                p[:, 0] = 0  # a padding token's column starts at zero and never gets a gradient


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """Fail unless two tensors agree within the tolerance of a dtype, relative to the largest number wanted."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    scale = max(float(wanted.detach().abs().max()), 1e-3)
    error = float((got.detach().double() - wanted.detach().double()).abs().max()) / scale
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e} in {dtype}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that must not change: names, identities, bytes and flags of parameters and buffers, classes of modules."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    state = {key: (id(t), t.detach().clone(), t.requires_grad) for key, t in tensors.items()}
    modules = {
        path: (id(m), type(m), m.training, len(m._forward_pre_hooks))
        for path, m in model.named_modules(remove_duplicate=False)
    }
    geometry = {path: m.groups for path, m in model.named_modules() if hasattr(m, "groups")}
    return {"tensors": state, "modules": modules, "geometry": geometry, "attributes": sorted(vars(model))}


def assert_unchanged(before: dict[str, Any], model: nn.Module, flags: bool = True) -> None:
    """Fail unless a model is what it was, bit for bit (``flags=False``: whatever requires a gradient)."""
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["geometry"] == before["geometry"]
    assert after["attributes"] == before["attributes"]
    assert list(after["tensors"]) == list(before["tensors"])
    for key, (identity, value, flag) in before["tensors"].items():
        now, now_value, now_flag = after["tensors"][key]
        assert now == identity, f"{key} is another tensor"
        assert now_value.dtype == value.dtype and torch.equal(now_value, value), f"{key} has other values"
        assert not flags or now_flag == flag, f"{key}: requires_grad is {now_flag}, not {flag}"
