"""Faults of AdapterHub's ``adapters`` 1.3.0 that were found by running it, each as a test that Inlay does not have it.

The numbers are those of the list that they come from: S1 gave wrong results in default use, S2 elsewhere.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor, nn

from adapterhub_goldens import Golden
from inlay import (
    Average,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Split,
    Stack,
    VeraConfig,
    get_peft_model,
)
from inlay.method import METHODS, load_built_in
from tiny_models import tiny, tiny_inputs

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BOTTLENECK = BottleneckConfig.preset("pfeiffer", reduction_factor=4)
PREFIX = PrefixTuningConfig(num_virtual_tokens=4)


def decoder(name: str, **changes: Any) -> Any:
    """Return a tiny decoder of transformers with grouped keys, in eval mode."""
    classes = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
        "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM),
        "phi": (tf.PhiConfig, tf.PhiForCausalLM),
    }
    config, model = classes[name]
    heads = {} if name == "phi" else {"num_key_value_heads": 1}
    head_dim = {"head_dim": 8} if name == "gemma2" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(vocab_size=40, pad_token_id=0, **SIZES, **heads, **head_dim, **changes)).eval()


def shake(model: nn.Module, seed: int = 1) -> Any:
    """Give what is trained other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model.eval()


def ids(length: int = 7, batch: int = 2) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_s1_1_the_cache_is_written(name: str) -> None:
    model = shake(get_peft_model(decoder(name), BOTTLENECK))
    out = model(input_ids=ids(), use_cache=True)
    assert out.past_key_values.get_seq_length() == 7
    whole = model.generate(input_ids=ids(), max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(input_ids=ids(), max_new_tokens=6, do_sample=False), whole)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_s1_2_prefixes_are_right_under_sdpa_without_padding(name: str) -> None:
    def prefixed(attention: str) -> Any:
        base = tiny("gpt2") if name == "gpt2" else decoder(name)
        base.set_attn_implementation(attention)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return shake(get_peft_model(base, PREFIX))

    text, other = ids(3), ids(4)[:, 1:]
    assert torch.allclose(
        prefixed("sdpa")(input_ids=text).logits, prefixed("eager")(input_ids=text).logits, atol=1e-5
    )
    model = prefixed("sdpa")  # with more virtual tokens than real ones, which must be seen nevertheless
    assert not torch.allclose(model(input_ids=other).logits, model(input_ids=text).logits, atol=1e-3)


def test_s1_3_modernbert_gets_no_bias_and_stays_as_it_is() -> None:
    config = tf.ModernBertConfig(vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=1, **SIZES)  # fmt: skip
    base = tf.ModernBertModel(config).eval()
    expected = base(input_ids=ids()).last_hidden_state
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["Wqkv"]))
    assert not any("Wqkv" in key and key.endswith("bias") for key in model.state_dict())
    assert torch.equal(model(input_ids=ids()).last_hidden_state, expected)


def test_s1_4_each_layer_uses_its_own_norm() -> None:
    base = decoder("gemma2")
    counts: dict[str, int] = {}

    def counted(path: str) -> Any:
        def count(*_: Any) -> None:
            counts[path] = counts.get(path, 0) + 1

        return count

    for path, module in base.named_modules():
        if "layernorm" in path:
            module.register_forward_hook(counted(path))
    get_peft_model(base, BOTTLENECK)(input_ids=ids())
    by_block = [
        {p.split("layers.1.")[-1]: n for p, n in counts.items() if f"layers.{i}." in p} for i in (0, 1)
    ]
    assert list(by_block[0].values()) == list(by_block[1].values())


def test_s1_5_llamas_projections_are_the_ones_that_are_named() -> None:
    model = get_peft_model(decoder("llama"), IA3Config(task_type="CAUSAL_LM"))
    shapes = {
        name.split(".mlp.")[1]: tuple(p.shape)
        for name, p in model.named_parameters()
        if "mlp" in name and p.requires_grad
    }
    assert shapes == {"down_proj.ia3_l.default": (1, 24)}  # the input of the feed-forward block's last layer
    wide = get_peft_model(decoder("llama"), LoraConfig(r=2, target_modules=["gate_proj", "o_proj"]))
    assert {n.split(".")[-4] for n, p in wide.named_parameters() if p.requires_grad} == {
        "gate_proj",
        "o_proj",
    }


def two(config: Any, name: str = "bert") -> Any:
    """Return a model with two adapters of the same values."""
    model = get_peft_model(tiny(name), config, adapter_name="a")
    model.add_adapter("b", config)
    own = {n: p for n, p in model.named_parameters() if ".a." in n}
    with torch.no_grad():
        for n, p in own.items():
            p.normal_(std=0.3)
            model.get_parameter(n.replace(".a.", ".b.")).copy_(p)
    return model.eval()


