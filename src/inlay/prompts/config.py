"""The common configuration of methods that act on a model's inputs, and what of it follows from the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig, TaskType
from ..injection.targets import embedding_ends


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """What every prompt method is told; what is None is taken from the model.

    Args:
        num_virtual_tokens: number of virtual tokens.
        token_dim: numbers per virtual token (of a prefix: per virtual key).
        num_transformer_submodules: 2 for an encoder-decoder language model, else 1; it decides the shape of PEFT's files.
        num_attention_heads: number of attention heads (of a prefix: of key heads).
        num_layers: number of the transformer's layers.
        modules_to_save: modules that are trained and saved whole, such as a new head.

    Raises:
        ValueError: ``num_virtual_tokens`` is missing or not positive.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method acts on the model's inputs instead of its layers: yes."""
        return True

    @property
    def total_virtual_tokens(self) -> int:
        """Number of rows of a prompt in PEFT's files: one set of tokens for each submodule."""
        return int(self.num_virtual_tokens or 0) * int(self.num_transformer_submodules or 1)


def text_config(model: nn.Module) -> Any:
    """Return a transformers model's configuration, of its language part where it has several.

    Raises:
        ValueError: the model has none.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model; prompt methods need its configuration and embeddings. "
            "Methods that adapt layers, such as LoRA, work on any module"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def settle_common(config: Any, model: nn.Module) -> None:
    """Fill in the fields that all prompt methods take from the model in the same way.

    Raises:
        ValueError: the model is not one of transformers, or ``num_virtual_tokens`` is not a positive number.
    """
    told = text_config(model)
    count = config.num_virtual_tokens
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_virtual_tokens={count!r} must be a positive whole number, for example 20")
    if config.num_transformer_submodules is None:
        language = config.task_type == TaskType.SEQ_2_SEQ_LM or (
            config.task_type is None and is_encoder_decoder(model) and _can_generate(model)
        )
        config.num_transformer_submodules = 2 if language else 1
    if config.num_layers is None:
        config.num_layers = _first(told, "num_hidden_layers", "num_layers", "n_layer")
    if config.num_attention_heads is None:
        config.num_attention_heads = _first(
            told, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"
        )


def settle_width(config: Any, model: nn.Module) -> None:
    """Take the width of virtual tokens from the model's word embedding.

    Raises:
        ValueError: the model has no word embedding, or ``token_dim`` is another width.
    """
    width = word_embedding(model).weight.shape[-1]
    if config.token_dim not in (None, width):
        raise ValueError(
            f"token_dim={config.token_dim} does not fit {type(model).__name__}, whose word embeddings have {width} numbers; "
            "leave token_dim out"
        )
    config.token_dim = width


def word_embedding(model: nn.Module) -> Any:
    """Return a model's word embedding, under whatever adapters it carries.

    Raises:
        ValueError: it has none.
    """
    embedding, _ = embedding_ends(model)
    weight = getattr(embedding, "weight", None)
    if embedding is None or weight is None or weight.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} has no word embedding, so nothing can stand in front of its words; prefix tuning "
            "works on models of images too"
        )
    return embedding


def _can_generate(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _first(config: Any, *names: str) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ValueError(f"the model's configuration has none of {', '.join(names)}; set it in the prompt's own")
