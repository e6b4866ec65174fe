"""DoRA on a linear layer as one autograd function: y = g * (x W' + scale * drop(x) A' B') + bias.

    W[out, in]  A[r, in]  B[out, r]  magnitude[out]  g[out] = magnitude / norm
    norm[out] = row norms of W + scale B A, a constant for the gradient (section 4.3)

    Liu et al. 2024, https://arxiv.org/abs/2402.09353

Backward is LoRA's with g * dY in place of dY. The gradient of the magnitude, sum_n dY (y - bias) / magnitude,
is taken from the output, which most consumers keep anyway, and not from a second tensor of that size.

Dropout acts on the low-rank term alone. HF PEFT also drops the input of the (g - 1) x W' part and pays a
second wide product for it; both have the expectation of the formula above, and this one has the smaller
variance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_inputs, outside_autocast
from .dora_norm import dora_norm
from .dropout import keep_mask, plain_dropped
from .low_rank import (
    add_delta,
    any_gradient,
    block_rows,
    differentiable_grads,
    in_dtype,
    linear_grads,
    linear_output,
    project,
    row_blocks,
    rows_of,
    scratch_for,
)

# Below this |g| the output holds too little of what it scaled to divide it out again.
_SMALLEST_INVERTIBLE_GAIN = 2.0**-6


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    weight_norm: Tensor | None = None,
) -> Tensor:
    """y[..., out] = magnitude / norm * (x W' + scale * drop(x) A' B') + bias, in the dtype of `weight`.

    `weight_norm`[out] is `dora_norm(weight, a, b, scale)`, computed if not given; rows of norm 0 are not
    scaled. Dtypes, autocast, transposed weights and dropout as in `lora_linear`.

    Raises:
        ValueError: if `dropout_p` is not in [0, 1).
    """
    if weight_norm is None:
        weight_norm = dora_norm(weight, a, b, scale)
    x, weight, bias = autocast_inputs(x, weight, bias)
    keep = keep_mask(x, dropout_p) if dropout_p else None
    gain = scale / (1.0 - dropout_p)
    if torch.compiler.is_compiling():
        return plain_dora_linear(x, weight, bias, a, b, magnitude, weight_norm, keep, gain)
    with outside_autocast(x):
        excess = excess_gain(magnitude.detach(), weight_norm)
        if not any_gradient(x, weight, bias, a, b, magnitude):
            return _values(x, weight, bias, a, b, excess, keep, gain)[0]
        y: Tensor = _DoraLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, a, b, magnitude, weight_norm, excess, keep, gain
        )
    return y


def plain_dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    keep: Tensor | None,
    gain: float,
) -> Tensor:
    """The same function in differentiable operations: for second derivatives and for `torch.compile`."""
    u = x @ weight.T + gain * (plain_dropped(x, keep) @ a.to(x.dtype).T @ b.to(x.dtype).T)
    y = u + u * excess_gain(magnitude, weight_norm).to(x.dtype)
    return y if bias is None else y + bias


def excess_gain(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """G - 1, which a narrow dtype holds far better than g: g stays near 1 in training."""
    return torch.where(weight_norm > 0, magnitude / weight_norm, 1.0) - 1.0


class _Kept(torch.autograd.Function):
    """Holds a tensor as autograd holds saved tensors (hooks, checkpointing), in a node of its own.

    An in-place operation on the layer's output, which `nn.Linear` allows, then costs a recomputation, not
    an error.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, held: Tensor) -> Tensor:
        ctx.save_for_backward(held)
        return token.clone()

    @staticmethod
    def hold(tensor: Tensor) -> Tensor:
        with torch.enable_grad():
            token = torch.empty(0, requires_grad=True)
            handle: Tensor = _Kept.apply(token, tensor.detach())  # type: ignore[no-untyped-call]
        return handle

    @staticmethod
    def recall(handle: Tensor) -> Tensor | None:
        try:
            (held,) = handle.grad_fn.saved_tensors  # type: ignore[union-attr]
        except RuntimeError:  # modified in place since
            return None
        return held  # type: ignore[no-any-return]


