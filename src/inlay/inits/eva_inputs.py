"""How EVA reads batches and layers' inputs of language models; users may pass functions of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import EvaConfig

if TYPE_CHECKING:
    from ..methods.lora import LoraConfig

LayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a dictionary of inputs."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(
    model_input: Mapping[str, Any], peft_config: LoraConfig
) -> Tensor:
    """Return the positions [n, 2] of a batch of token ids that count: not padding, not masked in the labels.

    Raises:
        TypeError: the batch is not a dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"a batch is a {type(model_input).__name__}, not a dictionary; "
            "pass a prepare_model_inputs_fn of your own, or None"
        )
    eva_config = peft_config.eva_config or EvaConfig()
    everywhere = torch.ones_like(model_input["input_ids"])
    mask: Tensor = model_input.get("attention_mask", everywhere).bool()
    if eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """Return the rows [n, in] of a layer's input at positions [n, 2] that count.

    Raises:
        ValueError: the layer does not see one row for each position.
    """
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if x.dim() != model_input.shape[1] + 1:
        raise ValueError(
            f"layer {layer_name} sees inputs of shape {tuple(x.shape)}, not [batch, position, in]; leave it "
            "out with exclude_modules, or pass a prepare_layer_inputs_fn of your own (None takes all rows)"
        )
    rows: Tensor = x[model_input.T.unbind()]
    return rows
