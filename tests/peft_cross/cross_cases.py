"""What both libraries are asked to do: a model, and the fields of a configuration. The same names exist in either."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import inlay
from law_models import MODELS, build, inputs_of
from tiny_models import BUILDERS, output_of, tiny, tiny_inputs


@dataclass(frozen=True)
class CrossCase:
    """One configuration on one model.

    Attributes:
        name: what it tries.
        model: a name in ``tiny_models`` or ``law_models``.
        settings: fields of the configuration.
        config: the configuration's class.
    """

    name: str
    model: str
    settings: dict[str, Any]
    config: str = "LoraConfig"

    def base(self) -> Any:
        """Return the bare model. Skips the test where this release of transformers builds it without the parameters named."""
        model = tiny(self.model) if self.model in BUILDERS else build(self.model, torch.float32)
        there = [name for name, _ in model.named_parameters()]
        for wanted in self.settings.get("target_parameters", ()):
            if not any(name.endswith(wanted) for name in there):
                pytest.skip(
                    f"{type(model).__name__} of transformers {tf.__version__} has no parameter {wanted}"
                )
        return model

    def run(self, model: nn.Module, **kwargs: Any) -> Tensor:
        """Return what a model computes for the case's inputs. PyTorch's native encoder is off: with it PEFT ignores adapters."""
        with fastpath_off():
            return self._run(model, **kwargs)

    def _run(self, model: nn.Module, **kwargs: Any) -> Tensor:
        if self.model in BUILDERS:
            return output_of(model, tiny_inputs(self.model), **kwargs)
        y: Tensor = model(inputs_of(self.model, torch.float32, 0), **kwargs)
        return y

    def configuration(self, library: Any) -> Any:
        """Return the configuration in one of the two libraries."""
        return getattr(library, self.config)(
            **({"r": 2} if self.config == "LoraConfig" else {}), **copy.deepcopy(self.settings)
        )

    def adapted(self, library: Any) -> Any:
        """Return the adapted model in one of the two libraries, in eval mode."""
        return library.get_peft_model(self.base(), self.configuration(library)).eval()

    def pair(self) -> tuple[Any, Any]:
        """Return the adapted model of Inlay and that of PEFT, with the same values as after some training."""
        mine, theirs = self.adapted(inlay), self.adapted(peft)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in mine.parameters():
                if p.requires_grad:
                    p += 0.2 * torch.randn(p.shape, generator=generator)
        # VeRA keeps its pair in the state of every layer there.
        theirs.load_state_dict(theirs.state_dict() | mine.state_dict())
        return mine, without_double_merge(theirs)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters, without AdaLoRA's constant ``ranknum``: a frozen parameter in PEFT, a buffer in Inlay."""
    return {name: p for name, p in model.named_parameters() if ".ranknum." not in name}


def constants_of(model: nn.Module) -> int:
    """Return how many such constants a model of PEFT counts among its parameters."""
    return sum(".ranknum." in name for name, _ in model.named_parameters())


