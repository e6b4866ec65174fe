"""Preparing a base model for training adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .training.checkpointing import let_gradients_through_inputs


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base model and keep its small parameters in float32; let a quantised one recompute its activations.

    Args:
        model: the base model; it is changed in place and returned.
        use_gradient_checkpointing: where the model is quantised, recompute activations in the backward pass instead of keeping
            them. As in PEFT, other models are left to ``model.gradient_checkpointing_enable()``.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; ``{"use_reentrant": True}`` by default.
        auto_clear_cache: give memory that is no longer used back to the device.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    in_bits_and_bytes = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    quantised = in_bits_and_bytes or getattr(model, "is_quantized", False)
    if (
        in_bits_and_bytes or not quantised
    ):  # others keep their packed weights in tensors that look like half precision
        for p in model.parameters():
            if p.dtype in (torch.float16, torch.bfloat16) and type(p).__name__ != "Params4bit":
                p.data = p.data.float()
    if quantised and use_gradient_checkpointing:
        _checkpoint(model, gradient_checkpointing_kwargs or {"use_reentrant": True})
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _checkpoint(model: Any, settings: dict[str, Any]) -> None:
    if settings.get("use_reentrant", True):
        let_gradients_through_inputs(model)
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5; the old name warns there
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
