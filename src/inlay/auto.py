"""``AutoPeftModelFor*``: load a saved adapter together with the base model that it names."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from .config import HUB_ARGUMENTS, PeftConfig
from .peft_model import PeftModel
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)


class AutoPeftModel:
    """Loads an adapter onto a base model of the class that the adapter's file records."""

    auto_class: ClassVar[str | None] = None
    peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter was trained on, and the adapter onto it.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or a repository on the hub.
            adapter_name: name to give the adapter.
            is_trainable: go on training it.
            config: use this configuration instead of the saved one.
            revision: revision of the adapter on the hub.
            **kwargs: passed to the base model's ``from_pretrained``, and those meant for the hub to the adapter's too.

        Raises:
            ValueError: there is no adapter, or it names no base model or no class for it.
        """
        adapter_hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS} | (
            {"revision": revision} if revision else {}
        )
        saved = (
            PeftConfig.from_pretrained(pretrained_model_name_or_path, **adapter_hub)
            if config is None
            else config
        )
        if saved.base_model_name_or_path is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not say which base model it belongs to (base_model_name_or_path is null); "
                "load that model yourself and use PeftModel.from_pretrained(model, adapter)"
            )
        base = cls._base_class(saved).from_pretrained(
            saved.base_model_name_or_path, revision=saved.revision or "main", **kwargs
        )
        return cls.peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **adapter_hub
        )

    @classmethod
    def _base_class(cls, saved: PeftConfig) -> Any:
        import transformers

        if cls.auto_class is not None:
            return getattr(transformers, cls.auto_class)
        if saved.task_type is not None:
            return getattr(transformers, AUTO_CLASS_OF[PeftModel.for_task[saved.task_type]])
        name = (saved.auto_mapping or {}).get("base_model_class")
        if name is None or not hasattr(transformers, name):
            raise ValueError(
                f"the adapter names no task and the base class {name!r}, which transformers does "
                "not have; use a task's own AutoPeftModelFor..."
            )
        return getattr(transformers, name)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    auto_class, peft_class = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder language models."""

    auto_class, peft_class = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    auto_class, peft_class = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    auto_class, peft_class = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    auto_class, peft_class = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models whose hidden states are used."""

    auto_class, peft_class = "AutoModel", PeftModelForFeatureExtraction


AUTO_CLASS_OF: dict[type[PeftModel], str] = {
    c.peft_class: c.auto_class for c in AutoPeftModel.__subclasses__() if c.auto_class is not None
}
"""transformers' Auto class for each class of ``PeftModel``."""
