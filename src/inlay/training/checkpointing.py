"""Gradient checkpointing over frozen layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def gradient_checkpointing_is_on(model: nn.Module) -> bool:
    """Whether a transformers model recomputes activations in the backward pass."""
    new_name = getattr(model, "is_activation_checkpointing", None)  # transformers 5; the old name warns there
    return bool(getattr(model, "is_gradient_checkpointing", False) if new_name is None else new_name)


def let_gradients_through_inputs(model: Any) -> None:
    """Make the embeddings' outputs require gradients: a checkpointed block is only differentiated if its inputs do."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
