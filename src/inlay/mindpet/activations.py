"""Activations by MindPet's 25 names, with MindPet's numbers: gelu is the tanh approximation, the slope of leakyrelu is 0.2.

Differences, on purpose. rrelu draws its slopes in training only and takes their mean afterwards, as PyTorch has it, so that
inference repeats itself; MindPet draws always. softmax2d takes what PyTorch takes (3 or 4 dimensions, over the third from the
end). threshold needs two numbers that neither library has a default for, so it is given as a module,
``torch.nn.Threshold(threshold, value)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = str | nn.Module | Callable[[Tensor], Tensor]


class Pointwise(nn.Module):
    """A function of tensors as a module, so that it can stand in an ``nn.Sequential``."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class PReLU(nn.PReLU):
    """One trained slope, 0.25 at first, that is cast to the dtype of what it multiplies."""

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight.to(input.dtype))


def fast_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "softmin": partial(nn.Softmin, dim=-1),
    "softmax": partial(nn.Softmax, dim=-1),
    "softmax2d": nn.Softmax2d,
    "logsoftmax": partial(nn.LogSoftmax, dim=-1),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": partial(nn.RReLU, 1 / 8, 1 / 3),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
    "hardtanh": nn.Hardtanh,
    "gelu": partial(nn.GELU, approximate="tanh"),
    "fast_gelu": partial(Pointwise, fast_gelu),
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "softsign": nn.Softsign,
    "prelu": PReLU,
    "leakyrelu": partial(nn.LeakyReLU, 0.2),
    "hswish": nn.Hardswish,
    "hsigmoid": nn.Hardsigmoid,
    "logsigmoid": nn.LogSigmoid,
    "softshrink": nn.Softshrink,
    "hshrink": nn.Hardshrink,
    "mish": nn.Mish,
}
NAMES = (*_MAKERS, "threshold")
"""MindPet's names."""


def activation_module(
    layer: str, argument: str, activation: Activation, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the module for a name, a module as it is, or another callable as a module.

    Args:
        layer: whose argument it is, for the message.
        argument: what the argument is called there.
        activation: one of ``NAMES``, a module, or a function of one tensor.
        dtype: of the slope of prelu, the only one that is trained.

    Raises:
        TypeError: it is none of these, or a class instead of an object.
        ValueError: the name is unknown (MindPet: KeyError or TypeError), or is threshold.
    """
    if isinstance(activation, nn.Module):
        return activation
    if isinstance(activation, type):
        raise TypeError(
            f"{layer}: {argument}={activation.__name__} is a class; pass an object: {activation.__name__}()"
        )
    if isinstance(activation, str):
        return _by_name(layer, argument, activation).to(dtype)
    if not callable(activation):
        raise TypeError(
            f"{layer}: {argument} must be a name, a torch.nn.Module or a function of one tensor, "
            f"not {activation!r} ({type(activation).__name__})"
        )
    return Pointwise(activation)


def _by_name(layer: str, argument: str, name: str) -> nn.Module:
    if name == "threshold":
        raise ValueError(
            f"{layer}: {argument}='threshold' needs two numbers; pass torch.nn.Threshold(threshold, value)"
        )
    if name not in _MAKERS:
        near = difflib.get_close_matches(name.lower(), _MAKERS, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{layer}: {argument}={name!r} is unknown{suggestion} (known: {', '.join(_MAKERS)})")
    return _MAKERS[name]()
