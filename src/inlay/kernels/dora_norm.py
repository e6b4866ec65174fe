"""Row norms of W + scale B A without a tensor of W's size."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import outside_autocast

_BLOCK_ELEMENTS_ON_CPU = 1 << 17
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 25
# Rows shorter than this share of ||w||^2 are summed again directly: they are all those of which less than a tenth of
# the squares survives, and in the expansion below what rounding leaves of the rest would be a visible part of them.
# (With ||s BA|| = q ||w|| what survives is at least (1 - q)^2 / (1 + q^2), below a tenth only for q < 1.6.)
_CANCELLED_SHARE = 0.36


@torch.no_grad()
def dora_norm(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, row_norm_sq: Tensor | None = None
) -> Tensor:
    """Norms[out] of the rows of W + scale B A, in fp32 (float64 stays), detached.

    W[out, in] may be a transposed view or of a narrower dtype. `row_norm_sq` is `row_norm_squares(weight)`,
    which a caller whose W is frozen computes once. On a CPU the square is expanded,

        ||w||^2 + 2 scale <w, BA> + scale^2 ||BA||^2,

    at a cost that grows with r and not with the batch; rows in which these terms cancel are summed
    directly, as all rows are on other devices, where one more pass over W costs less than the thin
    products.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    with outside_autocast(weight):
        if weight.device.type != "cpu":
            return _direct_squares(weight, a, b, scale).sqrt_()
        base = row_norm_squares(weight) if row_norm_sq is None else row_norm_sq.to(dtype)
        thin = _times(weight, a.T)
        squares = (thin.addmm_(b, a @ a.T, beta=2.0 * scale, alpha=scale * scale) * b).sum(1).add_(base)
        cancelled = (squares < _CANCELLED_SHARE * base).nonzero().squeeze(1)
        if cancelled.numel():
            squares[cancelled] = _direct_squares(weight[cancelled], a, b[cancelled], scale)
        return squares.sqrt_()


@torch.no_grad()
def row_norm_squares(weight: Tensor) -> Tensor:
    """||w||^2[out] of the rows of W[out, in], in fp32 (float64 stays)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    for rows in _blocks(weight):
        torch.sum(weight[rows].to(dtype).square(), dim=1, out=squares[rows])
    return squares


def _times(weight: Tensor, columns: Tensor) -> Tensor:
    """W columns[in, r] in the wider dtype of `columns`; a narrower W is widened one block at a time."""
    if weight.dtype == columns.dtype:
        return weight @ columns
    product = columns.new_empty(weight.shape[0], columns.shape[1])
    for rows in _blocks(weight):
        torch.mm(weight[rows].to(columns.dtype), columns, out=product[rows])
    return product


def _direct_squares(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    squares = b.new_empty(weight.shape[0])
    for rows in _blocks(weight):
        merged = torch.addmm(weight[rows].to(b.dtype), b[rows], a, alpha=scale)
        torch.sum(merged.square_(), dim=1, out=squares[rows])
    return squares


def _blocks(weight: Tensor) -> list[slice]:
    elements = _BLOCK_ELEMENTS_ON_CPU if weight.device.type == "cpu" else _BLOCK_ELEMENTS_ELSEWHERE
    step = max(1, elements // max(weight.shape[1], 1))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
