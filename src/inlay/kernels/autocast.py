"""Autocast around functions that cast by themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has none, and PyTorch raises if asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on x's device; entering torch's own costs more than a thin product, so only if on."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()


def autocast_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same tensors, cast as `nn.Linear` casts them where autocast is on for their device."""
    if not autocast_is_on(x) or weight.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
