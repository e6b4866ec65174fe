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
