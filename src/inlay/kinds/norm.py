"""Normalisation layers: a weight and a bias for each feature."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Factor, LayerKind, dimensions, layer_kind


def _is_norm(m: nn.Module, p: str) -> bool:
    return p == "weight" and dimensions(m, p) == 1 and "norm" in type(m).__name__.lower()


@layer_kind(_is_norm)
class Norm(LayerKind):
    """``nn.LayerNorm``, ``nn.BatchNorm``, RMS norms and the like: w[features], canonically W[features, 1].

    What it multiplies is normalised first, so it runs with merged weights. A low-rank update has nothing to save here.
    """

    layers = ("normalisation layers",)
    direct = False

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.out_features, self.in_features = getattr(layer, param).numel(), 1
        self.of_batches = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        self.bias = "bias" if dimensions(layer, "bias") else ""  # an RMS norm has no place for one

    @property
    def by_rows(self) -> bool:
        return not self.of_batches

    def matrix(self, w: Tensor) -> Tensor:
        return w.unsqueeze(-1)

    def native(self, m: Tensor) -> Tensor:
        return m.squeeze(-1)

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        raise ValueError(
            f"a normalisation layer has {self.out_features} weights and no matrix, so a low-rank update cannot sit on it; "
            "tune it with LNTuningConfig or BitFitConfig, or leave it out with exclude_modules"
        )
