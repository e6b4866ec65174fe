"""PiSSA: train the principal part of a weight, freeze the rest.

Meng et al. 2024, https://arxiv.org/abs/2404.02948

    W = U S V'      B = U_r sqrt(S_r / s)      A = sqrt(S_r / s) V_r'      W_res = W - s B A
    W[out, in], U_r[out, r], S_r[r], V_r[in, r]; s is LoRA's scale

The base weight becomes W_res, so the adapted layer starts as W. "pissa" is exact; "pissa_niter_16" finds the
leading part by 16 rounds of subspace iteration, which is many times faster.
Authors' code: https://github.com/GraphPKU/PiSSA
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import initialisation
from .decompose import (
    check_decomposable,
    exact_weight,
    leading_part,
    leading_part_fast,
    leave_the_rest,
    set_factors,
)

if TYPE_CHECKING:
    from ..method import Slot


@initialisation("pissa", check_decomposable, changes_base=True)
def pissa(slot: Slot) -> None:
    """Put the r largest singular components of the weight into the factors, leave the rest in the base."""
    config: Any = slot.config
    rounds = config.init_lora_weights.partition("_niter_")[2]
    w, r = exact_weight(slot), slot["r"]
    u, s, vh = leading_part_fast(w, r, int(rounds)) if rounds else leading_part(w, r)
    root = (s / slot["scaling"]).sqrt()
    set_factors(slot, u * root, root[:, None] * vh)
    leave_the_rest(slot, w)
