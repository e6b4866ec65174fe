"""What the dense layers have in common: a weight, a bias and an activation of their own.

    y = activation(x W' + b)        x[..., in], W[out, in], b[out]

The product runs in ``compute_dtype``, whatever the dtypes of x and of the parameters are.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .activations import Activation, activation_module
from .initial_values import Init, fill, he_uniform_sqrt5


class DenseParts(nn.Module):
    """The weight, the bias, the activation and the checks of a dense layer; what is computed with them, its kinds say.

    An init of None is how linear layers start: U(-1/sqrt(in), 1/sqrt(in)), the bias as well.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Init | None,
        bias_init: Init | None,
        has_bias: bool,
        activation: Activation | None,
        param_init_type: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        checks.positive(self.name, in_channels=in_channels, out_channels=out_channels)
        checks.flag(self.name, has_bias=has_bias)
        checks.dtype(self.name, param_init_type=param_init_type, compute_dtype=compute_dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, dtype=param_init_type))
        weight_init = he_uniform_sqrt5 if weight_init is None else weight_init
        fill(self.name, "weight_init", self.weight, weight_init)
        self.bias = nn.Parameter(torch.empty(out_channels, dtype=param_init_type)) if has_bias else None
        if self.bias is not None:
            bound = 1 / math.sqrt(in_channels)
            bias_init = partial(nn.init.uniform_, a=-bound, b=bound) if bias_init is None else bias_init
            fill(self.name, "bias_init", self.bias, bias_init)
        self.activation: nn.Module = (
            nn.Identity()
            if activation is None
            else activation_module(self.name, "activation", activation, param_init_type)
        )

    @property
    def name(self) -> str:
        """What messages call the layer."""
        return type(self).__name__

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, the weight and the bias in ``compute_dtype``.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than the layer.
        """
        checks.rows(self.name, x, self.in_channels)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return x.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias

    def hidden(self, x: Tensor) -> Tensor:
        """Return activation(x W' + b) in ``compute_dtype``."""
        h: Tensor = self.activation(F.linear(*self.cast(x)))
        return h

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, has_bias={self.bias is not None}, "
            f"compute_dtype={self.compute_dtype}"
        )