@pytest.mark.parametrize(
    "config", [BOTTLENECK, LoraConfig(r=2, target_modules=["query", "value"])], ids=["bottleneck", "lora"]
)
def test_s1_6_the_average_of_twins_is_the_twin(config: Any) -> None:
    model, inputs = two(config), tiny_inputs("bert")
    model.set_adapter("a")
    alone = model(**inputs).last_hidden_state
    model.set_adapter(Average("a", "b"))
    assert torch.allclose(model(**inputs).last_hidden_state, alone, atol=1e-5)


def test_s1_7_vera_trains_vectors() -> None:
    with torch.device("meta"):
        base = tf.BertModel(tf.BertConfig())
        model = get_peft_model(base, VeraConfig(r=8, target_modules=["query", "value"]))
    assert model.get_nb_trainable_parameters()[0] == 18_624  # 14.2 M there


@pytest.mark.parametrize("alpha", [4, 8])
def test_s1_8_merged_dora_is_dora_and_comes_off_again(alpha: int) -> None:
    config = LoraConfig(r=4, lora_alpha=alpha, use_dora=True, target_modules=["query", "value"])
    model, inputs = shake(get_peft_model(tiny("bert"), config)), tiny_inputs("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    beside = model(**inputs).last_hidden_state
    model.merge_adapter()
    assert torch.allclose(model(**inputs).last_hidden_state, beside, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_s1_9_merged_ia3_minds_the_bias(name: str) -> None:
    model, inputs = shake(get_peft_model(tiny(name), IA3Config())), tiny_inputs(name)
    beside = model(**inputs)[0]
    model.merge_adapter()
    assert torch.allclose(model(**inputs)[0], beside, atol=1e-5)


def test_s1_10_every_setting_of_a_configuration_is_saved() -> None:
    load_built_in()
    for name, method in METHODS.items():
        if not method.__module__.startswith("inlay."):
            continue
        config = method.config
        known = {f.name for f in fields(config)}
        annotated = {
            n
            for cls in config.__mro__
            for n, a in vars(cls).get("__annotations__", {}).items()
            if "ClassVar" in str(a)
        }
        plain = {
            n
            for cls in config.__mro__[:-1]
            for n, v in vars(cls).items()
            if not n.startswith("_")
            and not callable(v)
            and not isinstance(v, (property, classmethod, staticmethod))
        }
        assert plain <= known | annotated, name  # a setting without an annotation is no field, and gets lost
        needed = {"total_step": 9, "members": ["a", "b"], "num_virtual_tokens": 3}
        needed = {n: value for n, value in needed.items() if n in known}
        sample = config(**needed)
        unsaid = known - sample.to_dict().keys()
        assert all(getattr(sample, n) == getattr(type(sample)(**needed), n) for n in unsaid), name
        assert unsaid <= {
            "runtime_config",
            "shift_positions",
            "mask_fn",
            "exclude_modules",
            "target_parameters",
        }, name


@pytest.mark.parametrize(
    "config", [PromptTuningConfig(num_virtual_tokens=4), PREFIX], ids=["prompt", "prefix"]
)
def test_s2_11_a_prompt_loads_under_another_name(config: Any, tmp_path: Path) -> None:
    model = shake(get_peft_model(tiny("gpt2"), config))
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny("gpt2"), LoraConfig(r=2))
    other.load_adapter(tmp_path, "x")
    other.set_adapter("x")
    assert torch.equal(other(input_ids=ids()).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize(
    "config",
    [
        PREFIX,
        BottleneckConfig.preset("pfeiffer", ln_before=True),
        BottleneckConfig.preset("compacter", reduction_factor=2),
    ],
    ids=["prefix", "ln_before", "compacter"],
)
def test_s2_13_safetensors_hold_everything_once(config: Any, tmp_path: Path) -> None:
    model = shake(get_peft_model(decoder("llama", hidden_act="silu"), copy.deepcopy(config)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in list(file.keys())) == trained
    again = PeftModel.from_pretrained(decoder("llama", hidden_act="silu"), tmp_path)
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "ia3": IA3Config(),
    "vera": VeraConfig(r=4),
    "bottleneck": BOTTLENECK,
    "compacter": BottleneckConfig.preset("compacter", reduction_factor=2),
    "parallel": BottleneckConfig.preset("parallel"),
    "prefix": PREFIX,
    "prompt": PromptTuningConfig(num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("float32_adapters", [True, False])
def test_s2_14_a_bfloat16_model_trains(name: str, float32_adapters: bool) -> None:
    base = decoder("llama").to(torch.bfloat16)
    config = copy.deepcopy(CONFIGS[name])
    model = get_peft_model(base, config, autocast_adapter_dtype=float32_adapters).train()
    out = model(input_ids=ids(), labels=ids())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_s2_15_generation_is_the_same_with_and_without_cache(name: str) -> None:
    model = shake(get_peft_model(tiny("gpt2"), copy.deepcopy(CONFIGS[name])))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(input_ids=ids(4), use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_s2_17_the_inverse_is_applied_at_the_head() -> None:
    model = shake(get_peft_model(tiny("gpt2"), BottleneckConfig.preset("seq_bn_inv", reduction_factor=4)))
    inner = model.get_base_model()
    embedded = torch.randn(2, 5, 16)
    coupled = inner.transformer.drop(embedded)
    assert not torch.allclose(coupled, embedded, atol=1e-2)
    wanted = torch.nn.functional.linear(embedded, inner.lm_head.weight)
    torch.testing.assert_close(inner.lm_head(coupled), wanted, rtol=1e-4, atol=1e-4)


def test_s2_19_settings_of_kronecker_products_and_scaling() -> None:
    for settings in (
        {"init_weights": "mam_adapter"},
        {"shared_W_phm": True, "factorized_phm_W": False},
        {"scaling": 4},
        {"hypercomplex_nonlinearity": "normal"},
    ):
        config = BottleneckConfig.preset("compacter", reduction_factor=2, **settings)
        model = shake(get_peft_model(tiny("bert"), config)).train()
        model(**tiny_inputs("bert")).last_hidden_state.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    drawn = []
    for how in ("glorot-uniform", "normal"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            chosen = BottleneckConfig.preset("compacter", reduction_factor=2, hypercomplex_nonlinearity=how)
            model = get_peft_model(tiny("bert"), chosen)
        drawn.append(
            next(p for n, p in model.named_parameters() if "adapter_down" in n and "W_left" in n).std()
        )
    assert not torch.isclose(*drawn, rtol=0.1)


def test_s2_20_post_add_on_a_model_that_normalises_first() -> None:
    config = BottleneckConfig.preset("pfeiffer", residual_before_ln="post_add", reduction_factor=4)
    assert shake(get_peft_model(tiny("gpt2"), config))(input_ids=ids()).logits.isfinite().all()


def test_s2_21_parallel_adapters_on_phi() -> None:
    model = shake(get_peft_model(decoder("phi"), BottleneckConfig.preset("parallel")))
    assert model(input_ids=ids()).logits.isfinite().all()


def test_s2_22_a_bert_decoder_generates() -> None:
    config = tf.BertGenerationConfig(
        vocab_size=40, is_decoder=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES
    )
    model = shake(get_peft_model(tf.BertGenerationDecoder(config).eval(), BOTTLENECK))
    assert model.generate(input_ids=ids(3), max_new_tokens=4, do_sample=False).shape[0] == 2


def test_s2_23_a_computed_prefix_with_grouped_keys_is_saved_flat(tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True)
    model = shake(get_peft_model(decoder("llama"), config))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert tuple(file.get_tensor("prompt_embeddings").shape) == (4, 2 * 2 * 8)
    flat = PeftModel.from_pretrained(decoder("llama"), tmp_path)
    assert torch.allclose(flat(input_ids=ids()).logits, model(input_ids=ids()).logits, atol=1e-6)


def fused() -> Any:
    model = two(BOTTLENECK)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".b." in n:
                p.mul_(-0.5)
    model.add_adapter("mix", FusionConfig(members=["a", "b"], temperature=2.0))
    model.set_adapter(Fuse("a", "b"))
    return model


def test_s2_24_a_fusion_computes_the_same_twice() -> None:
    model, inputs = shake(fused()), tiny_inputs("bert")
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_s2_25_compositions_of_compacters_train() -> None:
    config = BottleneckConfig.preset("compacter", reduction_factor=2)
    model = two(config).train()
    model.set_adapter(Stack("a", Split("a", "b", splits=[2, 4])))
    model(**tiny_inputs("bert")).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.add_adapter("mix", FusionConfig(members=["a", "b"], train_members=True))
    model.set_adapter("mix")
    assert all(p.requires_grad for n, p in model.named_parameters() if "adapter_rule" in n)


def test_s2_27_a_fusions_penalty_belongs_to_its_own_step() -> None:
    model = fused().train()
    values = [p for n, p in model.named_parameters() if "fusion_value" in n]
    with torch.no_grad():
        for p in values:
            p.mul_(2)
    penalty = model.base_model.penalty()
    expected = sum(0.01 * (torch.eye(len(p)) - p).square().sum() for p in values)
    assert torch.allclose(penalty, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_s2_28_an_adapted_model_can_be_pickled_and_copied(name: str) -> None:
    model = shake(get_peft_model(tiny("gpt2"), copy.deepcopy(CONFIGS[name])))
    wanted = model(input_ids=ids()).logits
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(input_ids=ids()).logits, wanted)


def test_s2_12_a_file_of_another_model_is_an_error(shared: Path) -> None:
    goldens = shared / "goldens" / "adapterhub"
    base = Golden(goldens / "gpt2" / "compacter").base()
    with pytest.raises(RuntimeError, match="another base model"):
        PeftModel.from_pretrained(base, goldens / "bert" / "seq_bn" / "checkpoint_safetensors")


def test_the_list_is_whole() -> None:
    """Of 28 faults, S2-16 and S2-18 are of features that Inlay does not have, and S2-26 of a trainer of its own."""
    numbers = {
        int(n.split("_")[2]) for n, f in globals().items() if n.startswith("test_s") and inspect.isfunction(f)
    }
    assert numbers == set(range(1, 29)) - {16, 18, 26}
