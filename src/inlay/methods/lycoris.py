"""What LoHa and LoKr share: an update of a weight made of small tensors, W' = W + s D, and the fields that PEFT gives both."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..kernels.autocast import autocast_is_on
from ..kinds import Conv, LayerKind, Norm
from ..method import Method, Slot
from .lora import by_pattern


@dataclass(kw_only=True)
class LycorisConfig(PeftConfig):
    """Fields of LoHa's and LoKr's configurations, with the defaults of PEFT 0.21.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r.
        rank_dropout: probability with which, in training, the update of an output feature is left out.
        module_dropout: probability with which, in training, the update of a whole layer is left out.
        use_effective_conv2d: factorise a convolution's kernel too, where it is larger than 1 (FedPara, proposition 3).
        target_modules: names (endings of module paths) or one regular expression for whole paths, or "all-linear"; by
            default the attention projections that are usual for the model's type.
        exclude_modules: names or a regular expression of modules to leave out.
        init_weights: start as the identity (True), or at random (False).
        layers_to_transform: index or indices of the blocks to adapt; needs ``target_modules`` as a list.
        layers_pattern: name(s) of the list of blocks, where it is not found by itself.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        rank_pattern, alpha_pattern: r and alpha by name or regular expression.

    Raises:
        ValueError: a value is out of its range.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        for name in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability in [0, 1)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )


class Lycoris(Method):
    """W' = W + s D, where a method says what D is."""

    additive = True

    def update(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """Return D[out, in], without the scale."""
        raise NotImplementedError

    def through(self, slot: Slot, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the layer computes with D in place of W."""
        exact = torch.promote_types(dtype, torch.float32)
        return slot.kind.apply(x, self.update(slot, exact).to(dtype))

    def settings(self, kind: LayerKind, config: Any, path: str) -> dict[str, Any]:
        """Return r, alpha and the scale of one layer.

        Raises:
            ValueError: the layer is no product, or its rank is not positive.
        """
        if isinstance(kind, Norm):
            raise ValueError(
                f"{path} normalises and has no matrix to update; tune it with LNTuningConfig, or leave it out with "
                "exclude_modules"
            )
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.alpha)
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        return {"r": r, "alpha": alpha, "scaling": alpha / r}

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        config: Any = slot.config
        if slot.layer.training and torch.rand(()) < config.module_dropout:
            return y
        if x.is_floating_point():
            x = x.to(y.dtype)
        delta = self.through(slot, x, y.dtype)
        if slot.layer.training and config.rank_dropout:
            keep = (torch.rand(slot.kind.out_features, device=y.device) > config.rank_dropout).to(y.dtype)
            if getattr(config, "rank_dropout_scale", False):
                keep = keep / keep.mean().clamp(min=1 / len(keep))
            delta = delta * slot.kind.spread(keep)
        return torch.add(y, delta.to(y.dtype), alpha=slot["scaling"])

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        """One product with W + s D costs less than two. In half precision that sum would round small updates away."""
        w = slot.weight()
        exact = x.dtype == w.dtype == torch.promote_types(w.dtype, torch.float32)
        if not exact or autocast_is_on(x) or self.beyond_merge(slot):
            return None
        return slot.kind.apply(x, *self.merge(slot, w, slot.bias()))

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.update(slot, w.dtype)
        if w.shape[-1] != delta.shape[-1]:  # another adapter has joined a convolution's groups
            delta = slot.kind.widen(delta)
        return torch.add(w, delta, alpha=slot["scaling"]), b

    def delta(self, slot: Slot) -> Tensor:
        scale: float = slot["scaling"]
        return scale * self.update(slot, torch.promote_types(slot.kind.dtype, torch.float32))

    def unit_scale(self, slot: Slot) -> float:
        unit: float = slot["alpha"] / slot["r"]
        return unit

    def beyond_merge(self, slot: Slot) -> str | None:
        if not slot.layer.training:
            return None
        names = ("rank_dropout", "module_dropout")
        return next((name for name in names if getattr(slot.config, name)), None)


def kernel_of(kind: LayerKind) -> tuple[int, ...]:
    """Return the size of a convolution's kernel, () for other layers."""
    return tuple(kind.kernel_size) if isinstance(kind, Conv) else ()


def factorises_kernel(kind: LayerKind, config: LycorisConfig) -> bool:
    """Whether the kernel of a layer gets a factor of its own."""
    return config.use_effective_conv2d and math.prod(kernel_of(kind)) > 1


def core_shape(kind: LayerKind, r: int) -> tuple[int, ...]:
    """Return the shape of a kernel's factor t[r, r, *k]; PEFT keeps two axes for the kernel of a 1-d convolution."""
    kernel = kernel_of(kind)
    return (r, r, *kernel, *([1] if len(kernel) == 1 else []))


def with_core(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix[out, in * prod(k)] of t[r, r, *k], a[r, out] and b[r, in]."""
    return torch.einsum("pqk,po,qi->oik", t.flatten(2), a, b).flatten(1)


def empty(kind: LayerKind, *shape: int) -> nn.Parameter:
    """Return a parameter that has no values yet."""
    return nn.Parameter(torch.empty(shape, device=kind.device, dtype=kind.dtype))


def start_random(*parameters: Tensor) -> None:
    """Draw values as ``nn.Linear`` draws its weight."""
    for p in parameters:
        nn.init.kaiming_uniform_(p, a=math.sqrt(5))
