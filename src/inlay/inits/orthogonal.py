"""Orthogonal start: both factors random, their product zero.

https://datta0.github.io/posts/rethink-lora-init/

    Q[r, r] orthonormal, its even rows E[r/2, r] and odd rows O[r/2, r], so that E O' = 0
    A = 0.1 O' X      B = 0.1 Y E      X[r/2, in], Y[out, r/2] normal      B A = 0.01 Y E O' X = 0

The adapted layer starts as the layer itself, and both factors have gradients from the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import initialisation
from .decompose import check_one_matrix, set_factors

if TYPE_CHECKING:
    from ..kinds import LayerKind
    from ..method import Slot

DEVIATION = 0.1


def check_even(kind: LayerKind, config: Any, r: int, layer: str) -> None:
    """Refuse odd ranks, and what ``check_one_matrix`` refuses."""
    check_one_matrix(kind, config, r, layer)
    if r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' needs an even rank, and r is {r} on {layer}; choose {r + 1}"
        )


@initialisation("orthogonal", check_even)
def orthogonal(slot: Slot) -> None:
    """Fill the factors with random matrices whose product is zero up to rounding."""
    r, half = slot["r"], slot["r"] // 2
    dtype = torch.promote_types(slot.kind.dtype, torch.float32)
    q = torch.linalg.qr(torch.randn(r, r, dtype=dtype))[0]
    down = q[1::2].mT @ torch.randn(half, slot.kind.in_features, dtype=dtype)
    up = torch.randn(slot.kind.out_features, half, dtype=dtype) @ q[0::2]
    set_factors(slot, DEVIATION * up, DEVIATION * down)
