"""The life of a prompt adapter: added, switched, saved, loaded, resumed, deleted; and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.files.folder import STATE_NAME
from inlay.input_method import InputMethod
from inlay.method import METHODS as REGISTERED
from prompt_models import (
    METHODS,
    PREFIXES,
    TOKENS,
    VOCABULARY,
    adapted,
    build,
    configuration,
    give_values,
    inputs,
    output,
)

COMPUTING = ("p-tuning", "p-tuning-lstm", "prefix-projection")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported for parameter efficient tuning"
)


def train(model: Any, steps: int, optimizer: Any = None, name: str = "bert_classifier") -> Any:
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        given = inputs(name, batch=2 + step % 2, labels=True)
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("model", ["llama", "bert_classifier", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_is_reloaded(method: str, model: str, tmp_path: Path) -> None:
    adapter, given = adapted(inlay, method, model), inputs(model)
    adapter.save_pretrained(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapter.train()
    adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    adapter.eval()
    assert (tmp_path / STATE_NAME).exists() == (method in COMPUTING)
    for trainable in (False, True):
        loaded = inlay.PeftModel.from_pretrained(build(model), tmp_path, is_trainable=trainable)
        torch.testing.assert_close(output(loaded(**given)), output(adapter(**given)), atol=1e-6, rtol=1e-5)
        assert any(p.requires_grad for p in loaded.parameters()) == trainable
        assert loaded.prompt_encoder["default"].computes == (trainable and method in COMPUTING)


@pytest.mark.parametrize("method", METHODS)
def test_training_that_is_resumed_is_the_same_training(method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = inlay.get_peft_model(build("bert_classifier"), configuration(inlay, method, "bert_classifier"))
    train(whole, 2)
    whole.save_pretrained(tmp_path)
    train(whole, 2)
    resumed = inlay.PeftModel.from_pretrained(build("bert_classifier"), tmp_path, is_trainable=True)
    train(resumed, 2)
    given = inputs("bert_classifier")
    assert torch.equal(output(resumed(**given)), output(whole(**given)))


@pytest.mark.parametrize("method", METHODS)
def test_new_values_for_an_adapter_that_is_there(method: str, tmp_path: Path) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama")
    wanted = output(adapter(**given))
    adapter.save_pretrained(tmp_path)
    give_values(adapter, seed=7)
    assert not torch.allclose(output(adapter(**given)), wanted, atol=1e-2)
    adapter.load_adapter(tmp_path, "default")
    assert torch.equal(output(adapter(**given)), wanted)
    assert any(p.requires_grad for p in adapter.parameters())
    adapter.load_adapter(tmp_path, "frozen")
    adapter.set_adapter("frozen", inference_mode=True)
    torch.testing.assert_close(output(adapter(**given)), wanted, atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_go_out_and_in(method: str) -> None:
    one, other = adapted(inlay, method, "bert_classifier"), adapted(inlay, method, "bert_classifier")
    give_values(other, seed=9)
    state = inlay.get_peft_model_state_dict(other)
    assert set(state) == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}
    gathered = inlay.get_peft_model_state_dict(one, state_dict=other.state_dict())
    assert all(torch.equal(gathered[key], value) for key, value in state.items())
    if method in COMPUTING:
        with pytest.raises(inlay.AdapterFileError, match="computed by a network"):
            inlay.set_peft_model_state_dict(one, state)
        return
    assert inlay.set_peft_model_state_dict(one, state) == ([], [])
    given = inputs("bert_classifier")
    assert torch.equal(output(one(**given)), output(other(**given)))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_switched_reported_and_deleted(method: str) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama")
    first = output(adapter(**given))
    adapter.add_adapter("second", configuration(inlay, method, "llama"))
    assert adapter.active_adapter == "default"
    adapter.set_adapter("second")
    give_values(adapter, seed=4)
    second = output(adapter(**given))
    assert not torch.allclose(first, second, atol=1e-2)
    trained = {name.split(".")[1] for name, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"second"}
    status = adapter.get_model_status()
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["second"]
    assert status.requires_grad == {"default": False, "second": True}
    assert status.trainable_params == adapter.get_nb_trainable_parameters()[0] > 0
    adapter.delete_adapter("second")
    assert adapter.active_adapter == "default" and list(adapter.prompt_encoder) == ["default"]
    assert torch.equal(output(adapter(**given)), first)
    with pytest.raises(ValueError, match="second"):
        adapter.set_adapter("second")
    adapter.delete_adapter("default")
    base = build("llama")
    assert adapter.get_base_model().config._attn_implementation == base.config._attn_implementation
    assert not adapter.prompt_encoder and len(adapter.get_base_model().state_dict()) == len(base.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_are_models_of_their_own(method: str, tmp_path: Path) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama")
    wanted = output(adapter(**given))
    twin = copy.deepcopy(adapter)
    buffer = io.BytesIO()
    torch.save(adapter, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for other in (twin, pickled):
        assert torch.equal(output(other(**given)), wanted)
        give_values(other, seed=6)
        assert not torch.allclose(output(other(**given)), wanted, atol=1e-2)
    adapter.delete_adapter("default")
    assert twin.get_base_model().config._attn_implementation != "sdpa" or method not in PREFIXES
    assert torch.equal(output(twin(**given)), output(pickled(**given)))


def test_a_pickled_prefix_works_in_a_new_process(tmp_path: Path) -> None:
    adapter, given = adapted(inlay, "prefix", "llama"), inputs("llama")
    torch.save((adapter, given), tmp_path / "model.pt")
    program = "import torch, sys; m, g = torch.load(sys.argv[1], weights_only=False); torch.save(m(**g).logits, sys.argv[2])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, tmp_path / "model.pt", tmp_path / "y.pt"], check=True
    )
    assert torch.equal(torch.load(tmp_path / "y.pt"), output(adapter(**given)))


def test_another_attention_implementation_may_be_chosen_later() -> None:
    adapter, given = adapted(inlay, "prefix", "llama"), inputs("llama")
    wanted = output(adapter(**given))
    adapter.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(output(adapter(**given)), wanted, atol=2e-5, rtol=1e-4)
    adapter.delete_adapter("default")
    assert adapter.get_base_model().config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_bases_keep_a_prompt_in_full_precision(method: str, dtype: torch.dtype) -> None:
    base, given = build("llama").to(dtype), inputs("llama", labels=True)
    adapter = inlay.get_peft_model(base, configuration(inlay, method, "llama"))
    assert {p.dtype for p in adapter.prompt_encoder.parameters()} == {torch.float32}
    result = adapter(**given)
    assert result.logits.dtype == dtype
    result.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.prompt_encoder.parameters())
    own = inlay.get_peft_model(
        build("llama").to(dtype), configuration(inlay, method, "llama"), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in own.prompt_encoder.parameters()} == {dtype}


@pytest.mark.parametrize("method", COMPUTING)
def test_a_computed_prompt_is_kept_in_evaluation_until_it_changes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama")
    encoder, calls = adapter.prompt_encoder["default"], []
    forward = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, x: (calls.append(1), forward(self, x))[1])
    with torch.no_grad():
        first = [output(adapter(**given)) for _ in range(3)][-1]
        assert len(calls) == 1
        next(encoder.parameters()).add_(1.0)
        assert not torch.equal(output(adapter(**given)), first)
        assert len(calls) == 2


# ---------------------------------------------------------------------- where it starts


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = {"[UNK]": 0, **{f"w{n}": n for n in range(1, VOCABULARY)}}
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rows"), [("w5 w6", [5, 6, 5, 6, 5]), ("w1 w2 w3 w4 w5 w6", [1, 2, 3, 4, 5])]
)
def test_a_prompt_starts_from_a_text(tokenizer: Path, text: str, rows: list[int]) -> None:
    settings = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": str(tokenizer),
        "num_virtual_tokens": 5,
    }
    adapter = inlay.get_peft_model(build("llama"), configuration(inlay, "prompt-tuning", "llama", **settings))
    started, words = adapter.prompt_encoder["default"].embedding.weight, adapter.get_input_embeddings().weight
    assert torch.equal(started, words[rows])


def test_a_prompt_starts_from_words_of_the_vocabulary() -> None:
    adapter = inlay.get_peft_model(
        build("llama"), configuration(inlay, "prompt-tuning", "llama", prompt_tuning_init="SAMPLE_VOCAB")
    )
    started, words = (
        adapter.prompt_encoder["default"].embedding.weight,
        adapter.get_base_model().get_input_embeddings().weight,
    )
    assert all((row == words).all(dim=1).any() for row in started)
    assert started.requires_grad and not words.requires_grad


def test_a_text_of_another_models_tokenizer_is_refused(tokenizer: Path) -> None:
    config = inlay.PromptTuningConfig(
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="w39",
        tokenizer_name_or_path=str(tokenizer),
    )
    base = build("llama")
    base.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="belongs to another model"):
        inlay.get_peft_model(base, config)
    assert all(p.requires_grad for p in base.parameters())


# ---------------------------------------------------------------------- what is refused

REFUSED: list[tuple[str, Any, str]] = [
    ("PromptTuningConfig", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
    ("PromptTuningConfig", {"num_virtual_tokens": None}, "num_virtual_tokens=None"),
    ("PrefixTuningConfig", {"num_virtual_tokens": -1}, "num_virtual_tokens=-1"),
    ("PromptTuningConfig", {"token_dim": 5}, "token_dim=5"),
    ("PromptEncoderConfig", {"token_dim": 5}, "token_dim=5"),
    ("PrefixTuningConfig", {"token_dim": 16}, "token_dim=16"),
    ("PrefixTuningConfig", {"num_layers": 2}, "num_layers=2"),
    ("PrefixTuningConfig", {"num_attention_heads": 4}, "num_attention_heads=4"),
]


@pytest.mark.parametrize(("config", "fields", "message"), REFUSED)
def test_what_does_not_fit_the_model_is_refused(config: str, fields: dict[str, Any], message: str) -> None:
    base = build("llama")
    with pytest.raises(ValueError, match=message):
        inlay.get_peft_model(base, getattr(inlay, config)(**({"num_virtual_tokens": 2} | fields)))
    assert all(p.requires_grad for p in base.parameters())
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("PromptTuningConfig", {"prompt_tuning_init": "WORDS"}),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}),
        ("PromptTuningConfig", {"tokenizer_kwargs": {"use_fast": True}}),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}),
        ("PrefixTuningConfig", {"init_weights": "ones"}),
    ],
)
def test_configurations_that_cannot_be_are_refused(config: str, fields: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=next(reversed(fields))
        .removesuffix("_text")
        .replace("tokenizer_name_or_path", "prompt_tuning_init"),
    ):
        getattr(inlay, config)(num_virtual_tokens=2, **fields)


SCORED_OTHERWISE: list[tuple[Any, str]] = [
    (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)), "BloomAttention"),
    (lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)), "FalconAttention"),
    (lambda: tf.GPTNeoForCausalLM(tf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])), "GPTNeoAttention"),
]  # fmt: skip
"""Models whose attention does not score keys by queries and a mask alone: ALiBi, windows of their own."""


@pytest.mark.parametrize("method", METHODS)
def test_models_that_cannot_take_a_prompt_say_so(method: str) -> None:
    config = configuration(inlay, method, "llama", task_type=None)
    with pytest.raises(ValueError, match="Sequential is not a transformers model"):
        inlay.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    with pytest.raises(ValueError, match="cannot be injected"):
        inlay.inject_adapter_in_model(config, build("llama"))
    if method in PREFIXES:
        for base, name in SCORED_OTHERWISE:
            with pytest.raises(ValueError, match=f"{name} takes it neither"):
                inlay.get_peft_model(base(), config)
        for model, other in itertools.product(("llama", "falcon"), ("flex_attention", "flash_attention_2")):
            base = build(model)
            base.config._attn_implementation = other
            with pytest.raises(ValueError, match=f'{other}.*attn_implementation="sdpa"'):
                inlay.get_peft_model(base, config)
            assert not any("inlay" in key for module in base.modules() for key in vars(module))
    else:
        with pytest.raises(ValueError, match="has no word embedding"):
            inlay.get_peft_model(build("vit"), config)


def test_merging_a_prompt_is_refused() -> None:
    adapter = adapted(inlay, "prefix", "llama")
    for merge in (adapter.merge_adapter, adapter.merge_and_unload):
        with pytest.raises(ValueError, match=r"\['default'\] act on the model's inputs"):
            merge()
    adapter(**inputs("llama"))


def test_calls_that_a_prompt_cannot_serve_say_so() -> None:
    adapter = adapted(inlay, "prompt-tuning", "llama")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        adapter(attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        adapter(**inputs("llama"), attention_mask=torch.ones(2, 1, 7, 7))
    with adapter.disable_adapter(), pytest.raises(ValueError, match="no prompt adapter is active"):
        adapter.get_prompt(1)


def test_a_file_of_another_model_changes_nothing(tmp_path: Path) -> None:
    adapted(inlay, "prefix", "gpt2").save_pretrained(tmp_path)
    base = build("llama")
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        inlay.PeftModel.from_pretrained(base, tmp_path)
    assert base.config._attn_implementation == "sdpa" and all(p.requires_grad for p in base.parameters())
    adapted(inlay, "p-tuning", "llama").save_pretrained(tmp_path)
    other = adapted(inlay, "p-tuning", "llama", encoder_hidden_size=8)
    before = load_file(tmp_path / STATE_NAME)["mlp_head.0.weight"].shape
    with pytest.raises(inlay.AdapterFileError, match="does not fit adapter 'default'"):
        other.load_adapter(tmp_path, "default")
    assert other.prompt_encoder["default"].mlp_head[0].weight.shape != before


@pytest.mark.parametrize(
    ("method", "modes"),
    [
        ("prefix", ["prefix_tuning", "PTuning2", "prefixtuning"]),
        ("p-tuning", ["p_tuning"]),
        ("prompt-tuning", ["prompt_tuning"]),
    ],
)
def test_prompts_are_a_mode_of_freezing(method: str, modes: list[str]) -> None:
    adapter = adapted(inlay, method, "bert_classifier")
    wanted = {n for n, _ in adapter.named_parameters() if n.startswith("prompt_encoder")}
    for mode in modes:
        adapter.requires_grad_(True)
        assert set(inlay.freeze_delta(adapter, mode).trainable) == wanted


def test_a_generation_without_a_cache_leaves_other_threads_alone() -> None:
    adapter, given = adapted(inlay, "prompt-tuning", "llama"), inputs("llama")
    wanted, found = output(adapter(**given)), []
    inner = adapter.get_base_model().model.forward

    def between(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and not found:
            other = threading.Thread(target=lambda: found.append(output(adapter(**given))))
            other.start()
            other.join()
        return inner(*args, **kwargs)

    adapter.get_base_model().model.forward = between
    adapter.generate(**given, max_new_tokens=1, use_cache=False, do_sample=False)
    torch.testing.assert_close(found[0], wanted)


def test_the_auto_class_loads_a_prompt_and_its_base(tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    adapter = inlay.get_peft_model(
        tf.LlamaForCausalLM.from_pretrained(tmp_path / "base"), configuration(inlay, "prefix", "llama")
    ).eval()
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.get_base_model().save_pretrained(tmp_path / "again")
    assert "inlay" not in (tmp_path / "again" / "config.json").read_text()
    loaded = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(output(loaded(**inputs("llama"))), output(adapter(**inputs("llama"))))


@pytest.mark.parametrize("method", METHODS)
def test_loading_without_initialising_and_from_a_pickle(method: str, tmp_path: Path) -> None:
    adapter, given = adapted(inlay, method, "bert_classifier"), inputs("bert_classifier")
    adapter.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    for trainable in (False, True):
        loaded = inlay.PeftModel.from_pretrained(
            build("bert_classifier"), tmp_path, is_trainable=trainable, low_cpu_mem_usage=True
        )
        torch.testing.assert_close(output(loaded(**given)), output(adapter(**given)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix"])
def test_samples_of_a_batch_have_a_prompt_lora_or_neither(method: str) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama", batch=3)
    adapter.add_adapter("lora", inlay.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    mixed = output(adapter(**given, adapter_names=["lora", "default", "__base__"]))
    alone = [output(adapter(**given))[1]]
    adapter.set_adapter("lora")
    alone.insert(0, output(adapter(**given))[0])
    with adapter.disable_adapter():
        alone.append(output(adapter(**given))[2])
    for row, y in zip(mixed, alone, strict=True):
        torch.testing.assert_close(row[-len(y) :], y, atol=2e-5, rtol=1e-4)


def test_a_third_party_adds_a_method_without_touching_the_library() -> None:
    from inlay.methods.prompt_tuning import PromptTuning, PromptTuningConfig

    class Doubled(PromptTuning, name="DOUBLED"):
        config = PromptTuningConfig

        def tokens(self, encoder: Any, config: Any) -> Any:
            return 2 * super().tokens(encoder, config)

    try:
        assert issubclass(Doubled, InputMethod)
        plain = adapted(inlay, "prompt-tuning", "llama")
        doubled = adapted(inlay, "prompt-tuning", "llama", peft_type="DOUBLED")
        with torch.no_grad():
            plain.prompt_encoder["default"].embedding.weight.mul_(2)
        assert torch.equal(output(plain(**inputs("llama"))), output(doubled(**inputs("llama"))))
        assert doubled.get_prompt(1).shape == (1, TOKENS, 16)
    finally:
        del REGISTERED["DOUBLED"]
