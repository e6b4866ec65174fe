"""DoRA: LoRA on the direction of each row of a weight, and its length apart. Liu et al. 2024, https://arxiv.org/abs/2402.09353.

    V = W + s B A                 W[out, in], A[r, in], B[out, r]
    W' = m V / ||V||              m[out]; ||V||[out] is the norm of each row, a constant for the gradient (section 4.3)

m starts at ||W + s B A||, so the adapted layer starts as LoRA starts: as the layer itself. Dropout acts on LoRA's path
only. The norm is ||w||^2 + 2 s <w, BA> + s^2 ||BA||^2, so neither B A nor an identity matrix is ever formed; in eval mode it
is kept until a tensor it was made from changes.
Authors' code: https://github.com/NVlabs/DoRA
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.autocast import outside_autocast
from ..kernels.dora_linear import dora_linear, excess_gain
from ..kernels.dora_norm import dora_norm, row_norm_squares
from ..kinds import Experts, LayerKind
from ..method import Column, Method, Slot
from .lora import Lora, LoraConfig, dropout_now, factors, fused_inputs, stored_factors

LORA = Lora()


class Magnitude(nn.Module):
    """The length of each row of the weight: a module for one vector, so that its key ends in ``.weight``."""

    def __init__(self, shape: tuple[int, ...], **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **where))


class Dora(Method, name="DORA"):
    """W' = m V / ||V||, V = W + s B A; see the top of this file."""

    config = LoraConfig
    on_disk: ClassVar[dict[str, str]] = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}

    def build(self, kind: LayerKind, config: LoraConfig, path: str) -> dict[str, Column]:
        columns = LORA.build(kind, config, path)
        shape = (kind.experts, kind.out_features) if isinstance(kind, Experts) else (kind.out_features,)
        spread = kind.spread(torch.empty(shape, device="meta")).shape
        if len(spread) > 1 and not isinstance(kind, Experts):
            shape = (1, *spread)  # a convolution's channel axis comes second
        return columns | {"lora_magnitude_vector": Magnitude(shape, device=kind.device, dtype=kind.dtype)}

    def changes_base(self, config: LoraConfig) -> bool:
        return LORA.changes_base(config)

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        LORA.init(slot)
        magnitude = slot["lora_magnitude_vector"].weight
        magnitude.copy_(row_norm(slot, slot.weight()).reshape(magnitude.shape))

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        bias = slot.bias()
        b = None if bias is None else slot.kind.spread(bias).to(y.dtype)
        direction = LORA.after(slot, x, y if b is None else y - b)
        excess = slot.kind.spread(excess_gain(_magnitude(slot), _current_norm(slot))).to(y.dtype)
        y = torch.addcmul(direction, direction, excess)
        return y if b is None else y + b

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        ready = fused_inputs(slot, x)
        if ready is None:
            return None
        a, b = slot["lora_A"].weight, slot["lora_B"].weight
        return dora_linear(
            x, *ready, a, b, _magnitude(slot), slot["scaling"], dropout_now(slot), _current_norm(slot)
        )

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        direction, _ = LORA.merge(slot, w, b)
        excess = excess_gain(_magnitude(slot).to(w.dtype), row_norm(slot, w).to(w.dtype))
        return torch.addcmul(direction, direction, excess[..., None]), b

    def delta(self, slot: Slot) -> Tensor:
        return LORA.delta(slot)

    def unit_scale(self, slot: Slot) -> float:
        return LORA.unit_scale(slot)

    def beyond_merge(self, slot: Slot) -> str | None:
        return LORA.beyond_merge(slot)


def _magnitude(slot: Slot) -> Tensor:
    m: Tensor = slot["lora_magnitude_vector"].weight
    return m if isinstance(slot.kind, Experts) else m.flatten()


@torch.no_grad()
def row_norm(slot: Slot, w: Tensor, squares: Tensor | None = None) -> Tensor:
    """Return ||w + s B A|| of each row, ``[..., out]``, in at least float32. ``squares`` are ||w||^2, if known."""
    exact = torch.promote_types(w.dtype, torch.float32)
    down, up, _ = factors(slot, exact)
    if isinstance(slot.kind, Experts) or torch.compiler.is_compiling():
        with outside_autocast(w):
            norm: Tensor = slot.kind.add_product(w.to(exact), up, down, slot["scaling"]).norm(dim=-1)
        return norm
    up, down = slot.kind.flat(up, down)
    return dora_norm(slot.kind.widen(w), down, up, slot["scaling"], squares)


def _current_norm(slot: Slot) -> Tensor:
    """Return the norm for the base weight; outside training, the kept one while nothing it depends on has changed."""
    w = slot.weight()
    if torch.compiler.is_compiling() or isinstance(slot.kind, Experts):
        return row_norm(slot, w)
    squares = slot.kept("squares", [w], lambda: row_norm_squares(slot.kind.widen(w)))
    if slot.layer.training:
        return row_norm(slot, w, squares)
    made_from = [w, *stored_factors(slot)]
    return slot.kept("norm", made_from, lambda: row_norm(slot, w, squares), slot["scaling"])
