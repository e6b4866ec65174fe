"""The thin products of LoRA and DoRA and their gradients, with wide tensors touched as rarely as possible.

    x[n, in]  W[out, in]  A[r, in]  B[out, r]  S[n, r]  dY[n, out]  keep[n, in] of `dropout.py`

Everything works on matrices and in the dtype of x. A masked activation exists one block of rows at a time,
in a scratch tensor that stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dropout import clear_dropped_, copy_kept_

# Half of a common second-level cache: smaller blocks lose more to the cost of a call than they gain in cache.
_BLOCK_BYTES_PER_THREAD = 1 << 19
# A thin matrix of fewer elements is multiplied before it could be copied.
_WORTH_A_COPY = 1 << 12


def any_gradient(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors is recorded for backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_dtype(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype of another; `Tensor.to` takes longer to find out that there is nothing to do."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def rows_of(wide: Tensor) -> Tensor:
    """wide[..., k] as a dense matrix [n, k]."""
    rows = wide if wide.dim() == 2 else wide.reshape(-1, wide.shape[-1])
    return rows.contiguous()


def scaled_product(gain: float, p: Tensor, q: Tensor) -> Tensor:
    """Gain * p q, without a pass of its own for the factor."""
    return p @ q if gain == 1.0 else torch.addmm(p.new_empty(1), p, q, beta=0, alpha=gain)


def linear_output(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y[..., out] = x W' + bias for `rows` = rows_of(x), and y's rows as a view of it.

    y itself is no view: autograd forbids in-place operations on a view that a custom function returns.
    """
    if x.dim() == 2:
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        return y, y
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    y_rows = y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.T, out=y_rows)
    else:
        torch.addmm(bias, rows, weight.T, out=y_rows)
    return y, y_rows


def project(x: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """S[n, r] = K(x) A', where K zeroes what dropout drops."""
    # With AMX a bf16 product takes half the time from a contiguous A'; without it, and in fp32, the copy is waste.
    columns = a.T.contiguous() if a.element_size() == 2 else a.T
    if keep is None:
        return _thin(x @ columns)
    if x.shape[0] <= block_rows(x):
        return _thin(copy_kept_(torch.empty_like(x), x, keep) @ columns)
    s = x.new_empty(x.shape[0], a.shape[0])
    for rows, dropped in _dropped_blocks(x, keep):
        torch.mm(dropped, columns, out=s[rows])
    return _thin(s)


def add_delta(y: Tensor, s: Tensor, b: Tensor, gain: float) -> Tensor:
    """y[n, out] += gain * S B', in place."""
    return y.addmm_(s, b.T, alpha=gain)


def linear_grads(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    keep: Tensor | None,
    s: Tensor | None,
    gain: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dX[n, in], dW, dA, dB) of x W' + gain S B', None where `needed` (x, W, bias, A, B) says so.

    `x` may be None if neither W nor A needs a gradient, `s` if B needs none.
    """
    dx = dw = da = db = None
    x = None if x is None else rows_of(x)
    # In this order a product finds the wide operand of the one before it in cache.
    ds = _thin(scaled_product(gain, dy, in_dtype(b, dy))) if needed[0] or needed[3] else None
    if needed[4]:
        assert s is not None
        db = in_dtype(scaled_product(gain, s.T, dy).T, b)
    if needed[0]:
        assert ds is not None
        dx = _grad_of_input(dy, weight, ds, in_dtype(a, dy), keep)
    if needed[3]:
        assert ds is not None and x is not None
        da = in_dtype(_grad_of_a(ds, x, keep), a)
    if needed[1]:
        assert x is not None
        dw = dy.T @ x
    return dx, dw, da, db


def _grad_of_input(dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """DY W + K(dS A) for dS that has its gain."""
    if keep is None:
        return (dy @ weight).addmm_(ds, a)
    # The thin product first: masked while it is in cache, it costs the wide product only an accumulation.
    dx = dy.new_empty(dy.shape[0], a.shape[1])
    scratch = scratch_for(dx)
    for rows in row_blocks(dx):
        clear_dropped_(torch.mm(ds[rows], a, out=dx[rows]), keep[rows], scratch)
    return dx.addmm_(dy, weight)


def _grad_of_a(ds: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return ds.T @ x
    if x.shape[0] <= block_rows(x):
        return ds.T @ copy_kept_(torch.empty_like(x), x, keep)
    # Partial sums in bf16 would lose what one long product keeps in its fp32 accumulator.
    dtype = torch.promote_types(x.dtype, torch.float32)
    da = torch.zeros(ds.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for rows, dropped in _dropped_blocks(x, keep):
        da += ds[rows].T @ dropped
    return da


def _thin(s: Tensor) -> Tensor:
    """s[n, r], stored by columns: products of it with wide tensors take 10 to 40 % less time than by rows."""
    return s if s.numel() < _WORTH_A_COPY else s.T.contiguous().T


def _dropped_blocks(x: Tensor, keep: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of K(x), each in the scratch memory of the one before."""
    scratch = scratch_for(x)
    for rows in row_blocks(x):
        yield rows, copy_kept_(scratch[: rows.stop - rows.start], x[rows], keep[rows])


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of x[n, k]: cache-sized on a CPU, all rows at once elsewhere."""
    rows, step = x.shape[0], block_rows(x)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scratch_for(x: Tensor) -> Tensor:
    return x.new_empty(min(block_rows(x), x.shape[0]), x.shape[1])


def block_rows(x: Tensor) -> int:
    """How many rows of x[n, k] a block has."""
    if x.device.type != "cpu":
        return max(x.shape[0], 1)
    row_bytes = max(x.shape[1], 1) * x.element_size()
    return max(16, _BLOCK_BYTES_PER_THREAD * torch.get_num_threads() // row_bytes)


def differentiable_grads(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    constants: Sequence[Any],
    needed: Sequence[bool],
    dy: Tensor,
    x_shape: torch.Size,
) -> list[Tensor | None]:
    """Gradients of function(*inputs, *constants) that can themselves be differentiated (create_graph=True).

    `inputs[0]` is x, which may be None if it was not kept.

    Raises:
        RuntimeError: if B needs a gradient but x was not kept, because A is frozen.
    """
    x, weight = inputs[0], inputs[1]
    assert weight is not None
    if x is None:
        if needed[4]:
            raise RuntimeError(
                "a second derivative through lora_B needs the layer's input, which is not kept while lora_A "
                "is frozen; let lora_A require a gradient"
            )
        # The gradients asked for are linear in dY and do not depend on the value of x.
        x = weight.new_zeros(x_shape, requires_grad=True)
    # Views, so that one tensor given as two inputs still gets two separate gradients.
    views = [None if t is None else t.view_as(t) for t in (x, *inputs[1:])]
    wanted = [t for t, need in zip(views, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(function(*views, *constants), wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needed]
