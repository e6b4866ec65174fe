"""Tiny models of the families of blocks that bottleneck adapters know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tiny_models import VOCABULARY, tiny, tiny_inputs

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
_ENCODER: dict[str, Any] = _SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 24, "pad_token_id": 0}  # fmt: skip
_DECODER: dict[str, Any] = _SIZES | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_BART: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip


def _wav2vec2(norm_first: bool) -> Any:
    return tf.Wav2Vec2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8], conv_kernel=[4, 4], conv_stride=[4, 4], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, do_stable_layer_norm=norm_first)  # fmt: skip


class Encoder(nn.Module):
    """PyTorch's own encoder."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(x)}


MORE: dict[str, Callable[[], nn.Module]] = {
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER, num_labels=3)),
    "deberta": lambda: tf.DebertaV2ForTokenClassification(tf.DebertaV2Config(**_ENCODER, num_labels=3, type_vocab_size=0)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**{k: v for k, v in _DECODER.items() if k != "head_dim"})),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, max_position_embeddings=24, use_parallel_residual=False)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_BART)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24, dropout=0.0, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "distilbert": lambda: tf.DistilBertForTokenClassification(tf.DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24, dropout=0.0, attention_dropout=0.0)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**_SIZES, max_position_embeddings=24, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
    "albert": lambda: tf.AlbertForTokenClassification(tf.AlbertConfig(**_ENCODER, embedding_size=16, classifier_dropout_prob=0.0)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, parallel_attn=False, alibi=False, bos_token_id=1, eos_token_id=2)),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_DECODER)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{k: v for k, v in _DECODER.items() if k != "head_dim"})),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**{k: v for k, v in _DECODER.items() if k != "head_dim"}, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2, shared_expert_intermediate_size=8)),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)),
    "wav2vec2": lambda: tf.Wav2Vec2Model(_wav2vec2(False)),
    "wav2vec2_first": lambda: tf.Wav2Vec2Model(_wav2vec2(True)),
    "torch_last": lambda: Encoder(norm_first=False),
    "torch_first": lambda: Encoder(norm_first=True),
}  # fmt: skip
MAIN = ["bert", "roberta", "deberta", "gpt2", "llama", "t5", "vit", "gemma2"]
OTHERS = ["qwen3", "olmo2", "neox", "bart", "mbart", "opt", "distilbert", "modernbert", "mixtral", "whisper", "albert", "bloom", "falcon", "glm4", "phi3", "qwen2_moe", "dinov2", "wav2vec2", "wav2vec2_first", "torch_last", "torch_first"]  # fmt: skip
SEQ2SEQ = {"t5", "bart", "mbart", "whisper"}


def model_named(name: str, **settings: Any) -> Any:
    """Return a tiny model in eval mode, the same one at every call."""
    if name not in MORE:
        return tiny(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MORE[name]()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(8.0 if p.dim() > 1 and p.std() < 0.05 else 1.0)
                if p.dim() == 1:  # biases of zero and gains of one hide a residual that is not there
                    p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def inputs_for(name: str, batch: int = 3) -> dict[str, Tensor]:
    """Return inputs of a tiny model."""
    if name.startswith("torch"):
        return {"x": torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(0))}
    if name.startswith("wav2vec2"):
        return {"input_values": torch.randn(batch, 96, generator=torch.Generator().manual_seed(0))}
    found = tiny_inputs("vit" if name == "dinov2" else name, batch)
    return found | ({"decoder_input_ids": found["input_ids"].flip(1)} if name in ("bart", "mbart") else {})


def shake(model: nn.Module, scale: float = 0.3, seed: int = 0) -> None:
    """Give every trained parameter other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
