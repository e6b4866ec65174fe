"""Prompt tuning: train virtual tokens in front of the input. Lester et al. 2021, https://arxiv.org/abs/2104.08691.

    E' = [T; E]        T[n, d] the virtual tokens, E[..., t, d] the embedded input

It does not start as the identity: any token in front of the input changes the output. Starting from embeddings of the model's
own vocabulary, best those of a text that describes the task, is closest to it. The file holds T.
Authors' code: https://github.com/google-research/prompt-tuning
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftType
from ..input_method import InputMethod
from ..prompts.config import PromptLearningConfig, settle_common, settle_width, word_embedding
from ..prompts.encoder import PromptModule
from .field_values import warn_of_idle


class PromptTuningInit(str, Enum):
    """Where the virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of prompt tuning.

    Args:
        prompt_tuning_init: "RANDOM" (standard normal), "SAMPLE_VOCAB" (embeddings of random tokens) or "TEXT".
        prompt_tuning_init_text: the text to start from, repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: folder or hub id of the tokenizer for that text.
        tokenizer_kwargs: what else to pass to ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError: the initialisation is unknown, or "TEXT" without a text or a tokenizer.
    """

    peft_type: PeftType | str | None = PeftType.PROMPT_TUNING
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [kind.value for kind in PromptTuningInit]
        if self.prompt_tuning_init not in known:
            raise ValueError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} is unknown; it is one of {known}"
            )
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        from_text = self.prompt_tuning_init is PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, name):
                raise ValueError(f"When prompt_tuning_init='TEXT', {name} can't be None.")
        if not from_text:
            warn_of_idle(self, "prompt_tuning_init_text", None, "prompt_tuning_init='TEXT'")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEmbedding(PromptModule):
    """The virtual tokens of one adapter: the prompt is the embedding itself."""

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config.total_virtual_tokens, int(config.token_dim or 0))
        if word_embeddings is not None and not config.inference_mode:
            start_from_words(self, config, word_embeddings)


class PromptTuning(InputMethod, name="PROMPT_TUNING"):
    """E' = [T; E]; see the top of this file."""

    config = PromptTuningConfig

    def complete(self, config: PromptTuningConfig, model: nn.Module) -> None:
        settle_common(config, model)
        settle_width(config, model)

    def build(self, model: nn.Module, config: PromptTuningConfig) -> PromptEmbedding:
        return PromptEmbedding(config)

    def init(self, encoder: PromptModule, model: nn.Module, config: PromptTuningConfig) -> None:
        start_from_words(encoder, config, word_embedding(model))

    def tokens(self, encoder: PromptModule, config: PromptTuningConfig) -> Tensor:
        # PEFT's files of encoder-decoder models have as many rows again for the decoder, which it never uses.
        return encoder.prompt()[: config.num_virtual_tokens]


@torch.no_grad()
def start_from_words(encoder: PromptModule, config: PromptTuningConfig, words: Any) -> None:
    """Set virtual tokens to embeddings of words, as the configuration says.

    Raises:
        ValueError: the text has no tokens, or tokens outside the vocabulary.
        OSError: there is no such tokenizer.
    """
    rows, size = encoder.embedding.num_embeddings, words.weight.shape[0]
    if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
        chosen = torch.randint(0, size, (rows,))
    elif config.prompt_tuning_init is PromptTuningInit.TEXT:
        chosen = _tokens_of_text(config, rows)
        if int(chosen.max()) >= size:
            raise ValueError(
                f"the tokenizer {config.tokenizer_name_or_path} gives token {int(chosen.max())}, but the model knows {size}: "
                "it belongs to another model"
            )
    else:
        return
    encoder.embedding.weight.copy_(words(chosen.to(words.weight.device)))


def _tokens_of_text(config: PromptTuningConfig, rows: int) -> Tensor:
    from transformers import AutoTokenizer

    # An adapter's file must not be able to ask for code from elsewhere to be run.
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokens = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)(
        config.prompt_tuning_init_text
    )["input_ids"]
    if not tokens:
        raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens")
    repeated = tokens * (rows // len(tokens) + 1)
    return torch.tensor(repeated[:rows])
