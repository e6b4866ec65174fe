"""Dropout masks of one byte per element, at a tenth of what `torch.nn.functional.dropout` costs on a CPU.

A mask is int8: -1, all bits set, where an element is kept, and 0 where it is dropped. Widened to an
element's size it is a bit mask, and clearing bits is cheaper than multiplying by a mask of floats.

Masks come from the default generator of their device alone, so `torch.manual_seed` and gradient checkpointing
reproduce them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 256
_FEW = 1 << 12
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Int8 mask[n, in] for the rows of x[..., in]: 0 (the element is dropped) with probability `p`, else -1.

    Raises:
        ValueError: if `p` is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    # Bytes cannot express a threshold above all of them, and for few elements the direct way has fewer calls.
    if x.device.type != "cpu" or x.numel() < _FEW or p * _LEVELS > _LEVELS - 1:
        return torch.empty(rows, columns, dtype=torch.int8, device=x.device).bernoulli_(1.0 - p).neg_()
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
    # From the lowest int64 without an upper end: the only call that fills all 64 bits of a word.
    words.random_(torch.iinfo(torch.int64).min, None)
    noise = words.view(torch.int8)[: x.numel()].view(rows, columns)
    return noise.ge_(_row_thresholds(rows, p)).neg_()


def _row_thresholds(rows: int, p: float) -> Tensor:
    """Int8 thresholds[rows, 1] that a uniform int8 is below with probability `p`.

    A byte resolves p to 1/256 only, so each row rounds 256 p up or down at random. Every element is then
    dropped
    with probability p to within 2**-24; two elements of a row correlate by less than 4e-6 / (p (1 - p)).
    """
    level = torch.rand(rows, 1).add_(p * _LEVELS).floor_()
    return level.sub_(_LEVELS // 2).to(torch.int8)


def clear_dropped_(x: Tensor, keep: Tensor, scratch: Tensor) -> Tensor:
    """Zero the dropped elements of x[n, k] in place; `scratch`, of at least as many rows, is overwritten."""
    bits = _BITS[x.element_size()]
    mask = scratch.view(bits)[: x.shape[0]].copy_(keep)
    x.view(bits).bitwise_and_(mask)
    return x


def copy_kept_(out: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """out[n, k] = x where kept, 0 where dropped."""
    bits = _BITS[x.element_size()]
    out.view(bits).copy_(keep).bitwise_and_(x.view(bits))
    return out


def plain_dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """x[..., k] with dropped elements zeroed, differentiable."""
    return x if keep is None else x.masked_fill(keep.view(x.shape) == 0, 0.0)
