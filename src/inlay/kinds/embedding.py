"""Embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Factor, LayerKind, layer_kind


@layer_kind(lambda m, p: p == "weight" and isinstance(m, nn.Embedding))
class Embedding(LayerKind):
    """``nn.Embedding``. W[num, dim], canonically W[dim, num]: a linear map of one-hot tokens.

    Embeddings that scale their output (``embed_scale`` of Gemma, BART and others) scale the update as well.
    """

    layers = ("torch.nn.Embedding",)
    forward = (nn.Embedding.forward,)
    bias = ""

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        assert isinstance(layer, nn.Embedding)
        self.in_features, self.out_features = layer.num_embeddings, layer.embedding_dim
        self.lookup: dict[str, Any] = {
            "padding_idx": layer.padding_idx,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
        }
        self.layer = layer

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT

    def native(self, m: Tensor) -> Tensor:
        return m.mT

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        return self.scaled(F.embedding(x, m.mT, **self.lookup))

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        if up_bias:
            raise ValueError("lora_bias=True is not supported on an embedding layer, which has no bias")
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return nn.Parameter(torch.empty(r, self.in_features, **where)), nn.Parameter(
            torch.empty(self.out_features, r, **where)
        )

    def through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return self.scaled(F.linear(F.embedding(x, down.mT, **self.lookup), up))

    def scaled(self, y: Tensor) -> Tensor:
        """Return looked-up rows as the layer puts them out."""
        scale = getattr(self.layer, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