@contextmanager
def fastpath_off() -> Iterator[None]:
    """Make ``nn.TransformerEncoderLayer`` call its modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def without_double_merge(theirs: Any) -> Any:
    """Undo a fault of PEFT 0.21.2: in ``nn.MultiheadAttention`` it adds the update of ``out_proj`` twice.

    Its ``MultiheadAttention.merge``, by which it also runs, writes the update into the weight and then merges the layer once
    more. With half the scaling, the second time makes it whole (but only the first time has a gradient).
    """
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.layer.MultiheadAttention):
            module.base_layer.out_proj.scale_layer(0.5)
    return theirs


TOKENS = tiny_inputs("llama")["input_ids"].unique()[2:4].tolist()


def _lora(name: str, model: str, **settings: Any) -> CrossCase:
    return CrossCase(name, model, settings)


CASES = [
    _lora("bert", "bert", target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    _lora("bert_defaults_no_task", "bert"),
    _lora("gpt2", "gpt2", task_type="CAUSAL_LM"),
    _lora("gpt2_fan_in_fan_out", "gpt2", task_type="CAUSAL_LM", fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]),
    _lora("llama", "llama", task_type="CAUSAL_LM", target_modules="all-linear"),
    _lora("t5", "t5", task_type="SEQ_2_SEQ_LM"),
    _lora("vit", "vit", target_modules="all-linear"),
    _lora("whisper", "whisper", target_modules=["q_proj", "fc1"]),
    _lora("rslora", "llama", use_rslora=True, lora_alpha=3, task_type="CAUSAL_LM"),
    _lora("patterns", "llama", rank_pattern={"q_proj": 4, r"layers\.1\.self_attn\.v_proj": 3}, alpha_pattern={"v_proj": 5}, task_type="CAUSAL_LM"),
    _lora("lora_bias", "bert", lora_bias=True, target_modules=["query"]),
    _lora("bias_all", "bert", bias="all", target_modules=["query", "value"]),
    _lora("bias_lora_only", "bert", bias="lora_only", target_modules=["query", "value"]),
    _lora("dora", "llama", use_dora=True, task_type="CAUSAL_LM", target_modules="all-linear"),
    _lora("dora_gpt2", "gpt2", use_dora=True, task_type="CAUSAL_LM"),
    _lora("dora_embedding", "llama", use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    _lora("dora_conv1d", "conv1d", use_dora=True, target_modules=["layer"]),
    _lora("dora_conv2d", "conv2d", use_dora=True, target_modules=["layer"]),
    _lora("embedding", "llama", target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    _lora("embedding_padding", "embedding_padding", target_modules=["layer"]),
    _lora("embedding_gemma", "embedding_gemma", target_modules=["layer"]),
    _lora("embedding_bart", "embedding_bart", target_modules=["layer"]),
    _lora("lm_head", "llama", target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    _lora("conv1d", "conv1d", target_modules=["layer"]),
    _lora("conv2d", "conv2d", target_modules=["layer"]),
    _lora("conv2d_groups", "conv2d_groups", target_modules=["layer"]),
    _lora("conv3d", "conv3d", target_modules=["layer"]),
    _lora("mha", "mha_batch_first", target_modules=["layer"]),
    _lora("mha_out_proj", "encoder_layer", target_modules=["self_attn", "linear1"]),
    _lora("experts", "experts", target_modules=[], target_parameters=["layer.up"]),
    _lora("experts_two", "experts_two", target_modules=[], target_parameters=["layer.up", "layer.down"]),
    _lora("experts_two_named_backwards", "experts_two", target_modules=[], target_parameters=["layer.down", "layer.up"]),
    _lora("experts_and_modules", "mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    _lora("parameter_of_linear", "llama", target_modules=[], target_parameters=["q_proj.weight"]),
    _lora("head_sequence", "bert_classifier", task_type="SEQ_CLS"),
    _lora("head_sequence_llama", "llama_classifier", task_type="SEQ_CLS"),
    _lora("head_tokens", "bert_tagger", task_type="TOKEN_CLS"),
    _lora("head_answers", "bert_answerer", task_type="QUESTION_ANS"),
    _lora("modules_to_save", "vit", target_modules=r".*\.(query|q_proj)", modules_to_save=["classifier"]),
    _lora("modules_to_save_nested", "bert", target_modules=["query"], modules_to_save=["pooler"]),
    _lora("tokens", "llama", trainable_token_indices=TOKENS, task_type="CAUSAL_LM"),
    _lora("tokens_by_name", "llama", trainable_token_indices={"embed_tokens": TOKENS[:1], "lm_head": [5, 1]}, task_type="CAUSAL_LM"),
    _lora("tokens_tied", "llama_tied", trainable_token_indices=TOKENS, task_type="CAUSAL_LM"),
    CrossCase("trainable_tokens", "llama", {"token_indices": TOKENS, "task_type": "CAUSAL_LM"}, "TrainableTokensConfig"),
    CrossCase("trainable_tokens_tied", "llama_tied", {"token_indices": TOKENS, "task_type": "CAUSAL_LM"}, "TrainableTokensConfig"),
    CrossCase("trainable_tokens_named", "bert", {"token_indices": TOKENS, "target_modules": ["word_embeddings"]}, "TrainableTokensConfig"),
    CrossCase("adalora_bert", "bert", {"task_type": "FEATURE_EXTRACTION", "total_step": 9}, "AdaLoraConfig"),
    CrossCase("adalora_gpt2", "gpt2", {"task_type": "CAUSAL_LM", "total_step": 9, "init_r": 3, "target_r": 2}, "AdaLoraConfig"),
    CrossCase("adalora_t5", "t5", {"task_type": "SEQ_2_SEQ_LM", "total_step": 9, "lora_alpha": 3}, "AdaLoraConfig"),
    CrossCase("adalora_head", "bert_classifier", {"task_type": "SEQ_CLS", "total_step": 9, "lora_dropout": 0.1}, "AdaLoraConfig"),
    CrossCase("adalora_conv2d", "conv2d", {"target_modules": ["layer"], "total_step": 9}, "AdaLoraConfig"),
    CrossCase("ia3_bert", "bert", {"task_type": "FEATURE_EXTRACTION"}, "IA3Config"),
    CrossCase("ia3_gpt2", "gpt2", {"task_type": "CAUSAL_LM"}, "IA3Config"),
    CrossCase("ia3_llama", "llama", {"task_type": "CAUSAL_LM"}, "IA3Config"),
    CrossCase("ia3_t5", "t5", {"task_type": "SEQ_2_SEQ_LM"}, "IA3Config"),
    CrossCase("ia3_head", "bert_classifier", {"task_type": "SEQ_CLS"}, "IA3Config"),
    CrossCase("ia3_conv2d", "conv2d", {"target_modules": ["layer"], "feedforward_modules": []}, "IA3Config"),
    CrossCase("ia3_conv3d_inputs", "conv3d", {"target_modules": ["layer"], "feedforward_modules": ["layer"]}, "IA3Config"),
    CrossCase("ln_tuning_bert", "bert", {"target_modules": ["LayerNorm"], "task_type": "FEATURE_EXTRACTION"}, "LNTuningConfig"),
    CrossCase("ln_tuning_llama", "llama", {"task_type": "CAUSAL_LM"}, "LNTuningConfig"),
    CrossCase("ln_tuning_gpt2", "gpt2", {"task_type": "CAUSAL_LM"}, "LNTuningConfig"),
    CrossCase("vera_bert", "bert", {"r": 6, "task_type": "FEATURE_EXTRACTION"}, "VeraConfig"),
    CrossCase("vera_llama", "llama", {"r": 9, "target_modules": ["q_proj", "k_proj", "down_proj"], "projection_prng_key": 3, "task_type": "CAUSAL_LM"}, "VeraConfig"),
    CrossCase("vera_gpt2", "gpt2", {"r": 5, "save_projection": False, "d_initial": 0.3, "task_type": "CAUSAL_LM"}, "VeraConfig"),
    CrossCase("vera_head", "bert_classifier", {"r": 4, "bias": "vera_only", "task_type": "SEQ_CLS"}, "VeraConfig"),
    CrossCase("loha_bert", "bert", {"r": 2, "task_type": "FEATURE_EXTRACTION"}, "LoHaConfig"),
    CrossCase("loha_llama", "llama", {"r": 3, "alpha": 2, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"}, "LoHaConfig"),
    CrossCase("loha_head", "bert_classifier", {"r": 2, "task_type": "SEQ_CLS"}, "LoHaConfig"),
    CrossCase("loha_conv1d", "conv1d", {"r": 2, "target_modules": ["layer"], "use_effective_conv2d": True}, "LoHaConfig"),
    CrossCase("loha_conv2d", "conv2d", {"r": 2, "target_modules": ["layer"]}, "LoHaConfig"),
    CrossCase("loha_conv2d_kernel", "conv2d", {"r": 2, "target_modules": ["layer"], "use_effective_conv2d": True}, "LoHaConfig"),
    CrossCase("loha_conv2d_groups", "conv2d_groups", {"r": 2, "target_modules": ["layer"]}, "LoHaConfig"),
    CrossCase("lokr_bert", "bert", {"r": 2, "task_type": "FEATURE_EXTRACTION"}, "LoKrConfig"),
    CrossCase("lokr_llama", "llama", {"r": 1, "alpha": 2, "target_modules": "all-linear", "decompose_both": True, "alpha_pattern": {"q_proj": 3}, "task_type": "CAUSAL_LM"}, "LoKrConfig"),
    CrossCase("lokr_factor", "llama", {"r": 3, "decompose_factor": 2, "task_type": "CAUSAL_LM"}, "LoKrConfig"),
    CrossCase("lokr_full", "bert_classifier", {"r": 64, "init_weights": "lycoris", "task_type": "SEQ_CLS"}, "LoKrConfig"),
    CrossCase("lokr_conv1d", "conv1d", {"r": 1, "target_modules": ["layer"]}, "LoKrConfig"),
    CrossCase("lokr_conv2d", "conv2d", {"r": 1, "target_modules": ["layer"]}, "LoKrConfig"),
    CrossCase("lokr_conv2d_kernel", "conv2d", {"r": 1, "target_modules": ["layer"], "use_effective_conv2d": True}, "LoKrConfig"),
    CrossCase("lokr_conv2d_groups", "conv2d_groups", {"r": 4, "target_modules": ["layer"]}, "LoKrConfig"),
    CrossCase("oft_bert", "bert", {"oft_block_size": 8, "task_type": "FEATURE_EXTRACTION"}, "OFTConfig"),
    CrossCase("oft_llama", "llama", {"r": 2, "oft_block_size": 0, "target_modules": "all-linear", "use_cayley_neumann": False, "task_type": "CAUSAL_LM"}, "OFTConfig"),
    CrossCase("oft_shared", "t5", {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 3, "task_type": "SEQ_2_SEQ_LM"}, "OFTConfig"),
    CrossCase("oft_head", "bert_classifier", {"oft_block_size": 4, "num_cayley_neumann_terms": 6, "task_type": "SEQ_CLS"}, "OFTConfig"),
    CrossCase("oft_embedding", "llama", {"oft_block_size": 4, "num_cayley_neumann_terms": 4, "target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}, "OFTConfig"),
    CrossCase("oft_bias", "bert", {"oft_block_size": 4, "num_cayley_neumann_terms": 2, "bias": "all", "target_modules": ["query"]}, "OFTConfig"),
    _lora("layers_to_transform", "llama", layers_to_transform=[0, 2], target_modules=["q_proj", "up_proj"]),
    _lora("layer_replication", "llama", layer_replication=[(0, 2), (1, 3)], task_type="CAUSAL_LM"),
    _lora("regular_expression", "t5", target_modules=r".*decoder.*\.(q|wo)$", task_type="SEQ_2_SEQ_LM"),
    _lora("excluded", "llama", target_modules="all-linear", exclude_modules=["down_proj", "layers.0.self_attn.q_proj"]),
    _lora("tied_modules_to_save", "llama_tied", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM"),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
assert all(case.model in BUILDERS or case.model in MODELS for case in CASES)
