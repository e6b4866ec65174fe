"""LoRA on a linear layer as one autograd function: y = x W' + bias + scale * drop(x) A' B'.

    W[out, in]  A[r, in]  B[out, r]  x[..., in]  y[..., out]        Hu et al. 2021,
    https://arxiv.org/abs/2106.09685

The function and its gradients, with gain = scale / (1 - p), K(.) zeroing what dropout drops, and S = K(x) A':

    y  = x W' + bias + gain S B'            dS = dY B
    dX = dY W + gain K(dS A)                dA = gain dS' K(x)               dB = gain dY' S

The thin products are bound by memory traffic and not by arithmetic; `low_rank.py` has the care taken with
them. Of wide tensors only the input that the layer was given is kept for backward: layers that share an
input share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_inputs, outside_autocast
from .dropout import keep_mask, plain_dropped
from .low_rank import (
    add_delta,
    any_gradient,
    differentiable_grads,
    in_dtype,
    linear_grads,
    linear_output,
    project,
    rows_of,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """y[..., out] = x W' + bias + scale * (drop(x) A' B' + lora_bias), in the dtype of `weight`.

    `x` must have the dtype of `weight`; under autocast both are cast here, as `nn.Linear` casts them. `a`
    and `b` may be wider masters: they are cast to that dtype and their gradients come back in their own.
    `weight` may be a transposed view. A positive `dropout_p` always drops, so pass it in training only. Any
    tensor may require a gradient.

    Raises:
        ValueError: if `dropout_p` is not in [0, 1).

    Example::

        y = lora_linear(x, layer.weight, layer.bias, lora_a, lora_b, scale=lora_alpha / r)
    """
    x, weight, bias = autocast_inputs(x, weight, bias)
    if lora_bias is not None:
        shift = scale * lora_bias.to(weight.dtype)
        bias = shift if bias is None else bias + shift
    keep = keep_mask(x, dropout_p) if dropout_p else None
    gain = scale / (1.0 - dropout_p)
    if torch.compiler.is_compiling():
        return plain_lora_linear(x, weight, bias, a, b, keep, gain)
    with outside_autocast(x):
        if not any_gradient(x, weight, bias, a, b):
            return _values(x, weight, bias, a, b, keep, gain)[0]
        y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, keep, gain)  # type: ignore[no-untyped-call]
    return y


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None, gain: float
) -> Tensor:
    """The same function in differentiable operations: for second derivatives and for `torch.compile`."""
    delta = plain_dropped(x, keep) @ a.to(x.dtype).T @ b.to(x.dtype).T
    return torch.nn.functional.linear(x, weight, bias) + gain * delta


def _values(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, keep: Tensor | None, gain: float
) -> tuple[Tensor, Tensor]:
    """The output y, and S[n, r]."""
    rows = rows_of(x)
    s = project(rows, in_dtype(a, x), keep)
    y, y_rows = linear_output(x, rows, weight, bias)
    add_delta(y_rows, s, in_dtype(b, y), gain)
    return y, s


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None,
        gain: float,
    ) -> Tensor:
        y, s = _values(x, weight, bias, a, b, keep, gain)
        _, weight_needed, _, a_needed, b_needed = ctx.needs_input_grad[:5]
        kept_x = x if weight_needed or a_needed else None
        ctx.save_for_backward(kept_x, weight, bias, a, b, keep, s if b_needed else None)
        ctx.x_shape, ctx.gain = x.shape, gain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, keep, s = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, a, b)
            grads = differentiable_grads(plain_lora_linear, inputs, (keep, ctx.gain), needed, dy, ctx.x_shape)
            return *grads, None, None
        dy = rows_of(dy)
        dx, dw, da, db = linear_grads(dy, x, weight, a, b, keep, s, ctx.gain, needed)
        dbias = dy.sum(0) if needed[2] else None
        return None if dx is None else dx.view(ctx.x_shape), dw, dbias, da, db, None, None
