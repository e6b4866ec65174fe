"""LoRA as a layer of its own: a linear layer with its update inside. Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    y = activation(x W' + b + lora_alpha / lora_rank * drop(x) A' B')       x[..., in], W[out, in], A[r, in], B[out, r]

B starts at zero, so the layer starts as its base. The computation is that of ``inlay.methods.lora``: the same kernel, dropout
included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.lora_linear import lora_linear
from ..kernels.tracing import being_traced
from . import checks
from .activations import Activation
from .dense import DenseParts
from .initial_values import Init, fill, he_uniform_sqrt5


class LoRADense(DenseParts):
    """A linear layer with a LoRA update: MindPet's arguments, in its order.

    Parameters: ``weight``, ``bias``, ``mindpet_delta_lora_a`` [r, in], ``mindpet_delta_lora_b`` [out, r]. All are trained until
    ``inlay.freeze_delta(model, "lora")`` freezes the others.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        lora_rank: r.
        lora_alpha: the update is scaled by lora_alpha / lora_rank.
        lora_dropout: probability with which elements of the update's input are zeroed in training; the base sees all of them.
        lora_a_init: start of A: a name, a number, a tensor, or a function that fills one; by default U(-1/sqrt(in),
            1/sqrt(in)).
        lora_b_init: start of B, likewise.
        param_init_type: dtype of the parameters.
        compute_dtype: dtype of all products. MindPet's default, float16, overflows from 65,504 on.
        weight_init: start of the weight, likewise; None is how linear layers start.
        bias_init: start of the bias, likewise.
        has_bias: whether there is a bias.
        activation: applied after the update is added: a name of MindPet's, a module, a function of one tensor, or None.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, ``lora_alpha`` is zero or not finite, a probability is outside [0, 1), a tensor has a
            wrong shape, or a name is unknown.

    Example::

        layer = LoRADense(768, 768, lora_rank=8, lora_alpha=16, lora_dropout=0.1)
        layer.load_state_dict(pretrained_linear.state_dict(), strict=False)  # an nn.Linear's weight and bias
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: int | float,
        lora_dropout: float = 0.0,
        lora_a_init: Init = he_uniform_sqrt5,
        lora_b_init: Init = "zeros",
        param_init_type: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        *,
        weight_init: Init | None = None,
        bias_init: Init | None = None,
        has_bias: bool = True,
        activation: Activation | None = None,
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
        checks.positive(self.name, lora_rank=lora_rank)
        checks.scale(self.name, lora_alpha=lora_alpha)
        checks.probability(self.name, lora_dropout=lora_dropout)
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.scaling = lora_alpha / lora_rank
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.mindpet_delta_lora_a = nn.Parameter(torch.empty(lora_rank, in_channels, dtype=param_init_type))
        self.mindpet_delta_lora_b = nn.Parameter(torch.empty(out_channels, lora_rank, dtype=param_init_type))
        fill(self.name, "lora_a_init", self.mindpet_delta_lora_a, lora_a_init)
        fill(self.name, "lora_b_init", self.mindpet_delta_lora_b, lora_b_init)

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in], in the dtype of x.

        Raises:
            TypeError: x is not floating point.
            ValueError: x is no matrix or larger, or has another width than ``in_channels``.
        """
        y: Tensor = self.activation(self._sum(*self.cast(x)))
        return y.to(x.dtype)

    def _sum(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self.mindpet_delta_lora_a, self.mindpet_delta_lora_b
        if being_traced():
            delta = F.linear(F.linear(self.lora_dropout(x), a.to(x.dtype)), b.to(x.dtype))
            return torch.add(F.linear(x, weight, bias), delta, alpha=self.scaling)
        p = self.lora_dropout.p if self.lora_dropout.training else 0.0
        return lora_linear(x, weight, bias, a, b, self.scaling, p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"
