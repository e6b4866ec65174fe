"""Tiny models, inputs and adapters for the tests of prompt methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 40
TOKENS = 3
"""Number of virtual tokens in these tests."""

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert(**changes: Any) -> Any:
    return tf.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, **_SIZES, **_NO_DROPOUT, **changes
    )


def _llama(**changes: Any) -> Any:
    return tf.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **_SIZES, **_ENDS, **changes
    )


BUILDERS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_ENDS)),
    "llama": (tf.LlamaForCausalLM, _llama),
    "mistral": (tf.MistralForCausalLM, lambda: tf.MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, head_dim=4, **_SIZES, **_ENDS)),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, head_dim=8, **_SIZES, **_ENDS)),
    "opt": (tf.OPTForCausalLM, lambda: tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=4, ffn_dim=24, max_position_embeddings=64, dropout=0.0, **_ENDS)),
    "gptj": (tf.GPTJForCausalLM, lambda: tf.GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=48, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_ENDS)),
    "falcon": (tf.FalconForCausalLM, lambda: tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, multi_query=False, **_ENDS)),
    "llama_classifier": (tf.LlamaForSequenceClassification, lambda: _llama(num_labels=3)),
    "bert": (tf.BertModel, _bert),
    "bert_classifier": (tf.BertForSequenceClassification, lambda: _bert(num_labels=3)),
    "bert_tagger": (tf.BertForTokenClassification, lambda: _bert(num_labels=3)),
    "bert_answerer": (tf.BertForQuestionAnswering, _bert),
    "roberta_classifier": (tf.RobertaForSequenceClassification, lambda: tf.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=34, num_labels=3, type_vocab_size=1, pad_token_id=0, **_SIZES, **_NO_DROPOUT)),
    "vit": (tf.ViTForImageClassification, lambda: tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **_SIZES, **_NO_DROPOUT)),
    "t5": (tf.T5ForConditionalGeneration, lambda: tf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)),
    "bart": (tf.BartForConditionalGeneration, lambda: tf.BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=48, dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=None, **_ENDS)),
}  # fmt: skip

TASKS = {
    "llama_classifier": "SEQ_CLS", "bert": "FEATURE_EXTRACTION", "bert_classifier": "SEQ_CLS", "bert_tagger": "TOKEN_CLS",
    "bert_answerer": "QUESTION_ANS", "roberta_classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM",
}  # fmt: skip
"""The task of each model that is not a causal language model."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-tuning": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 10}),
}
"""The class and the fields of a configuration of each method, in either library."""
PREFIXES = ("prefix", "prefix-projection")
CAUSAL = ("gpt2", "llama", "mistral", "qwen3", "opt", "gptj", "falcon")


def build(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Return a model in eval mode, the same values at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls, config = BUILDERS[name][0], BUILDERS[name][1]()
        # Some models choose their attention once, when they are made, and not all have the one of torch.
        config._attn_implementation = attention if cls._supports_sdpa else "eager"
        model: Any = cls(config)
        with torch.no_grad():
            for (
                p
            ) in model.parameters():  # transformers starts with numbers so small that a fault would not show
                if p.dim() > 1 and p.std() < 0.05:
                    p.mul_(10.0)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model.eval()


def configuration(library: Any, method: str, model: str, **changes: Any) -> Any:
    """Return a method's configuration for a model in one of the two libraries."""
    cls, fields = METHODS[method]
    task = TASKS.get(model, None if model == "vit" else "CAUSAL_LM")
    return getattr(library, cls)(**({"num_virtual_tokens": TOKENS, "task_type": task} | fields | changes))


def adapted(library: Any, method: str, model: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Return an adapted model in eval mode whose prompt has distinct values, the same in both libraries."""
    result = library.get_peft_model(build(model, attention), configuration(library, method, model, **changes))
    give_values(result)
    return result.eval()


def give_values(model: nn.Module, seed: int = 0) -> None:
    """Give everything that is trained values that follow from its name and shape."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.copy_(0.7 * torch.randn(p.shape, generator=generator).to(p))


def inputs(
    name: str, batch: int = 2, length: int = 7, padding: str = "", labels: bool = False
) -> dict[str, Tensor]:
    """Return inputs of a model; ``padding`` is "left" or "right" for a first sample that is two tokens shorter."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    given = {"input_ids": ids}
    if padding:
        mask = torch.ones_like(ids)
        mask[0, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
        given = {"input_ids": ids * mask, "attention_mask": mask}
    if name in ("t5", "bart"):
        given["labels"] = ids[:, :4].flip(1).contiguous()
    elif labels and name in CAUSAL:
        given["labels"] = ids
    elif labels and name.endswith("classifier"):
        given["labels"] = torch.arange(batch) % 3
    elif labels and name == "bert_tagger":
        given["labels"] = ids % 3
    elif labels and name == "bert_answerer":
        given |= {"start_positions": torch.full((batch,), 1), "end_positions": torch.full((batch,), 3)}
    return given


def output(result: Any) -> Tensor:
    """Return the output that a model's task is about."""
    if "logits" in result:
        return result.logits
    if "start_logits" in result:
        return torch.stack([result.start_logits, result.end_logits], dim=-1)
    return result.last_hidden_state


def longer(name: str, method: str) -> int:
    """Return by how many entries an output per token is longer than the input."""
    per_token = name in (*CAUSAL, "bert", "bert_tagger", "bert_answerer")
    return TOKENS if per_token and method not in PREFIXES else 0
