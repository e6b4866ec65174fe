"""LoftQ: a quantised base and factors that make up for what it lost.

Li et al. 2023, https://arxiv.org/abs/2310.08659

    Q_t = quantise(W - s B_{t-1} A_{t-1})                                        t = 1 .. loftq_iter
    s B_t A_t = the r leading singular components of W - Q_t

The base weight becomes Q, as the floating-point numbers that the quantised weight stands for; quantising the
model to the same format later changes it no more. The layer starts near W, not at it: closer than Q alone.

    bits   levels                                                              one scale for
    4, 2   quantiles of a normal distribution (NF4 of QLoRA, arXiv 2305.14314)  64 numbers in a row
    8      -127 .. 127, evenly                                                  a row of the stored weight

Authors' code: https://github.com/yxli2123/LoftQ
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import LoftQConfig, initialisation
from .decompose import check_decomposable, exact_weight, leading_part, set_factors

if TYPE_CHECKING:
    from ..method import Slot

BLOCK = 64
TAIL = 0.9677083  # NF4's outermost quantile: half way between those of 15 and of 16 levels, as in QLoRA


@initialisation("loftq", check_decomposable, changes_base=True)
def loftq(slot: Slot) -> None:
    """Quantise the base weight and put the leading part of the loss into the factors."""
    given: Any = slot.config
    config = LoftQConfig(**given.loftq_config)
    w, r = exact_weight(slot), slot["r"]
    if not slot.layer.store.plain:
        layer = type(slot.layer.get_base_layer()).__name__
        raise ValueError(
            f"init_lora_weights='loftq' quantises base weights itself, and those of {layer} already are; load "
            "the model without a quantization_config, or use replace_lora_weights_loftq"
        )
    rest = w
    for _ in range(config.loftq_iter):
        q = slot.kind.matrix(quantised(slot.kind.native(rest), config.loftq_bits))
        u, s, vh = leading_part(w - q, r)
        rest = torch.addmm(w, u * s, vh, alpha=-1)
    root = (s / slot["scaling"]).sqrt()
    set_factors(slot, u * root, root[:, None] * vh)
    slot.layer.set_base_matrix(q, slot.name)


def quantised(w: Tensor, bits: int) -> Tensor:
    """Return the numbers that a weight w[out, ...] stands for once it is quantised to 8, 4 or 2 bits."""
    if bits == 8:
        rows = w.flatten(1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny) / 127
        return ((rows / scale).round() * scale).reshape(w.shape)
    levels = normal_levels(bits).to(w)
    short = -w.numel() % BLOCK
    blocks = torch.nn.functional.pad(w.flatten(), (0, short)).reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: w.numel()].reshape(w.shape)


def normal_levels(bits: int) -> Tensor:
    """Return 2^bits levels from -1 to 1, zero among them and one more above it than below (float64)."""
    half = 2 ** (bits - 1)
    above, below = (
        torch.special.ndtri(torch.linspace(TAIL, 0.5, n + 1, dtype=torch.float64)[:-1])
        for n in (half, half - 1)
    )
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return levels / levels.max()
