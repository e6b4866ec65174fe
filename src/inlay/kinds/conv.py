"""Convolutions in one, two and three dimensions, with groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Factor, LayerKind, layer_kind, uninitialised


@layer_kind(lambda m, p: p == "weight" and isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
class Conv(LayerKind):
    """``nn.Conv1d/2d/3d``. W[out, in/groups, *k], canonically W[out, in/groups * prod(k)].

    A low-rank update of a grouped convolution, in PEFT's file format, reads *all* input channels, so its product is the
    matrix of a dense convolution, W[out, in * prod(k)]: ``widen`` brings the base weight there, and merging makes the
    layer dense (groups = 1).
    """

    layers = ("torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d")
    forward = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
        self.function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.in_channels, self.out_features, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.padding_mode = layer.kernel_size, layer.padding_mode
        self.geometry: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        self.edges = list(layer._reversed_padding_repeated_twice)
        self.in_features = layer.in_channels // layer.groups * layer.weight.shape[2:].numel()

    def matrix(self, w: Tensor) -> Tensor:
        return w.flatten(1)

    def native(self, m: Tensor) -> Tensor:
        return m.reshape(self.out_features, -1, *self.kernel_size)

    def widen(self, m: Tensor) -> Tensor:
        return _block_diagonal(m, self.groups) if m.shape[1] == self.in_features else m

    def adjust(self, layer: nn.Module, w: Tensor) -> None:
        layer.groups = self.in_channels // w.shape[1]  # type: ignore[assignment]

    def spread(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * len(self.kernel_size))

    @property
    def inputs(self) -> int:
        return self.in_channels

    def spread_inputs(self, v: Tensor) -> Tensor:
        return self.spread(v)

    def scale_inputs(self, m: Tensor, v: Tensor) -> Tensor:
        w = self.native(m)  # a grouped layer's rows read the channels of their own group only
        own = v.reshape(-1, w.shape[1]).repeat_interleave(
            self.out_features * w.shape[1] // self.in_channels, 0
        )
        return self.matrix(w * own.reshape(*own.shape, *[1] * len(self.kernel_size)))

    def gather(self, y: Tensor) -> Tensor:
        axis = y.dim() - len(self.kernel_size) - 1
        return y.movedim(axis, -1).flatten(0, -2).sum(0)

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        w = self.native(m)
        return self._convolve(x, w, self.in_channels // w.shape[1], b)

    def _convolve(self, x: Tensor, w: Tensor, groups: int, b: Tensor | None = None) -> Tensor:
        geometry = self.geometry
        if self.padding_mode != "zeros":
            x, geometry = F.pad(x, self.edges, mode=self.padding_mode), geometry | {"padding": 0}
        y: Tensor = self.function(x, w, b, **geometry, groups=groups)
        return y

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        if r % self.groups:
            raise ValueError(
                f"rank {r} is not divisible by the {self.groups} groups of a grouped convolution; choose another rank for it "
                "with rank_pattern, or leave the layer out with exclude_modules"
            )
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        geometry = self.geometry | {"padding_mode": self.padding_mode, "bias": False}
        down = uninitialised(self.conv, self.in_channels, r, self.kernel_size, **geometry, **where)
        return down, uninitialised(
            self.conv, r, self.out_features, 1, groups=self.groups, bias=up_bias, **where
        )

    def flat(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return _block_diagonal(up.flatten(1), self.groups), down.flatten(1)

    def through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        y: Tensor = self.function(self._convolve(x, down, groups=1), up, groups=self.groups)
        return y

    def through_matrices(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self.groups > 1:
            return self.apply(x, up @ down)
        down = down.reshape(len(down), -1, *self.kernel_size)
        return self.through(x, down, up.reshape(*up.shape, *[1] * len(self.kernel_size)))


def _block_diagonal(m: Tensor, groups: int) -> Tensor:
    """Return ``m[out, in]`` of a grouped map as the dense ``[out, groups * in]`` with zeros between the groups."""
    if groups == 1:
        return m
    dense: Tensor = torch.block_diag(*m.chunk(groups))  # type: ignore[no-untyped-call]
    return dense
