"""VeRA: one random pair of matrices for the whole model, scaled in each layer. Kopiczko et al. 2024, https://arxiv.org/abs/2310.11454.

    W' = W + diag(b) B diag(d) A        W[out, in], A[r, in], d[r], B[out, r], b[out]

A and B are drawn once from a seed, as large as the largest adapted layer, and never trained; smaller layers use their
first columns and rows. Only d and b are trained: for query and value of BERT-base with r = 256, 24,576 numbers, a twelfth
of LoRA's with r = 8. b starts at zero, so the adapted layer starts as the layer itself.
A product with b, d and B is LoRA's with a B of its own, and A is frozen, so that x is not kept for the backward pass.
Authors' code: https://openreview.net/forum?id=NjNfLdxr3A (supplement)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..errors import AdapterFileError
from ..injection.targets import DEFAULT_TARGETS, model_config
from ..kernels.lora_linear import lora_linear
from ..kinds import Experts, LayerKind, Norm
from ..method import Column, Method, Slot
from .lora import dropout_now, fused_inputs

PAIR = ("vera_A", "vera_B")


@dataclass(kw_only=True)
class VeraConfig(PeftConfig):
    """Configuration of VeRA, with the fields and defaults of PEFT 0.21.

    Args:
        r: rank; far higher than LoRA's, since a rank costs one number in each layer.
        target_modules: names (endings of module paths) or one regular expression for whole paths, or "all-linear"; by
            default the attention projections that are usual for the model's type.
        projection_prng_key: seed of A and B.
        save_projection: write A and B to the file too. Without them the file is tiny, and A and B are drawn again from the
            seed, which gives the same numbers wherever PyTorch's generator on the CPU does.
        vera_dropout: probability with which an entry of the adapter's input is left out in training.
        d_initial: where d starts.
        fan_in_fan_out: set from the layer's class; accepted for compatibility.
        bias: "none", "all" or "vera_only": which biases of the base model are trained in place.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        init_weights: start as the identity (True), or at random (False).
        layers_to_transform: index or indices of the blocks to adapt; needs ``target_modules`` as a list.
        layers_pattern: name(s) of the list of blocks, where it is not found by itself.

    Raises:
        ValueError: a value is out of its range.
    """

    bias_of_targets: ClassVar[str] = "vera_only"

    peft_type: PeftType | str | None = PeftType.VERA
    r: int = 256
    target_modules: Collection[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if not 0.0 <= self.vera_dropout < 1.0:
            raise ValueError(f"vera_dropout={self.vera_dropout} is not a probability in [0, 1)")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )


class Vera(Method, name="VERA"):
    """W' = W + diag(b) B diag(d) A; see the top of this file.

    The pair is kept here, once for all layers; what is drawn from the seed and what a file holds is the same thing.
    """

    config = VeraConfig
    additive = True

    def __init__(self) -> None:
        self.inputs = self.outputs = 0  # of the largest layer
        self.pair: tuple[Tensor, Tensor] | None = None
        self.copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def default_targets(
        self, config: VeraConfig, model: nn.Module, required: bool
    ) -> Collection[str] | str | None:
        if model_config(model).get("model_type") == "phi":  # whose layers LoRA adapts have three sizes
            return {"q_proj", "v_proj"} & set(DEFAULT_TARGETS["phi"])
        return super().default_targets(config, model, required)

    def build(self, kind: LayerKind, config: VeraConfig, path: str) -> dict[str, Column]:
        if isinstance(kind, Norm):
            kind.factors(config.r)  # refuses in its own words
        if config.vera_dropout and not kind.direct:
            raise ValueError(
                f"vera_dropout={config.vera_dropout} is not possible on {path}, whose {kind.param} "
                "is adapted through merged weights; set it to 0"
            )
        self.inputs = max(self.inputs, kind.in_features)
        self.outputs = max(self.outputs, kind.out_features)
        experts = (kind.experts,) if isinstance(kind, Experts) else ()
        where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
        return {
            "vera_dropout": nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity(),
            "vera_lambda_b": nn.Parameter(torch.empty(*experts, kind.out_features, **where)),
            "vera_lambda_d": nn.Parameter(torch.empty(*experts, config.r, **where)),
            "r": config.r,
        }

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        config: Any = slot.config
        self._drawn(config)  # by now every layer has been built; a compiler could not draw it
        if config.init_weights:
            nn.init.zeros_(slot["vera_lambda_b"])
            nn.init.constant_(slot["vera_lambda_d"], config.d_initial)
        else:
            nn.init.ones_(slot["vera_lambda_b"])
            nn.init.normal_(slot["vera_lambda_d"])

    # ------------------------------------------------------------------ what the layer computes

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        down, up = self._factors(slot, y.dtype)
        if x.is_floating_point():
            x = slot["vera_dropout"](x.to(y.dtype))
        return y + slot.kind.through_matrices(x, down, up).to(y.dtype)

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        ready = fused_inputs(slot, x)
        if ready is None:
            return None
        down, up = self._factors(slot, torch.promote_types(ready[0].dtype, slot["vera_lambda_b"].dtype))
        return lora_linear(x, *ready, down, up, 1.0, dropout_now(slot, "vera_dropout"))

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self._product(slot, w.dtype)
        if delta.shape != w.shape:  # an adapter before this one has made a grouped convolution dense
            delta = slot.kind.widen(delta)
        return w + delta, b

    def delta(self, slot: Slot) -> Tensor:
        return self._product(slot, torch.promote_types(slot.kind.dtype, torch.float32))

    def beyond_merge(self, slot: Slot) -> str | None:
        return "vera_dropout" if dropout_now(slot, "vera_dropout") else None

    def _product(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        down, up = self._factors(slot, dtype)
        return up @ down

    def _factors(self, slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A[r, in] and ``diag(b) B diag(d)``, [..., out, r], for one layer."""
        kind = slot.kind
        a, b = self._pair_for(slot, kind.device, dtype)
        gains = slot["vera_lambda_b"].to(dtype).unsqueeze(-1) * slot["vera_lambda_d"].to(dtype).unsqueeze(-2)
        a = a[: slot["r"], : kind.in_features]
        if (padding := getattr(kind, "lookup", {}).get("padding_idx")) is not None:
            a = a.index_fill(1, torch.tensor(padding, device=a.device), 0)  # its token keeps the row it has
        return a, gains * b[: kind.out_features, : slot["r"]]

    # ------------------------------------------------------------------ the pair

    def _pair_for(self, slot: Slot, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B where and as a computation needs them."""
        found = self.copies.get((device, dtype))
        if found is None:
            a, b = self._drawn(slot.config)
            with _for_training_too():
                found = self.copies[device, dtype] = (a.to(device, dtype), b.to(device, dtype))
        return found

    def _drawn(self, config: Any) -> tuple[Tensor, Tensor]:
        """Return A and B in float32 on the CPU, uniform with a variance of 2 / fan-in, as PEFT draws them."""
        if self.pair is None:
            with _for_training_too():
                generator = torch.Generator().manual_seed(config.projection_prng_key)
                a, b = torch.empty(config.r, self.inputs), torch.empty(self.outputs, config.r)
                for matrix in (a, b):
                    bound = math.sqrt(6 / matrix.shape[1])
                    matrix.uniform_(-bound, bound, generator=generator)
                self.pair = a, b
        return self.pair

    def shared_names(self, config: VeraConfig) -> tuple[str, ...]:
        return PAIR if config.save_projection else ()

    def shared(self, config: VeraConfig) -> Sequence[Tensor]:
        return self._drawn(config)

    def load_shared(self, config: VeraConfig, tensors: Sequence[Tensor]) -> None:
        """Take the pair of a file. It may be larger than needed: PEFT lets several adapters share the first one's."""
        a, b = (tensor.detach().float().cpu() for tensor in tensors)
        least = ((config.r, self.inputs), (self.outputs, config.r))
        for name, matrix, shape in zip(PAIR, (a, b), least, strict=True):
            if matrix.dim() != 2 or matrix.shape[0] < shape[0] or matrix.shape[1] < shape[1]:
                raise AdapterFileError(
                    f"{name} has the shape {tuple(matrix.shape)}; the adapted layers need at least {shape}: "
                    "is it an adapter of another base model?"
                )
        self.pair, self.copies = (a, b), {}


def _for_training_too() -> AbstractContextManager[Any]:
    """A context whose tensors may be saved for a backward pass later, also where inference mode is on now."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
