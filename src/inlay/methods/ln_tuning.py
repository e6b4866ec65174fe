"""LayerNorm tuning: train the weights and biases of normalisation layers. Zhao et al. 2023, https://arxiv.org/abs/2312.11420.

    w' = w + (v - w0),  b' = b + (c - b0)        w[features], b[features]; w0 and b0 are the base layer's

v and c start as copies of w0 and b0, so the adapted layer starts as the layer itself. On its own an adapter sets w' = v and
b' = c; of several, the changes add up. As in PEFT the whole new values are kept, not the changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..injection.walk import places_to_adapt
from ..kinds import LayerKind, Norm, kind_of
from ..method import Column, Method, Slot


@dataclass(kw_only=True)
class LNTuningConfig(PeftConfig):
    """Configuration of LayerNorm tuning. Fields and defaults are those of PEFT 0.21.

    Args:
        target_modules: names (endings of module paths) or one regular expression for whole paths; by default every
            normalisation layer.
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules that are trained and saved whole, such as a new head.
    """

    peft_type: PeftType | str | None = PeftType.LN_TUNING
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    modules_to_save: list[str] | None = None


class NormValues(nn.Module):
    """A normalisation layer's own weight and bias in one adapter, so that the keys end as the layer's do."""

    def __init__(self, features: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, **where))
        self.register_parameter("bias", nn.Parameter(torch.empty(features, **where)) if bias else None)


class LNTuning(Method, name="LN_TUNING"):
    """w' = w + (v - w0), b' = b + (c - b0); see the top of this file."""

    config = LNTuningConfig

    def default_targets(
        self, config: LNTuningConfig, model: nn.Module, required: bool
    ) -> Collection[str] | str | None:
        norms: set[str] = set()
        others: set[str] = set()
        for path, place in places_to_adapt(model, config).items():
            (norms if isinstance(kind_of(place.module), Norm) else others).add(path)
        taken = {path.rpartition(".")[2] for path in others}
        return {path if (last := path.rpartition(".")[2]) in taken else last for path in norms} or None

    def build(self, kind: LayerKind, config: LNTuningConfig, path: str) -> dict[str, Column]:
        if not isinstance(kind, Norm):
            raise ValueError(
                f"LayerNorm tuning needs normalisation layers; {path} is none. Name it in modules_to_save to train it whole"
            )
        where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
        return {"ln_tuning_layers": NormValues(kind.out_features, bool(kind.bias), **where)}

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        values, bias = slot["ln_tuning_layers"], slot.bias()
        values.weight.copy_(slot.weight().flatten())
        if bias is not None:
            values.bias.copy_(bias)

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values = slot["ln_tuning_layers"]
        shift = values.weight.to(w.dtype) - _before_merging(slot, slot.kind.param).to(w.dtype)
        w = w + shift.reshape(w.shape)
        if b is not None:
            b = b + (values.bias.to(w.dtype) - _before_merging(slot, slot.kind.bias).to(w.dtype))
        return w, b


def _before_merging(slot: Slot, name: str) -> Tensor:
    """Return a parameter of the base layer as it was before any adapter was merged into it."""
    tensor: Tensor = slot.layer.originals.get(name, getattr(slot.layer.host, name))
    return tensor
