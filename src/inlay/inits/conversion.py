"""An adapter whose start changed the base weight, written as plain LoRA for the weight as it was.

    W_res = W - s B0 A0      W_res + s B A  =  W + s [B, -B0] [A; A0]        A, A0[r, in], B, B0[out, r]

So the plain adapter has twice the rank and the same scale s. DoRA's direction is the same matrix, so its
lengths stay.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import PeftConfig
    from ..methods.lora import LoraConfig

DOWN = ("lora_A.weight", "lora_embedding_A")
UP = ("lora_B.weight", "lora_embedding_B")
UP_BIAS = "lora_B.bias"


def to_plain_lora(
    tensors: dict[str, Tensor], config: PeftConfig, initial_tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return tensors and configuration of the plain LoRA that does to W what this adapter does to W_res.

    Args:
        tensors: the trained adapter, by its keys on disk.
        config: its configuration.
        initial_tensors: the adapter as it was before training, by the same keys.

    Raises:
        ValueError: it is not LoRA, its start cannot be subtracted, or the initial tensors do not fit.
    """
    how = getattr(config, "init_lora_weights", None)
    if how is None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is for LoRA and DoRA, "
            f"and this adapter is {config.method_name()}; leave it out"
        )
    if how in (False, "loftq"):
        why = "the base weights are quantised" if how else "its random start is part of what it computes"
        raise ValueError(
            f"an adapter with init_lora_weights={how!r} cannot be converted, as {why}; save it as it is"
        )
    plain = {key: _joined(key, value, initial_tensors) for key, value in tensors.items()}
    return plain, _of_twice_the_rank(cast("LoraConfig", config))


def _joined(key: str, trained: Tensor, initial: dict[str, Tensor]) -> Tensor:
    if not key.endswith((*DOWN, *UP, UP_BIAS)):
        return trained
    if key not in initial or initial[key].shape != trained.shape:
        found = f"has shape {tuple(initial[key].shape)} there" if key in initial else "is not there"
        raise ValueError(
            "path_initial_model_for_weight_conversion does not hold this adapter before its training: "
            f"{key}, of shape {tuple(trained.shape)}, {found}"
        )
    start = initial[key].to(trained)
    if key.endswith(UP_BIAS):
        return trained - start
    return torch.cat([trained, start], dim=0) if key.endswith(DOWN) else torch.cat([trained, -start], dim=1)


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    growth: Any = (
        math.sqrt(2) if config.use_rslora else 2
    )  # of alpha, so that alpha / r, or alpha / sqrt(r), stays
    return replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
