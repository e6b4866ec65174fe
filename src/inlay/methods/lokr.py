"""LoKr: an update that is a Kronecker product. Edalati et al. 2022 (KronA), https://arxiv.org/abs/2212.10650.

As an adapter with these parts: Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859.

    W' = W + s (C kron D)        W[l k, m n], C[l, m], D[k, n], s = alpha / r

    x[..., m n] -> X[..., m, n] -> C X D^T [..., l, k] -> [..., l k]      the product is never formed

out = l k and in = m n are split as evenly as they can be, or with l and m up to ``decompose_factor``. D is A2 B2,
A2[k, r] B2[r, n], where r is less than half of its larger side; with ``decompose_both`` C as well, A1[l, r] B1[r, m]. C (its
A1, or with init_weights="lycoris" D's B2) starts at zero, so the adapted layer starts as the layer itself. In a convolution n
counts channels, and D[k, n, *kernel] carries the kernel.
Authors' code: https://github.com/KohakuBlueleaf/LyCORIS
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PeftType
from ..kinds import LayerKind, Linear
from ..method import Column, Slot
from .lycoris import (
    Lycoris,
    LycorisConfig,
    core_shape,
    empty,
    factorises_kernel,
    kernel_of,
    start_random,
    with_core,
)


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr. Fields and defaults are those of PEFT 0.21; see ``LycorisConfig`` for the common ones.

    Args:
        decompose_both: factorise C as well, where r is less than half of its larger side.
        decompose_factor: largest l and m; -1 for the split that is most even.
        rank_dropout_scale: scale what ``rank_dropout`` leaves up to the former sum.
        init_weights: start as the identity with C = 0 (True) or with D = 0 ("lycoris"), or at random (False).

    Raises:
        ValueError: a value is out of its range.
    """

    peft_type: PeftType | str | None = PeftType.LOKR
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise ValueError(
                f"Unknown initialization init_weights={self.init_weights!r}; known: True, False, 'lycoris'"
            )
        if self.decompose_factor < -1 or self.decompose_factor == 0:
            raise ValueError(
                f"decompose_factor={self.decompose_factor} must be positive, or -1 for the most even split"
            )


class LoKr(Lycoris, name="LOKR"):
    """W' = W + s (C kron D); see the top of this file."""

    config = LoKrConfig

    def build(self, kind: LayerKind, config: LoKrConfig, path: str) -> dict[str, Column]:
        settings = self.settings(kind, config, path)
        r, kernel = settings["r"], kernel_of(kind)
        outer_out, inner_out = split(kind.out_features, config.decompose_factor)
        outer_in, inner_in = split(kind.in_features // math.prod(kernel), config.decompose_factor)
        columns: dict[str, Column] = {}
        if config.decompose_both and r < max(outer_out, outer_in) / 2:
            columns["lokr_w1_a"], columns["lokr_w1_b"] = empty(kind, outer_out, r), empty(kind, r, outer_in)
        else:
            columns["lokr_w1"] = empty(kind, outer_out, outer_in)
        if r >= max(inner_out, inner_in) / 2:
            columns["lokr_w2"] = empty(kind, inner_out, inner_in, *kernel)
        elif factorises_kernel(kind, config):
            columns["lokr_w2_a"], columns["lokr_w2_b"] = empty(kind, r, inner_out), empty(kind, r, inner_in)
            columns["lokr_t2"] = empty(kind, *core_shape(kind, r))
        else:
            columns["lokr_w2_a"] = empty(kind, inner_out, r)
            columns["lokr_w2_b"] = empty(kind, r, inner_in * math.prod(kernel))
        return columns | settings

    def init(self, slot: Slot) -> None:
        start_random(*slot.parameters().values())
        choice = slot.config.init_weights  # type: ignore[attr-defined]
        if choice == "lycoris":
            nn.init.zeros_(slot["lokr_w2" if "lokr_w2" in slot.columns else "lokr_w2_b"])
        elif choice:
            nn.init.zeros_(slot["lokr_w1" if "lokr_w1" in slot.columns else "lokr_w1_a"])

    def update(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        return torch.kron(_outer(slot, dtype), _inner(slot, dtype))

    def through(self, slot: Slot, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not isinstance(slot.kind, Linear):
            return super().through(slot, x, dtype)
        outer = _outer(slot, dtype)
        rows = x.reshape(*x.shape[:-1], outer.shape[1], -1)
        whole = "lokr_w2" in slot.columns
        inner = F.linear(rows, slot["lokr_w2" if whole else "lokr_w2_b"].to(dtype))
        mixed = torch.einsum("lm,...mk->...lk", outer, inner)
        return (mixed if whole else F.linear(mixed, slot["lokr_w2_a"].to(dtype))).flatten(-2)

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        return None if isinstance(slot.kind, Linear) else super().fused(slot, x)


def split(size: int, largest: int) -> tuple[int, int]:
    """Return two factors of a size, the first at most ``largest`` and otherwise as even as they can be (-1: no limit).

    >>> split(360, -1), split(360, 8), split(250, 4), split(6, 3)
    ((18, 20), (8, 45), (2, 125), (3, 2))
    """
    if largest > 0 and size % largest == 0:
        return largest, size // largest
    root = math.isqrt(size)
    first = next(n for n in range(min(root, largest) if largest > 0 else root, 0, -1) if size % n == 0)
    return first, size // first


def _outer(slot: Slot, dtype: torch.dtype) -> Tensor:
    """Return C[l, m]."""
    if "lokr_w1" in slot.columns:
        whole: Tensor = slot["lokr_w1"].to(dtype)
        return whole
    product: Tensor = slot["lokr_w1_a"].to(dtype) @ slot["lokr_w1_b"].to(dtype)
    return product


def _inner(slot: Slot, dtype: torch.dtype) -> Tensor:
    """Return D[k, n * prod(kernel)]."""
    if "lokr_w2" in slot.columns:
        whole: Tensor = slot["lokr_w2"].to(dtype).flatten(1)
        return whole
    a, b = slot["lokr_w2_a"].to(dtype), slot["lokr_w2_b"].to(dtype)
    if "lokr_t2" in slot.columns:
        return with_core(slot["lokr_t2"].to(dtype), a, b)
    product: Tensor = a @ b
    return product
