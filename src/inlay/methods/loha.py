"""LoHa: an update that is the elementwise product of two low-rank ones. Hyeon-Woo et al. 2022 (FedPara), https://arxiv.org/abs/2108.06098.

    W' = W + s (A1 B1) * (A2 B2)        W[out, in], A1, A2 [out, r], B1, B2 [r, in], s = alpha / r

Its rank may reach r^2, with the numbers of a LoRA of rank 2 r. B2 starts at zero, so the adapted layer starts as the layer
itself. With ``use_effective_conv2d`` a convolution's kernel has a factor t[r, r, *k] of its own in each of the two:
D[o, i, k] = sum_pq t[p, q, k] A[p, o] B[q, i].

D is not applied factor by factor: it is formed, in the size of W, in every forward pass.
Authors' code: https://github.com/South-hw/FedPara_ICLR22; as an adapter: https://github.com/KohakuBlueleaf/LyCORIS
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import PeftType
from ..kinds import LayerKind
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
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa. Fields and defaults are those of PEFT 0.21; see ``LycorisConfig``."""

    peft_type: PeftType | str | None = PeftType.LOHA


class LoHa(Lycoris, name="LOHA"):
    """W' = W + s (A1 B1) * (A2 B2); see the top of this file."""

    config = LoHaConfig

    def build(self, kind: LayerKind, config: LoHaConfig, path: str) -> dict[str, Column]:
        settings = self.settings(kind, config, path)
        r, out, width = settings["r"], kind.out_features, kind.in_features
        split = factorises_kernel(kind, config)
        if split:
            width //= math.prod(kernel_of(kind))
        columns: dict[str, Column] = {}
        for n in (1, 2):
            columns[f"hada_w{n}_a"] = empty(kind, r, out) if split else empty(kind, out, r)
            columns[f"hada_w{n}_b"] = empty(kind, r, width)
        for n in (1, 2) if split else ():
            columns[f"hada_t{n}"] = empty(kind, *core_shape(kind, r))
        return columns | settings

    def init(self, slot: Slot) -> None:
        start_random(*slot.parameters().values())
        if slot.config.init_weights:  # type: ignore[attr-defined]
            nn.init.zeros_(slot["hada_w2_b"])

    def update(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        return _factor(slot, 1, dtype) * _factor(slot, 2, dtype)


def _factor(slot: Slot, n: int, dtype: torch.dtype) -> Tensor:
    a, b = slot[f"hada_w{n}_a"].to(dtype), slot[f"hada_w{n}_b"].to(dtype)
    core = slot.get(f"hada_t{n}")
    return a @ b if core is None else with_core(core.to(dtype), a, b)
