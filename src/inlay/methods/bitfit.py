"""BitFit: train the biases alone. Ben-Zaken et al. 2022, https://arxiv.org/abs/2106.10199.

    W' = W,  b' = b + d        b[out], d[out]

d starts at zero, so the adapted layer starts as the layer itself. About 0.08 % of BERT is trained. The biases themselves
stay as they are, so that a BitFit adapter is switched, merged and saved like any other; the file holds d alone.
Authors' code: https://github.com/benzakenelad/BitFit
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..injection.targets import matches
from ..injection.walk import places_to_adapt
from ..kinds import LayerKind, Norm, kind_of
from ..method import Column, Method, Slot

_QUERY = ("query", "q_proj", "query_proj", "q_lin")  # b_q in the paper
_WIDENING = ("intermediate.dense", "fc1", "lin1", "c_fc", "dense_h_to_4h", "up_proj", "linear1")  # b_m2
QUERY_AND_SECOND_MLP = (*_QUERY, *_WIDENING)
"""Names of the layers whose biases the paper trains in its smaller variant, in the models of transformers and PyTorch."""


@dataclass(kw_only=True)
class BitFitConfig(PeftConfig):
    """Configuration of BitFit.

    Args:
        target_modules: names (endings of module paths) or one regular expression for whole paths of layers whose bias is
            trained; by default every layer that has one.
        exclude_modules: names or a regular expression of modules to leave out.
        norms: by default, also the biases of normalisation layers, as in the paper; MindPet's BitFit leaves them out.
        query_and_second_mlp: by default, only the biases of the query and of the layer that widens the feed-forward block
            (the paper's smaller variant: half the numbers, nearly the same scores).
        modules_to_save: modules that are trained and saved whole, such as a new head.
    """

    peft_type: PeftType | str | None = PeftType.BITFIT
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    norms: bool = True
    query_and_second_mlp: bool = False
    modules_to_save: list[str] | None = None


class BitFit(Method, name="BITFIT"):
    """b' = b + d; see the top of this file."""

    config = BitFitConfig
    additive = True

    def default_targets(
        self, config: BitFitConfig, model: nn.Module, required: bool
    ) -> Collection[str] | str | None:
        known = places_to_adapt(model, config)
        paths = {path for path, place in known.items() if _has_bias(place.module, config.norms)}
        if config.query_and_second_mlp:
            paths = {path for path in paths if matches(path, QUERY_AND_SECOND_MLP)}
        if not paths:
            raise ValueError(
                f"{type(model).__name__} has no bias that BitFit could train; it fits models like BERT, GPT-2 and ViT, "
                "while Llama and its kin have none"
            )
        return paths

    def build(self, kind: LayerKind, config: BitFitConfig, path: str) -> dict[str, Column]:
        bias = kind.bias
        if not bias:
            raise ValueError(f"{path} has no bias for BitFit to train; leave it out with exclude_modules")
        return {
            "bitfit_bias": nn.Parameter(torch.empty(kind.out_features, device=kind.device, dtype=kind.dtype))
        }

    def init(self, slot: Slot) -> None:
        nn.init.zeros_(slot["bitfit_bias"])

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        return y + slot.kind.spread(slot["bitfit_bias"].to(y.dtype))

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = slot["bitfit_bias"].to(w.dtype)
        return w, shift if b is None else b + shift


def _has_bias(module: nn.Module, norms: bool) -> bool:
    kind = kind_of(module)
    if kind is None or not kind.bias or (isinstance(kind, Norm) and not norms):
        return False
    return isinstance(getattr(module, kind.bias, None), nn.Parameter)
