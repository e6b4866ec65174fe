"""Parameters that a module reads by itself: it runs with the merged one in place of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Factor, LayerKind, dimensions, layer_kind


@layer_kind(lambda m, p: dimensions(m, p) == 2)
class Matrix(LayerKind):
    """Any other 2-d parameter, W[out, in]; its module runs with the merged parameter."""

    layers = ("any 2-d parameter",)
    direct = False

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.out_features, self.in_features = getattr(layer, param).shape
        self.bias = ""


@layer_kind(lambda m, p: isinstance(m, nn.MultiheadAttention) and p in ("weight", "in_proj_weight"))
class InProjection(LayerKind):
    """The fused query, key and value projection of ``nn.MultiheadAttention``. W[3 embed, embed]."""

    layers = ("torch.nn.MultiheadAttention",)
    direct = False
    bias = "in_proj_bias"

    def __init__(self, layer: nn.Module, param: str) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        if layer.in_proj_weight is None:
            raise ValueError(
                f"MultiheadAttention with kdim={layer.kdim} and vdim={layer.vdim} unlike embed_dim={layer.embed_dim} keeps three "
                "separate projections; adapt them with "
                "target_parameters=['...q_proj_weight', '...k_proj_weight', '...v_proj_weight']"
            )
        super().__init__(layer, "in_proj_weight")
        self.out_features, self.in_features = layer.in_proj_weight.shape


@layer_kind(lambda m, p: p != "weight" and dimensions(m, p) == 3)
class Experts(LayerKind):
    """A 3-d parameter with one matrix per expert: [expert, out, in], or [expert, in, out] if ``layer.is_transposed``.

    The factors are flat, as in PEFT's files: ``down[(expert r), in]`` and ``up[out, (r expert)]``, expert last.
    """

    layers = ("any 3-d parameter (experts)",)
    direct = False

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.transposed = bool(getattr(layer, "is_transposed", False))
        self.experts, rows, columns = getattr(layer, param).shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.bias = ""

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT if self.transposed else w

    def native(self, m: Tensor) -> Tensor:
        return m.mT if self.transposed else m

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        return super().factors(r * self.experts, up_bias)

    def add_product(self, w: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        return torch.add(w, self.product(up, down), alpha=scale)

    def product(self, up: Tensor, down: Tensor) -> Tensor:
        a = down.reshape(self.experts, -1, self.in_features)
        b = up.reshape(self.out_features, -1, self.experts)
        return torch.einsum("ore,eri->eoi", b, a)
