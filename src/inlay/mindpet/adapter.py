"""Bottleneck adapters as layers of their own. Houlsby et al. 2019, https://arxiv.org/abs/1902.00751.

    AdapterLayer(h) = h + f(h D' + d) U' + u            h[..., hidden], D[bottleneck, hidden], U[hidden, bottleneck]
    AdapterDense(x) = AdapterLayer(activation(x W' + b))

The weights D and U start at N(0, 0.01^2) and the biases at zero, so the layer starts close to the identity, but not as the
identity.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..blocks import bottleneck_residual
from . import checks
from .activations import Activation, activation_module
from .dense import DenseParts
from .initial_values import Init


class Sampler(DenseParts):
    """The way into the bottleneck, or out of it: a linear layer that returns the dtype of its input."""

    def __init__(
        self, in_channels: int, out_channels: int, param_init_type: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        super().__init__(
            in_channels, out_channels, "normal", "zeros", True, None, param_init_type, compute_dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in], in the dtype of x."""
        return self.hidden(x).to(x.dtype)


class AdapterLayer(nn.Module):
    """A bottleneck with its residual, to be set behind a layer: MindPet's arguments, in its order.

    Parameters, all under ``mindpet_delta_adapter_block``: ``mindpet_delta_adapter_down_sampler.weight`` and ``.bias``, and
    ``mindpet_delta_adapter_up_sampler.weight`` and ``.bias``; with prelu, ``mindpet_delta_adapter_non_linear.weight``.

    Args:
        hidden_size: width of the input and of the output.
        bottleneck_size: width between.
        non_linearity: a name of MindPet's, a module, or a function of one tensor.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of both products; the residual and the non-linearity keep the input's. MindPet's default is
            float16.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, or a name is unknown.

    Example::

        adapter = AdapterLayer(768, bottleneck_size=64)
        h = adapter(torch.randn(2, 5, 768))  # h[2, 5, 768]
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: Activation = "gelu",
        param_init_type: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = "AdapterLayer"
        checks.positive(name, hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        checks.dtype(name, param_init_type=param_init_type, compute_dtype=compute_dtype)
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.mindpet_delta_adapter_block = nn.Sequential(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=Sampler(
                    hidden_size, bottleneck_size, param_init_type, compute_dtype
                ),
                mindpet_delta_adapter_non_linear=activation_module(
                    name, "non_linearity", non_linearity, param_init_type
                ),
                mindpet_delta_adapter_up_sampler=Sampler(
                    bottleneck_size, hidden_size, param_init_type, compute_dtype
                ),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x[..., hidden_size] with the adapter's part added, in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than ``hidden_size``.
        """
        checks.rows("AdapterLayer", x, self.hidden_size)
        return bottleneck_residual(x, *self.mindpet_delta_adapter_block)


class AdapterDense(DenseParts):
    """A linear layer with an adapter behind it: MindPet's arguments, in its order.

    Parameters: ``weight``, ``bias``, and those of an ``AdapterLayer`` under ``mindpet_delta_adapter``. All are trained until
    ``inlay.freeze_delta(model, "adapter")`` freezes the others.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight: a name, a number, a tensor, a function that fills one, or None for how linear layers
            start; "normal" is N(0, 0.01^2).
        bias_init: start of the bias, likewise.
        has_bias: whether the linear layer has a bias; the adapter has its own in any case.
        activation: between the linear layer and the adapter: a name of MindPet's, a module, a function of one tensor, or None.
        bottleneck_size: width of the adapter's bottleneck.
        non_linearity: the adapter's, likewise.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of everything inside, the residual included. MindPet's default, float16, overflows from 65,504 on.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, a tensor has a wrong shape, or a name is unknown.

    Example::

        layer = AdapterDense(3072, 768, bottleneck_size=64)
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
        bottleneck_size: int = 64,
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
        self.mindpet_delta_adapter = AdapterLayer(
            out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in], in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than ``in_channels``.
        """
        y: Tensor = self.mindpet_delta_adapter(self.hidden(x))
        return y.to(x.dtype)
