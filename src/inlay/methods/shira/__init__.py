"""SHiRA: train 1-2 % of the entries of a weight. Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175.

    W' = W + scale * S        W[out, in];  S is values[k] at indices[2, k] and zero elsewhere;  k = r (out + in), scale = 1

The values start at zero, so the adapted layer starts as the layer itself. k is what LoRA of rank r trains, but S is of high rank.
The values live in the weight (``layers/in_weight.py``): forward is the frozen layer's, backward makes only k entries of dW, and
switching adapters writes k numbers. Masks are in ``masks.py``.
Authors' code: https://github.com/Qualcomm-AI-research/SHiRA
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import PeftConfig, PeftType
from ...kinds import LayerKind
from ...method import Column, Method, Slot
from .masks import CALIBRATED, MASKS, layer_seed

MaskFunction = Callable[..., Tensor]


@dataclass(kw_only=True)
class ShiraConfig(PeftConfig):
    """Configuration of SHiRA. Fields and defaults are those of PEFT 0.21, and the paper's masks that PEFT lacks.

    Args:
        r: r (in + out) entries of each weight are trained, as many numbers as LoRA of rank r has.
        mask_type: which ones: "random", "struct" (diagonal, rows and columns), "wm" (largest weights), "grad" or "snip" (largest
            gradient or |weight * gradient|; made by ``calibrate_shira``), or any other name beside ``mask_fn``.
        random_seed: seed of the masks; every layer derives its own from it. By default the mask follows ``torch.manual_seed``.
        target_modules: names (endings of module paths) or one regular expression for whole paths, or "all-linear"; by
            default the attention projections that are usual for the model's type.
        exclude_modules: names or a regular expression of modules to leave out.
        target_parameters: names of parameters to adapt in place of modules, such as a 3-d tensor of experts.
        fan_in_fan_out: accepted for compatibility; the layout of the weight is known from the layer's class.
        init_weights: True starts as the identity; False from random values, for tests.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        mask_fn: ``mask_fn(base_layer, r, **kwargs)`` that returns a mask of zeros and ones in the shape of the weight, with
            r (in + out) ones; may also be set after construction. It is told ``random_seed`` (the layer's own) and
            ``parameter`` (the weight's name), and is not saved: a file holds the mask itself.

    Raises:
        ValueError: r is not positive.
    """

    peft_type: PeftType | str | None = PeftType.SHIRA
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    target_parameters: list[str] | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    mask_fn: MaskFunction | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if self.inference_mode and self.mask_fn is None and self.mask_type not in MASKS:
            self.mask_fn = mask_of_file

    def to_dict(self) -> dict[str, Any]:
        values = PeftConfig.to_dict(replace(self, mask_fn=None))
        del values["mask_fn"]
        return {k: v for k, v in values.items() if v is not None or k not in OF_INLAY}


def mask_of_file(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
    """Stand in for a mask that only the file knows, in a configuration that was read from one."""
    raise ValueError(
        "this configuration was read from a file, which holds its mask; load the adapter with from_pretrained or load_adapter"
    )


OF_INLAY = ("exclude_modules", "target_parameters")
"""Fields that PEFT does not know; they are written only where they say something."""


class Shira(Method, name="SHIRA"):
    """W' = W + S; see the top of this file."""

    config = ShiraConfig
    additive = True
    in_weight = True
    saves_embedding = False
    saved_buffers = ("shira_indices",)

    def build(self, kind: LayerKind, config: ShiraConfig, path: str) -> dict[str, Column]:
        matrices = getattr(kind, "experts", 1)
        entries, size = (
            config.r * (kind.in_features + kind.out_features),
            kind.in_features * kind.out_features,
        )
        if entries > size:
            most = size // (kind.in_features + kind.out_features)
            raise ValueError(
                f"The set rank {config.r} results in more shira params than the total number of params in the base layer: "
                f"{entries} of {size} in {path}; {f'choose r <= {most} or ' if most else ''}leave the layer out"
            )
        count = entries * matrices
        return {
            "shira_weight": nn.Parameter(torch.empty(count, device=kind.device, dtype=kind.dtype)),
            "shira_indices": torch.zeros(2, count, device=kind.device, dtype=torch.int32),
            "r": config.r,
            "scaling": 1.0,
        }

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        config: Any = slot.config
        slot["shira_indices"].copy_(indices_of(slot, config))
        values = slot["shira_weight"]
        nn.init.zeros_(values) if config.init_weights else nn.init.normal_(values)

    def entries(self, slot: Slot) -> tuple[Tensor, Tensor]:
        values, scale = slot["shira_weight"], slot["scaling"]
        return slot["shira_indices"], values if scale == 1.0 else scale * values

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (rows, columns), values = slot["shira_indices"].long(), self.entries(slot)[1].to(w.dtype)
        if w.shape[-1] == slot.kind.in_features:
            flat = w.reshape(-1, w.shape[-1])
            return flat.index_put((rows, columns), values, accumulate=True).view(w.shape), b
        return w + slot.kind.widen(
            self.delta(slot).to(w.dtype)
        ), b  # the layer is dense by now, its groups joined

    def delta(self, slot: Slot) -> Tensor:
        (rows, columns), kind = slot["shira_indices"].long(), slot.kind
        values = self.entries(slot)[1].to(torch.promote_types(kind.dtype, torch.float32))
        leading = (kind.experts,) if hasattr(kind, "experts") else ()
        zeros = values.new_zeros(*leading, kind.out_features, kind.in_features)
        flat = zeros.view(-1, kind.in_features).index_put((rows, columns), values)
        return flat.view(zeros.shape)

    def pack(self, slot: Slot, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write indices in 16 bits where they fit: a file is then at most twice LoRA's. PEFT casts them back as Inlay does."""
        indices = tensors["shira_indices"]
        largest = max(slot.kind.in_features, slot.kind.out_features * getattr(slot.kind, "experts", 1)) - 1
        fitting = (t for t in (torch.int16, torch.uint16, torch.int32) if largest <= torch.iinfo(t).max)
        return tensors | {"shira_indices": indices.to(next(fitting))}


def indices_of(slot: Slot, config: ShiraConfig) -> Tensor:
    """Return the mask of a new adapter at one layer as indices[2, k] into the canonical matrix, leading axes flattened.

    Raises:
        ValueError: the mask has another shape or number of entries, or ``mask_type`` is unknown or waits for calibration.
    """
    if config.mask_fn is mask_of_file:
        return torch.full_like(
            slot["shira_indices"], torch.iinfo(torch.int32).max
        )  # no mask: an error if ever used
    w = slot.weight()
    base = int(torch.randint(2**31, ())) if config.random_seed is None else config.random_seed
    seed = layer_seed(base, slot.path)
    if config.mask_fn is not None:
        return _indices_of_function(slot, config, seed)
    if config.mask_type in CALIBRATED:
        raise ValueError(
            f"mask_type={config.mask_type!r} needs gradients: make the configuration with "
            "calibrate_shira(model, config, batches) and pass what it returns"
        )
    if config.mask_type not in MASKS:
        raise ValueError(
            f"mask_type={config.mask_type!r} is unknown (known: {', '.join((*MASKS, *CALIBRATED))}); "
            "for a mask of your own set mask_fn as well"
        )
    generator = torch.Generator().manual_seed(seed)
    count = config.r * (slot.kind.in_features + slot.kind.out_features)
    size = slot.kind.in_features * slot.kind.out_features
    matrices = w.reshape(-1, slot.kind.out_features, slot.kind.in_features)
    places = [
        n * size + MASKS[config.mask_type](matrix, count, generator) for n, matrix in enumerate(matrices)
    ]
    return _split(torch.cat(places), slot.kind.in_features)


def _indices_of_function(slot: Slot, config: ShiraConfig, seed: int) -> Tensor:
    kind, layer = slot.kind, slot.layer.get_base_layer()
    assert config.mask_fn is not None
    mask = config.mask_fn(layer, config.r, random_seed=seed, parameter=kind.param)
    shape, wanted = tuple(kind.native(slot.weight()).shape), slot["shira_weight"].numel()
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask_fn must return a mask of the weight's shape {shape} for {slot.path}, not {found}"
        )
    places = kind.matrix(mask).reshape(-1).nonzero().flatten()
    if len(places) != wanted:
        raise ValueError(
            f"The SHiRA indices and weights are not the same dimensions: mask_fn returned {len(places)} ones for {slot.path}, "
            f"and r={config.r} trains r * (in + out) = {wanted} entries of it"
        )
    return _split(places, kind.in_features)


def _split(places: Tensor, width: int) -> Tensor:
    return torch.stack([places // width, places % width])
