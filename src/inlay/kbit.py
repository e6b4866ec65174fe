"""Preparing a base model for training adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a (quantised) base model, keep its other parameters in float32, and turn on gradient checkpointing.

    Args:
        model: the base model; it is changed in place and returned.
        use_gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        gradient_checkpointing_kwargs: passed to ``model.gradient_checkpointing_enable``.
        auto_clear_cache: give memory that is no longer used back to the device.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    if not getattr(model, "is_quantized", False) or _method(model) in ("bitsandbytes", "hqq"):
        for p in model.parameters():
            if p.dtype in (torch.float16, torch.bfloat16) and type(p).__name__ not in (
                "Params4bit",
                "Int8Params",
            ):
                p.data = p.data.float()
    if use_gradient_checkpointing:
        settings = (
            {"use_reentrant": True}
            if gradient_checkpointing_kwargs is None
            else gradient_checkpointing_kwargs
        )
        if settings.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _method(model: nn.Module) -> str:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return (
        str(getattr(config, "quant_method", "bitsandbytes" if config is not None else ""))
        .rsplit(".", 1)[-1]
        .lower()
    )