def _values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    excess: Tensor,
    keep: Tensor | None,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """The output y, and S[n, r]."""
    rows = rows_of(x)
    s = project(rows, in_dtype(a, x), keep)
    y, y_rows = linear_output(x, rows, weight, None)
    add_delta(y_rows, s, in_dtype(b, y), gain)
    y.addcmul_(y, in_dtype(excess, y))
    if bias is not None:
        y.add_(bias)
    return y, s


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        weight_norm: Tensor,
        excess: Tensor,
        keep: Tensor | None,
        gain: float,
    ) -> Tensor:
        y, s = _values(x, weight, bias, a, b, excess, keep, gain)
        _, weight_needed, _, a_needed, b_needed, magnitude_needed = ctx.needs_input_grad[:6]
        kept_x = x if weight_needed or a_needed or magnitude_needed else None
        kept_s = s if b_needed or magnitude_needed else None
        ctx.save_for_backward(kept_x, weight, bias, a, b, magnitude, weight_norm, excess, keep, kept_s)
        ctx.output = _Kept.hold(y) if magnitude_needed else None
        ctx.x_shape, ctx.gain = x.shape, gain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, magnitude, weight_norm, excess, keep, s = ctx.saved_tensors
        needed = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, a, b, magnitude)
            constants = (weight_norm, keep, ctx.gain)
            grads = differentiable_grads(plain_dora_linear, inputs, constants, needed, dy, ctx.x_shape)
            return *grads, None, None, None, None
        dy = rows_of(dy)
        dbias = dy.sum(0) if needed[2] else None
        dmagnitude = None
        if needed[5]:
            dots = None if ctx.output is None else _dots_with_output(dy, _Kept.recall(ctx.output), bias)
            # Dropped at once, as autograd drops what it saved; a second backward of this graph recomputes.
            ctx.output = None
            operands = (x, weight, b, magnitude, weight_norm, s, ctx.gain)
            dmagnitude = _grad_of_magnitude(dots, dy, *operands)
        # Both make g dY W, and the smaller of dY and W is the cheaper one to scale.
        scale_weight = dy.shape[0] > weight.shape[1] and not needed[1]
        if scale_weight:
            weight, b = _scaled(weight, excess.unsqueeze(1)), _scaled(b, excess.unsqueeze(1))
        else:
            dy = _scaled(dy, excess)
        dx, dw, da, db = linear_grads(dy, x, weight, a, b, keep, s, ctx.gain, needed)
        if scale_weight and db is not None:
            db = _scaled(db, excess.unsqueeze(1))
        dx = None if dx is None else dx.view(ctx.x_shape)
        return dx, dw, dbias, da, db, dmagnitude, None, None, None, None


def _scaled(tensor: Tensor, excess: Tensor) -> Tensor:
    """G * tensor."""
    return torch.addcmul(tensor, tensor, excess.to(tensor.dtype))


def _dots_with_output(dy: Tensor, y: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """sum_n dY (y - bias)[out], None if y is gone."""
    if y is None:
        return None
    dots = _column_dots(dy, rows_of(y))
    return dots if bias is None else dots - dy.sum(0, dtype=dots.dtype) * bias


def _grad_of_magnitude(
    dots: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    b: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    s: Tensor,
    gain: float,
) -> Tensor:
    """sum_n dY u / norm with u = (y - bias) / g, or u = x W' + gain S B' where the output y does not tell."""
    if dots is None:
        lost = torch.arange(weight.shape[0], device=weight.device)
        grad = torch.zeros_like(weight_norm)
    else:
        lost = (magnitude.abs() < _SMALLEST_INVERTIBLE_GAIN * weight_norm).nonzero().squeeze(1)
        grad = torch.where(weight_norm > 0, dots.to(weight_norm.dtype) / magnitude, 0.0)
    if lost.numel():
        u = add_delta(rows_of(x) @ weight[lost].T, s, b[lost].to(dy.dtype), gain)
        exact = _column_dots(dy[:, lost], u).to(grad.dtype) / weight_norm[lost]
        grad[lost] = torch.where(weight_norm[lost] > 0, exact, 0.0)
    return grad.to(magnitude.dtype)


def _column_dots(p: Tensor, q: Tensor) -> Tensor:
    """sum_n p[n, k] q[n, k], accumulated in fp32 or wider."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    if p.shape[0] <= block_rows(p):
        return (p * q).sum(0, dtype=dtype)
    total = torch.zeros(p.shape[1], dtype=dtype, device=p.device)
    scratch = scratch_for(p)
    for rows in row_blocks(p):
        product = torch.mul(p[rows], q[rows], out=scratch[: rows.stop - rows.start])
        total += product.sum(0, dtype=dtype)
    return total
