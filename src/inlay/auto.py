"""``AutoPeftModelFor*``: load a saved adapter together with the base model that it names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from .config import HUB_ARGUMENTS, PeftConfig, TaskType
from .files.folder import locate
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
        import_allowlist: Sequence[str] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter was trained on, and the adapter onto it.

        A tokenizer that is saved beside the adapter and knows more tokens than the base model makes room for them.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or a repository on the hub.
            adapter_name: name to give the adapter.
            is_trainable: go on training it.
            config: use this configuration instead of the saved one.
            revision: revision of the adapter on the hub.
            subfolder: a folder inside the adapter's folder or repository.
            import_allowlist: accepted for compatibility; classes are looked up in transformers only, never imported by name.
            **kwargs: passed to the base model's ``from_pretrained``, and those meant for the hub to the adapter's too.

        Raises:
            ValueError: there is no adapter, it is for another task, or it names no base model or no class for it.
        """
        where = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS} | {"subfolder": subfolder}
        where |= {"revision": revision} if revision else {}
        saved = (
            PeftConfig.from_pretrained(pretrained_model_name_or_path, **where) if config is None else config
        )
        base_class = cls._base_class(saved)
        if saved.base_model_name_or_path is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not say which base model it belongs to (base_model_name_or_path is null); "
                "load that model yourself and use PeftModel.from_pretrained(model, adapter)"
            )
        base = base_class.from_pretrained(
            saved.base_model_name_or_path, revision=saved.revision or "main", **kwargs
        )
        _make_room_for_tokens(
            base, pretrained_model_name_or_path, where, kwargs.get("trust_remote_code", False)
        )
        return cls.peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=saved, **where
        )

    @classmethod
    def _base_class(cls, saved: PeftConfig) -> Any:
        import transformers

        own = PeftModel.for_task.get(saved.task_type)
        if own is not None and cls.auto_class is not None and own is not cls.peft_class:
            raise ValueError(
                f"the adapter is for the task {TaskType(saved.task_type).value}; use Auto{own.__name__} instead of {cls.__name__}"
            )
        recorded = (saved.auto_mapping or {}).get("base_model_class")
        name = cls.auto_class or (AUTO_CLASS_OF[own] if own is not None else recorded)
        base_class = getattr(transformers, str(name), None)
        if not hasattr(base_class, "from_pretrained"):
            raise ValueError(
                f"the adapter names no task and the base class {name!r}, which transformers does "
                "not have; use a task's own AutoPeftModelFor..."
            )
        return base_class


def _make_room_for_tokens(
    base: Any, adapter: str | os.PathLike[str], where: dict[str, Any], trusted: bool
) -> None:
    """Enlarge the embeddings where the adapter was trained with added tokens, as its tokenizer tells."""
    try:
        locate(adapter, "tokenizer_config.json", **where)
    except ValueError:
        return
    if not hasattr(base, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    known = {k: v for k, v in where.items() if v is not None}
    tokens = len(AutoTokenizer.from_pretrained(adapter, trust_remote_code=trusted, **known))
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)


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
