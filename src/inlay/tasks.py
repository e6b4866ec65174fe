"""The ways in: ``get_peft_model`` and ``inject_adapter_in_model``, and a class of ``PeftModel`` for each task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from .adapted_model import AdaptedModel
from .config import PeftConfig, TaskType
from .injection.targets import ANSWERERS, HEADS, base_name
from .peft_model import PeftModel


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Return a base model with a new adapter, in the class of the configuration's task.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to add; it is copied, not changed.
        adapter_name: name of the adapter.
        mixed: accepted for compatibility; adapters of several methods can always be mixed.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        revision: revision of the base model, recorded in the adapter's file.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Raises:
        ValueError: the configuration does not fit the model, or the model already is a ``PeftModel``.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model already is a PeftModel; use model.add_adapter(name, config) for another adapter, or model.unload() first"
        )
    name = base_name(model) or peft_config.base_model_name_or_path
    config = replace(peft_config, base_model_name_or_path=name, revision=revision or peft_config.revision)
    return class_for(config)(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def class_for(config: PeftConfig, asked: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """Return the class of a configuration's task, unless a more particular one than ``PeftModel`` was asked for."""
    return asked if asked is not PeftModel else PeftModel.for_task.get(config.task_type, PeftModel)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Set an adapter into a model without wrapping the model, and return the model.

    Args:
        peft_config: what to add.
        model: the model; it is changed in place and keeps its class.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.
        state_dict: a saved adapter's tensors: exactly the modules that it names are adapted. Its values are not loaded.

    Raises:
        ValueError: the configuration does not fit the model, which is then unchanged.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            "a prompt acts on what the whole model is called with, so it cannot be injected into it; use get_peft_model"
        )
    if state_dict is not None:
        found = {key[: key.index(".lora_")] for key in state_dict if ".lora_" in key}
        peft_config = replace(
            cast("Any", peft_config), target_modules={f.removeprefix("base_model.model.") for f in found}
        )
    adapted = AdaptedModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    cast("Any", model).peft_config = adapted.peft_config
    return model


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A sequence classifier; its head is trained and saved."""

    heads = HEADS


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A token classifier; its head is trained and saved."""

    heads = HEADS


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """An extractive question answerer; its head is trained and saved."""

    heads = ANSWERERS


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A causal language model."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder-decoder language model."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are used."""
