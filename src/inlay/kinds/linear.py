"""Linear layers: ``nn.Linear`` and all that is shaped like it, and GPT-2's ``Conv1D``."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LayerKind, layer_kind


@layer_kind(
    lambda m, p: (
        p == "weight" and hasattr(m, "in_features") and hasattr(m, "out_features") and hasattr(m, "weight")
    )
)
class Linear(LayerKind):
    """``nn.Linear`` and everything shaped like it, quantised or not. W[out, in]."""

    layers = ("torch.nn.Linear",)
    forward = (nn.Linear.forward,)

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.in_features, self.out_features = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, m, b)


def _is_gpt2_conv1d(m: nn.Module, p: str) -> bool:
    module = sys.modules.get("transformers.pytorch_utils")
    return p == "weight" and module is not None and isinstance(m, module.Conv1D)


@layer_kind(_is_gpt2_conv1d)
class Conv1D(Linear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores W[in, out]."""

    layers = ("transformers.pytorch_utils.Conv1D",)

    def __init__(self, layer: nn.Module, param: str) -> None:
        LayerKind.__init__(self, layer, param)
        self.in_features, self.out_features = cast("Any", layer).weight.shape
        self.standard = type(layer).forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT

    def native(self, m: Tensor) -> Tensor:
        return m.mT

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ m.mT if b is None else torch.addmm(b, rows, m.mT)
        return y.view(*x.shape[:-1], -1)
