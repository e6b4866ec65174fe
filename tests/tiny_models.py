"""Models of transformers built from tiny configurations, with values that are the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 40


def _bert(**changes: Any) -> Any:
    return tf.BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)  # fmt: skip


def _gpt2() -> Any:
    return tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip


def _llama(**changes: Any) -> Any:
    return tf.LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)  # fmt: skip


def _t5() -> Any:
    return tf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip


def _vit() -> Any:
    return tf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip


def _whisper() -> Any:
    return tf.WhisperConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=20, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip


def _mixtral() -> Any:
    return tf.MixtralConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=24)  # fmt: skip


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertModel(_bert()),
    "bert_classifier": lambda: tf.BertForSequenceClassification(_bert(num_labels=3)),
    "bert_tagger": lambda: tf.BertForTokenClassification(_bert(num_labels=3)),
    "bert_answerer": lambda: tf.BertForQuestionAnswering(_bert()),
    "gpt2": lambda: tf.GPT2LMHeadModel(_gpt2()),
    "llama": lambda: tf.LlamaForCausalLM(_llama()),
    "llama_tied": lambda: tf.LlamaForCausalLM(_llama(tie_word_embeddings=True)),
    "llama_classifier": lambda: tf.LlamaForSequenceClassification(_llama(num_labels=3)),
    "mixtral": lambda: tf.MixtralForCausalLM(_mixtral()),
    "t5": lambda: tf.T5ForConditionalGeneration(_t5()),
    "vit": lambda: tf.ViTForImageClassification(_vit()),
    "whisper": lambda: tf.WhisperForConditionalGeneration(_whisper()),
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[name]()
        with torch.no_grad():
            for (
                p
            ) in model.parameters():  # transformers starts with numbers so small that a fault would not show
                if p.dim() > 1:
                    p.mul_(8.0 if p.std() < 0.05 else 1.0)
    return model.to(dtype).eval()


def tiny_inputs(name: str, batch: int = 3) -> dict[str, Tensor]:
    """Return inputs of a tiny model."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, 6), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 20, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})


def output_of(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Return a model's logits, or its last hidden states."""
    found = model(**inputs, **kwargs)
    tensors = [found[key] for key in ("logits", "start_logits", "last_hidden_state") if key in found]
    y: Tensor = tensors[0]
    return y
