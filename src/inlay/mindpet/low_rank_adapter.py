"""Low-rank adapters as layers of their own: bottleneck adapters whose two weights are products of thin factors.

    LowRankAdapterLayer(h) = h + (f((h L1) R1 + b1) L2) R2 + b2     k = hidden // reduction_factor
    LowRankAdapterDense(x) = LowRankAdapterLayer(activation(x W' + b))

    h[..., hidden], L1[hidden, r], R1[r, k], b1[k], L2[k, r], R2[r, hidden], b2[hidden]

Both biases are there and trained; MindPet's guide leaves them out of the formula, its code does not. All four factors start
random, so the layer does not start as the identity. Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647 (the baseline
there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import bottleneck_residual, low_rank_linear
from . import checks
from .activations import Activation, activation_module
from .dense import DenseParts
from .initial_values import Init, fill

FactorInit = str | Callable[[Tensor], Any]


class LowRankSampler(nn.Module):
    """``inlay.blocks.LowRankLinear`` under MindPet's names; it computes in ``compute_dtype`` and returns its input's dtype."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        init: FactorInit,
        param_init_type: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        left = nn.Parameter(torch.empty(in_channels, rank, dtype=param_init_type))
        right = nn.Parameter(torch.empty(rank, out_channels, dtype=param_init_type))
        for factor in (left, right):
            fill("LowRankAdapterLayer", "low_rank_w_init", factor, init)
        self.mindpet_delta_low_rank_adapter_weight_left = left
        self.mindpet_delta_low_rank_adapter_weight_right = right
        self.bias = nn.Parameter(torch.zeros(out_channels, dtype=param_init_type))

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in], in the dtype of x."""
        left, right = (
            self.mindpet_delta_low_rank_adapter_weight_left,
            self.mindpet_delta_low_rank_adapter_weight_right,
        )
        inputs = (t.to(self.compute_dtype) for t in (x, left, right, self.bias))
        return low_rank_linear(*inputs).to(x.dtype)

    def extra_repr(self) -> str:
        rank, out_channels = self.mindpet_delta_low_rank_adapter_weight_right.shape
        in_channels = self.mindpet_delta_low_rank_adapter_weight_left.shape[0]
        return f"{in_channels}, {out_channels}, rank={rank}, compute_dtype={self.compute_dtype}"


class LowRankAdapterLayer(nn.Module):
    """A bottleneck of low-rank layers with its residual, to be set behind a layer: MindPet's arguments, in its order.

    Parameters, for each of ``mindpet_delta_low_rank_adapter_down_sampler`` and ``..._up_sampler``:
    ``mindpet_delta_low_rank_adapter_weight_left``, ``mindpet_delta_low_rank_adapter_weight_right`` and ``bias``; with prelu,
    ``mindpet_delta_low_rank_adapter_non_linear.weight``.

    Args:
        hidden_size: width of the input and of the output.
        reduction_factor: the bottleneck is ``hidden_size // reduction_factor`` wide.
        low_rank_size: width between the factors.
        low_rank_w_init: start of all four factors: a name, or a function that fills a tensor.
        non_linearity: a name of MindPet's, a module, or a function of one tensor.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of the products; the residual and the non-linearity keep the input's. MindPet's default is float16.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, ``reduction_factor`` is above ``hidden_size``, or a name is unknown.

    Example::

        adapter = LowRankAdapterLayer(768, reduction_factor=32)
        h = adapter(torch.randn(2, 5, 768))  # h[2, 5, 768]
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int,
        low_rank_size: int = 1,
        low_rank_w_init: FactorInit = "xavier_uniform",
        non_linearity: Activation = "gelu",
        param_init_type: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = "LowRankAdapterLayer"
        checks.positive(
            name, hidden_size=hidden_size, reduction_factor=reduction_factor, low_rank_size=low_rank_size
        )
        checks.dtype(name, param_init_type=param_init_type, compute_dtype=compute_dtype)
        _check_reduction(name, reduction_factor, "hidden_size", hidden_size)
        _check_factor_init(name, low_rank_w_init)
        self.hidden_size, self.bottleneck_size = hidden_size, hidden_size // reduction_factor
        made = (low_rank_size, low_rank_w_init, param_init_type, compute_dtype)
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankSampler(
            hidden_size, self.bottleneck_size, *made
        )
        self.mindpet_delta_low_rank_adapter_non_linear = activation_module(
            name, "non_linearity", non_linearity, param_init_type
        )
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankSampler(
            self.bottleneck_size, hidden_size, *made
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x[..., hidden_size] with the adapter's part added, in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than ``hidden_size``.
        """
        checks.rows("LowRankAdapterLayer", x, self.hidden_size)
        return bottleneck_residual(
            x,
            self.mindpet_delta_low_rank_adapter_down_sampler,
            self.mindpet_delta_low_rank_adapter_non_linear,
            self.mindpet_delta_low_rank_adapter_up_sampler,
        )


class LowRankAdapterDense(DenseParts):
    """A linear layer with a low-rank adapter behind it: MindPet's arguments, in its order.

    Parameters: ``weight``, ``bias``, and those of a ``LowRankAdapterLayer`` under ``mindpet_delta_low_rank_adapter``. All are
    trained until ``inlay.freeze_delta(model, "low_rank_adapter")`` freezes the others.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight: a name, a number, a tensor, a function that fills one, or None for how linear layers
            start; "normal" is N(0, 0.01^2).
        bias_init: start of the bias, likewise.
        has_bias: whether the linear layer has a bias; the adapter has its own in any case.
        activation: between the linear layer and the adapter: a name of MindPet's, a module, a function of one tensor, or None.
        reduction_factor: the bottleneck is ``out_channels // reduction_factor`` wide.
        low_rank_size: width between the factors.
        low_rank_w_init: start of all four factors: a name, or a function that fills a tensor.
        non_linearity: the adapter's, as ``activation``.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of everything inside, the residual included. MindPet's default, float16, overflows from 65,504 on.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, ``reduction_factor`` is above ``out_channels``, a tensor has a wrong shape, or a name
            is unknown.

    Example::

        layer = LowRankAdapterDense(3072, 768, reduction_factor=32)
        layer.load_state_dict(pretrained_linear.state_dict(), strict=False)  # an nn.Linear's weight and bias
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Init | None = "normal",
        bias_init: Init | None = "zeros",
        has_bias: bool = True,
        activation: Activation | None = None,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: FactorInit = "xavier_uniform",
        non_linearity: Activation = "gelu",
        param_init_type: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            weight_init,
            bias_init,
            has_bias,
            activation,
            param_init_type,
            compute_dtype,
        )
        checks.positive(self.name, reduction_factor=reduction_factor)
        _check_reduction(self.name, reduction_factor, "out_channels", out_channels)
        self.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            out_channels,
            reduction_factor,
            low_rank_size,
            low_rank_w_init,
            non_linearity,
            param_init_type,
            compute_dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in], in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than ``in_channels``.
        """
        y: Tensor = self.mindpet_delta_low_rank_adapter(self.hidden(x))
        return y.to(x.dtype)


def _check_reduction(layer: str, reduction_factor: int, argument: str, width: int) -> None:
    if reduction_factor > width:
        raise ValueError(
            f"{layer}: reduction_factor={reduction_factor} must be at most {argument}={width}, "
            "or no bottleneck is left"
        )


def _check_factor_init(layer: str, init: Any) -> None:
    if not isinstance(init, str) and (isinstance(init, Tensor) or not callable(init)):
        raise TypeError(
            f"{layer}: low_rank_w_init must be a name or a function that fills a tensor, for it starts factors of four "
            f"shapes, not {init if init is None else type(init).__name__}"
        )
