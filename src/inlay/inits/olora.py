"""OLoRA: start from an orthonormal basis of the weight's columns.

Büyükakyüz 2024, https://arxiv.org/abs/2406.01775

    W = Q R      B = Q[:, :r]      A = R[:r]      W_res = W - s B A
    W[out, in], Q[out, k], R[k, in], k = min(out, in); s is LoRA's scale

The base weight becomes W_res, so the adapted layer starts as W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import initialisation
from .decompose import check_decomposable, exact_weight, leave_the_rest, set_factors

if TYPE_CHECKING:
    from ..method import Slot


@initialisation("olora", check_decomposable, changes_base=True)
def olora(slot: Slot) -> None:
    """Put the first r columns of Q and rows of R into the factors and leave the rest in the base."""
    w, r = exact_weight(slot), slot["r"]
    q, upper = torch.linalg.qr(w)
    set_factors(slot, q[:, :r], upper[:r])
    leave_the_rest(slot, w)
