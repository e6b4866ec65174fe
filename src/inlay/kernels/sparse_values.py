"""Sparse values that stand in a dense weight: the layer runs as it is, and only the values have a gradient.

    W'[out, in]   x[..., in]   dY[..., out]   indices[2, k]   values[k]        Bhardwaj et al. 2024,
    https://arxiv.org/abs/2406.13175

W' holds the values already, so y = x W' + bias is the frozen layer's own product. For backward, dX = dY W', and of
dW = dY' X only the k entries that the values stand at are made, each a product of two columns:

    dvalues[i] = dY[:, row i] . X[:, column i]

2 n k operations for n tokens, where dW itself takes 2 n out in. Neither W' nor dW is ever copied or kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_inputs, outside_autocast
from .low_rank import rows_of

_TILE = 256
"""Tokens that are transposed at a time: both transposed tiles then stay in a second-level cache."""
_CHUNK_BYTES = 1 << 25
"""Largest piece of the dense gradient that exists at a time."""


def linear_with_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    before_backward: Callable[[], None],
) -> Tensor:
    """y[..., out] = x W' + bias, with the gradient of `values` taken from the entries of dW at `indices`.

    `weight` is W', which must hold the values; it is frozen and may be a transposed view. `before_backward` is called
    before backward reads W', to make sure that it still does. Under autocast x and W' are cast as `nn.Linear` casts them.
    """
    x, weight, bias = autocast_inputs(x, weight, bias)
    with outside_autocast(x):
        y: Tensor = _LinearWithValues.apply(x, weight, bias, values, indices, before_backward)  # type: ignore[no-untyped-call]
    return y


def weight_with_values(weight: Tensor, positions: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The weight itself, in the same memory, for any layer to run on; its gradient goes to the values that stand in it.

    Args:
        weight: W', in the layer's own shape.
        positions: for each set of values, their places in the weight as numbers into the flattened tensor.
        values: the sets of values.
    """
    w: Tensor = _WeightWithValues.apply(weight, positions, *values)  # type: ignore[no-untyped-call]
    return w


def sampled_product(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """(dY' X)[indices] for dy[n, out], x[n, in] and indices[2, k], by whichever way is faster for the shapes."""
    if _worth_sampling(dy, x, indices.shape[1]):
        return _sampled(dy, x, indices)
    return _gathered(dy, x, indices)


def _worth_sampling(dy: Tensor, x: Tensor, k: int) -> bool:
    # Measured on a CPU with AVX-512: a transposed element costs as much as 65 operations of a dense product, an
    # element of a sampled one as much as 8.5. Processors with matrix units for half precision leave no room for it.
    if dy.device.type != "cpu" or dy.dtype not in (torch.float32, torch.float64):
        return False
    out, width = dy.shape[1], x.shape[1]
    return 65 * (out + width) + 8.5 * k < out * width


def _sampled(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    # The gradient of an embedding bag's weights per sample is just this product: one contiguous scalar product for each
    # pair of rows, in parallel. Transposed tile by tile, both its operands come from cache.
    rows, columns = indices.int().unbind()
    total = dy.new_zeros(indices.shape[1])
    left, right = dy.new_empty(dy.shape[1] * _TILE), x.new_empty(x.shape[1] * _TILE)
    for start in range(0, len(dy), _TILE):
        tile = slice(start, start + _TILE)
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            _transposed(dy[tile], left), _transposed(x[tile], right), columns, rows, rows, 0, -1
        )
    return total


def _transposed(tile: Tensor, scratch: Tensor) -> Tensor:
    """tile[n, k] as a dense [k, n] in memory that the next tile uses again."""
    return scratch[: tile.numel()].view(tile.shape[1], -1).copy_(tile.t())


def _gathered(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    rows, columns = indices.long().unbind()
    found = dy.new_zeros(indices.shape[1])
    step = max(1, _CHUNK_BYTES // max(x.shape[1] * x.element_size(), 1))
    for start in range(0, dy.shape[1], step):
        dw = dy[:, start : start + step].t() @ x
        inside = (rows >= start) & (rows < start + len(dw))
        found = torch.where(inside, dw[(rows - start).clamp(0, len(dw) - 1), columns], found)
    return found


class _LinearWithValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        before_backward: Callable[[], None],
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, values, indices)
        ctx.x_shape, ctx.before_backward = x.shape, before_backward
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.before_backward()  # first: reading the saved weight checks that it is what it was
        x, weight, values, indices = ctx.saved_tensors
        x_needed, _, bias_needed, values_needed = ctx.needs_input_grad[:4]
        dy = rows_of(dy)
        dx = dvalues = None
        if x_needed:
            dx = (dy @ _differentiable(weight, values, indices)).view(ctx.x_shape)
        if values_needed:
            dvalues = sampled_product_of(dy, rows_of(x), indices).to(values.dtype)
        return dx, None, dy.sum(0) if bias_needed else None, dvalues, None, None


def _differentiable(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """W' as it is, or, for a second derivative, as a function of its values."""
    if not torch.is_grad_enabled():
        return weight
    rows, columns = indices.long().unbind()
    zero = (values - values.detach()).to(weight.dtype)
    return weight.index_put((rows, columns), zero, accumulate=True)


def sampled_product_of(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """`sampled_product`, in differentiable operations where a second derivative is asked for."""
    if not torch.is_grad_enabled():
        return sampled_product(dy, x, indices)
    rows, columns = indices.long().unbind()
    return (dy.t() @ x)[rows, columns]


class _WeightWithValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, positions: Sequence[Tensor], *values: Tensor) -> Tensor:
        ctx.positions = positions
        ctx.dtypes = [v.dtype for v in values]
        return (
            weight.detach()
        )  # shares memory and version counter: whoever saves it for backward sees it change

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        flat = dw.reshape(-1)
        grads = [flat[p].to(dtype) for p, dtype in zip(ctx.positions, ctx.dtypes, strict=True)]
        return None, None, *grads
