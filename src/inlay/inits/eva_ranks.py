"""Giving the layers of an adapter other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from . import EvaConfig

if TYPE_CHECKING:
    from ..method import Slot
    from ..methods.lora import LoraConfig
    from ..peft_model import PeftModel


def set_ranks(model: PeftModel, name: str, slots: Mapping[str, Slot], ranks: Mapping[str, int]) -> None:
    """Set an adapter in anew with other ranks, where that changes anything. A layer of rank 0 loses it.

    Args:
        model: the model.
        name: the adapter.
        slots: its slots by the paths of their layers in the base model.
        ranks: new ranks by the same paths; other layers keep theirs.

    Raises:
        ValueError: the model's layers are replicated, which setting the adapter in anew would repeat.
    """
    now = {path: ranks.get(path, slot["r"]) for path, slot in slots.items()}
    parameters = [p for slot in slots.values() for p in slot.parameters().values()]
    on_meta = any(p.device.type == "meta" for p in parameters)
    if not on_meta and all(slot["r"] == now[path] for path, slot in slots.items()):
        return
    config: Any = model.peft_config[name]
    if config.layer_replication:
        raise ValueError(
            "EVA cannot redistribute ranks in a model with layer_replication; set "
            "eva_config=EvaConfig(rho=1.0) and leave low_cpu_mem_usage at False"
        )
    rank_pattern, alpha_pattern = _patterns(config, slots, now)
    changes: dict[str, Any] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if not all(now.values()):
        changes["target_modules"] = {path for path, rank in now.items() if rank}
    setting = model.base_model.switch.setting
    model.base_model.delete_adapter(name)
    in_float32 = parameters[0].dtype == torch.float32
    model.base_model.add_adapter(name, replace(config, **changes), autocast_adapter_dtype=in_float32)
    model.base_model.set_adapter(
        setting.composition or setting.active, config.inference_mode, setting.skip_layers
    )


def _patterns(
    config: LoraConfig, slots: Mapping[str, Slot], now: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return ``rank_pattern`` and ``alpha_pattern`` for new ranks.

    A key is a whole path, but matches longer paths that end in it as well: longer ones come first.
    """
    from ..methods.lora import by_pattern

    adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for path in sorted((path for path in slots if now[path]), key=len):
        growth = now[path] / slots[path]["r"] if adjust else 1.0
        alpha = slots[path]["lora_alpha"] * (growth**0.5 if config.use_rslora else growth)
        if by_pattern(ranks, path, config.r) != now[path]:
            ranks = {path: now[path], **ranks}
        if by_pattern(alphas, path, config.lora_alpha) != alpha:
            alphas = {path: int(alpha) if alpha == int(alpha) else alpha, **alphas}
    return ranks, alphas
