"""The functions between the two projections, by the names that transformers' ``ACT2FN`` gives them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "relu2": lambda x: F.relu(x).square(),
    "mish": F.mish,
    "linear": lambda x: x,
}

DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_new": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "swish": torch.ops.aten.silu_backward,
}
"""Gradients of the usual ones, given that of the result and the input, without an autograd graph."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
        raise ValueError(
            f"unknown non_linearity {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]
