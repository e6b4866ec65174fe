"""Prompt methods: however a model is run, its prompt has the same effect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.methods.prefix_tuning import PrefixTuning
from inlay.prompts.attention import goes_through_interface
from inlay.switch import BASE
from prompt_models import (
    BUILDERS,
    CAUSAL,
    METHODS,
    PREFIXES,
    TOKENS,
    VOCABULARY,
    adapted,
    build,
    configuration,
    give_values,
    inputs,
    longer,
    output,
)

PAIRS = [(method, model) for method in METHODS for model in BUILDERS if model != "vit" or method in PREFIXES]
SOME = [(method, model) for method, model in PAIRS if method in ("prompt-tuning", "prefix-projection")]
GENERATING = [(method, model) for method, model in SOME if model in (*CAUSAL, "t5", "bart")]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.functional.scaled_dot_product_attention`")


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_the_prompt_changes_the_output_and_off_is_the_base_bit_for_bit(method: str, model: str) -> None:
    adapter, base, given = adapted(inlay, method, model), build(model).requires_grad_(False), inputs(model)
    y, wanted = output(adapter(**given)), output(base(**given))
    if more := longer(model, method):
        assert y.shape[1] == wanted.shape[1] + more
        y = y[:, more:]
    assert not torch.allclose(y, wanted, atol=1e-2)
    with adapter.disable_adapter():
        assert torch.equal(output(adapter(**given)), wanted)
    attention = base.config._attn_implementation
    through_interface = any(map(goes_through_interface, base.modules()))
    assert (adapter.get_base_model().config._attn_implementation != attention) == (
        method in PREFIXES and model not in ("t5",) and through_interface
    )
    bare = adapter.unload()
    assert torch.equal(output(bare(**given)), wanted)
    assert bare.config._attn_implementation == attention
    assert not any("inlay" in key for module in bare.modules() for key in vars(module))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.modules())


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize(("method", "model"), SOME)
def test_sdpa_computes_what_eager_attention_does(method: str, model: str, padding: str) -> None:
    given = inputs(model, padding=padding)
    ys = [output(adapted(inlay, method, model, attention)(**given)) for attention in ("sdpa", "eager")]
    if (
        padding and ys[0].dim() == 3 and model not in ("t5", "bart")
    ):  # what padding computes is nobody's business
        seen = torch.cat([torch.ones(2, longer(model, method)), given["attention_mask"]], 1).bool()
        ys = [y[seen] for y in ys]
    close(*ys)


@pytest.mark.parametrize("model", CAUSAL)
@pytest.mark.parametrize("method", METHODS)
def test_steps_with_a_cache_compute_what_one_pass_does(method: str, model: str) -> None:
    adapter, ids = adapted(inlay, method, model), inputs(model)["input_ids"]
    whole = adapter(input_ids=ids).logits
    mask = torch.ones_like(ids)
    first = adapter(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for step in range(4, ids.shape[1]):
        next_ = adapter(
            input_ids=ids[:, step : step + 1],
            attention_mask=mask[:, : step + 1],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(next_.logits)
    close(torch.cat(parts, dim=1), whole)
    if method in PREFIXES and model != "mistral":
        assert cache.get_seq_length() == ids.shape[1]  # the prefix is not in it


@pytest.mark.parametrize(
    "how", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["no cache", "static"]
)
@pytest.mark.parametrize(("method", "model"), GENERATING)
def test_every_cache_generates_the_same(method: str, model: str, how: dict[str, Any]) -> None:
    adapter, ids = adapted(inlay, method, model), inputs(model)["input_ids"]
    asked: dict[str, Any] = {
        "max_new_tokens": 7,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    for search in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        torch.manual_seed(0)
        wanted = adapter.generate(input_ids=ids, **asked, **search)
        torch.manual_seed(0)
        assert torch.equal(adapter.generate(input_ids=ids, **asked, **search, **how), wanted)


@pytest.mark.parametrize(("method", "model"), [p for p in GENERATING if p[1] in CAUSAL])
def test_greedy_text_is_that_of_whole_forward_passes(method: str, model: str) -> None:
    adapter, ids = adapted(inlay, method, model), inputs(model)["input_ids"]
    wanted = ids
    for _ in range(6):
        wanted = torch.cat([wanted, adapter(input_ids=wanted).logits[:, -1:].argmax(-1)], dim=1)
    asked: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    mask, never = torch.ones_like(ids), VOCABULARY  # an end that cannot come; None would be the model's own
    settings = tf.GenerationConfig(max_length=13, do_sample=False, pad_token_id=0, eos_token_id=never)
    assert torch.equal(adapter.generate(ids, attention_mask=mask, max_new_tokens=6, **asked), wanted)
    assert torch.equal(adapter.generate(input_ids=ids, attention_mask=mask, max_length=13, **asked), wanted)
    assert torch.equal(adapter.generate(inputs=ids, attention_mask=mask, generation_config=settings), wanted)
    assert settings.max_length == 13  # the user's own object is as it was
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(adapter.generate(padded, max_new_tokens=6, **asked)[:, 3:], wanted)


@pytest.mark.parametrize(
    ("method", "model"),
    [p for p in SOME if p[1] not in ("vit", "t5", "bart", "llama_classifier", "bert_answerer")],
)
def test_padding_on_the_right_changes_nothing(method: str, model: str) -> None:
    adapter, given = adapted(inlay, method, model), inputs(model, padding="right")
    alone = output(adapter(input_ids=given["input_ids"][:1, :-2]))[0]
    close(output(adapter(**given))[0][: len(alone)], alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_padding_on_the_left_changes_nothing_where_positions_say_so(method: str, model: str) -> None:
    adapter, given = adapted(inlay, method, model), inputs(model, padding="left")
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = adapter(input_ids=given["input_ids"][:1, 2:]).logits[0, -5:]
    close(adapter(**given, position_ids=positions).logits[0, -5:], alone)


@pytest.mark.parametrize(
    "model", ["gpt2", "llama", "bert_classifier", "roberta_classifier", "bert_tagger", "t5", "vit"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_computes_what_each_sample_computes_alone(method: str, model: str) -> None:
    if model == "vit" and method not in PREFIXES:
        return
    adapter = adapted(inlay, method, model)
    adapter.add_adapter("longer", configuration(inlay, method, model, num_virtual_tokens=5))
    adapter.set_adapter("longer")
    give_values(adapter, seed=3)
    names = ["longer", "default", BASE, "default"]
    given = inputs(model, batch=4)
    mixed = output(adapter(**given, adapter_names=names))
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in given.items()}
        if name == BASE:
            with adapter.disable_adapter():
                alone = output(adapter(**own))[0]
        else:
            adapter.set_adapter(name)
            alone = output(adapter(**own))[0]
        # Virtual tokens that only fill up are on the left where text is read from left to right, else on the right.
        part = (
            mixed[row]
            if alone.dim() < 2
            else mixed[row][-len(alone) :]
            if model in CAUSAL
            else mixed[row][: len(alone)]
        )
        close(part, alone)


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix"])
def test_a_mixed_batch_generates_what_each_sample_generates_alone(method: str, model: str) -> None:
    adapter = adapted(inlay, method, model)
    adapter.add_adapter("longer", configuration(inlay, method, model, num_virtual_tokens=5))
    adapter.set_adapter("longer")
    give_values(adapter, seed=3)
    ids = inputs(model, batch=3)["input_ids"]
    for search in ({"num_beams": 1}, {"num_beams": 2}):
        asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **search}
        mixed = adapter.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=["longer", "default", BASE],
            **asked,
        )
        for row, name in enumerate(["longer", "default"]):
            adapter.set_adapter(name)
            own = ids[row : row + 1]
            assert torch.equal(
                mixed[row], adapter.generate(input_ids=own, attention_mask=torch.ones_like(own), **asked)[0]
            )


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix"])
def test_two_prompts_that_are_on_stand_in_front_one_after_the_other(method: str) -> None:
    adapter = adapted(inlay, method, "llama")
    adapter.add_adapter("second", configuration(inlay, method, "llama", num_virtual_tokens=2))
    adapter.set_adapter("second")
    give_values(adapter, seed=5)
    adapter.set_adapter(["default", "second"])
    whole = inlay.get_peft_model(
        build("llama"), configuration(inlay, method, "llama", num_virtual_tokens=TOKENS + 2)
    ).eval()
    with torch.no_grad():
        parts = [adapter.prompt_encoder[name].embedding.weight for name in ("default", "second")]
        whole.prompt_encoder["default"].embedding.weight.copy_(torch.cat(parts))
    close(output(adapter(**inputs("llama"))), output(whole(**inputs("llama"))))


def test_a_prompt_a_prefix_and_lora_work_at_the_same_time() -> None:
    adapter = adapted(inlay, "prompt-tuning", "llama")
    adapter.add_adapter("prefix", configuration(inlay, "prefix", "llama"))
    adapter.add_adapter("lora", inlay.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    given = inputs("llama")
    alone = {}
    for name in ("default", "prefix", "lora"):
        adapter.set_adapter(name)
        give_values(adapter, seed=2)
        alone[name] = output(adapter(**given))[:, -7:]
    adapter.set_adapter(["default", "prefix", "lora"])
    together = output(adapter(**given))
    assert together.shape[1] == 7 + TOKENS
    assert all(not torch.allclose(together[:, -7:], y, atol=1e-2) for y in alone.values())
    assert {n.split(".")[0] for n, p in adapter.named_parameters() if p.requires_grad} == {
        "prompt_encoder",
        "base_model",
    }
    # The same by hand: LoRA merged, the embedded prompt passed in.
    by_hand = copy.deepcopy(adapter)
    by_hand.merge_adapter(["lora"])
    by_hand.set_adapter("prefix")
    embedded = by_hand.get_base_model().get_input_embeddings()(given["input_ids"])
    embedded = torch.cat(
        [adapter.prompt_encoder["default"].embedding.weight.expand(2, -1, -1), embedded], dim=1
    )
    with pytest.raises(ValueError, match=r"act on the model's inputs"):
        adapter.merge_adapter()
    weights = by_hand.get_base_model().model.layers[0].self_attn.q_proj
    assert weights.merged_adapters == ["lora"]
    with by_hand.base_model.switch.within(active=("prefix", "lora")):
        close(by_hand(inputs_embeds=embedded).logits, together)


@pytest.mark.parametrize("method", METHODS)
def test_question_places_and_labels_move_with_the_input(method: str) -> None:
    answerer, given = adapted(inlay, method, "bert_answerer"), inputs("bert_answerer", labels=True)
    moved = longer("bert_answerer", method)
    result = answerer(**given)
    wanted = nn.functional.cross_entropy(result.start_logits, given["start_positions"] + moved)
    wanted = (wanted + nn.functional.cross_entropy(result.end_logits, given["end_positions"] + moved)) / 2
    close(result.loss, wanted)
    tagger, given = adapted(inlay, method, "bert_tagger"), inputs("bert_tagger", labels=True)
    result = tagger(**given)
    own = result.logits[:, longer("bert_tagger", method) :]
    close(result.loss, nn.functional.cross_entropy(own.flatten(0, 1), given["labels"].flatten()))


def test_token_types_and_embedded_inputs_are_taken() -> None:
    adapter, given = adapted(inlay, "prompt-tuning", "bert"), inputs("bert")
    kinds = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    y = output(adapter(**given, token_type_ids=kinds))
    assert not torch.allclose(y, output(adapter(**given)), atol=1e-3)
    words = adapter.get_base_model().get_input_embeddings()(given["input_ids"])
    close(output(adapter(inputs_embeds=words, token_type_ids=kinds)), y)
    close(output(adapter(given["input_ids"], None, kinds)), y)  # by position


def test_without_a_task_the_model_says_what_it_is() -> None:
    for model, submodules in (("llama", 1), ("t5", 2), ("bert", 1)):
        config = inlay.PromptTuningConfig(num_virtual_tokens=2)
        adapter = inlay.get_peft_model(build(model), config)
        assert adapter.peft_config["default"].num_transformer_submodules == submodules
        adapter(**inputs(model))
    assert config.token_dim is None  # what the user passed is not written to


@pytest.mark.parametrize("case", ["prefix_tuning"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_the_shift_it_is_adapterhubs_prefix_tuning(shared: Any, family: str, case: str) -> None:
    class Unshifted(PrefixTuning):
        def shift(self, config: Any) -> int:
            return 0

    folder = shared / "goldens" / "adapterhub" / family
    cls = {"bert": tf.BertForMaskedLM, "gpt2": tf.GPT2LMHeadModel}[family]
    base = cls(cls.config_class.from_json_file(folder / "base" / "config.json")).eval()
    base.load_state_dict(load_file(folder / "base" / "state_dict.safetensors"), strict=False)
    base.tie_weights()
    adapter = inlay.get_peft_model(
        base, inlay.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16)
    )
    state = load_file(folder / case / "full_state_dict.safetensors")
    own = {"embedding.weight": "wte.weight"} | {
        f"transform.{k}": f"control_trans.{k}" for k in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    values = {
        mine: next(v for k, v in state.items() if k.endswith(f".{theirs}")) for mine, theirs in own.items()
    }
    adapter.prompt_encoder["default"].load_state_dict(values)
    adapter.base_model.prompts.methods["default"] = Unshifted()
    given, wanted = (
        load_file(folder / "inputs.safetensors"),
        load_file(folder / case / "expected.safetensors"),
    )
    adapter.eval()
    for kind in ("full", "padded"):
        mask = given[f"{kind}.attention_mask"]
        y = adapter(input_ids=given[f"{kind}.input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(
            y[mask.bool()], wanted[f"{kind}.logits"][mask.bool()], atol=5e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    "keys",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
    ids=["one key head", "as many as heads", "two, repeated"],
)
def test_steps_of_a_falcon_compute_what_one_pass_does(keys: dict[str, Any]) -> None:
    base = tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, **keys)
    )
    adapter = inlay.get_peft_model(base, configuration(inlay, "prefix", "falcon")).eval()
    give_values(adapter)
    ids = inputs("falcon")["input_ids"]
    whole = adapter(input_ids=ids).logits
    with adapter.disable_adapter():
        assert not torch.allclose(adapter(input_ids=ids).logits, whole, atol=1e-3)
    first = adapter(input_ids=ids[:, :4], use_cache=True)
    second = adapter(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, second.logits], dim=1), whole)


def test_positions_of_virtual_keys_count_in_t5_only_where_they_are_asked_for() -> None:
    def turned(shift: bool) -> tuple[Tensor, Tensor]:
        adapter, given = adapted(inlay, "prefix", "t5", shift_positions=shift), inputs("t5")
        before = output(adapter(**given))
        weight = adapter.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            weight.copy_(weight.flip(0))
        return before, output(adapter(**given))

    close(*turned(shift=False))  # keys without a place have no order
    one, other = turned(shift=True)
    assert not torch.allclose(one, other, atol=1e-3)


def test_attention_that_never_asks_for_keys_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapted(inlay, "prefix", "gptj")
    attention = type(adapter.get_base_model().transformer.h[0].attn)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(RuntimeError, match="GPTJAttention did not ask its cache for keys"):
        adapter(**inputs("gptj"))
    with adapter.disable_adapter():
        adapter(**inputs("gptj"))


def test_the_count_of_p_tuning_v2_on_the_shape_of_glm2_6b() -> None:
    with torch.device("meta"):
        base = tf.GlmForCausalLM(
            tf.GlmConfig(hidden_size=4096, num_hidden_layers=28, num_attention_heads=32, num_key_value_heads=2, head_dim=128, intermediate_size=13696, vocab_size=65024, pad_token_id=0)
        )  # fmt: skip
    adapter = inlay.get_peft_model(
        base, inlay.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=128)
    )
    assert adapter.get_nb_trainable_parameters()[0] == 1_835_008


@pytest.mark.parametrize("model", ["gpt2", "opt", "bert_classifier", "roberta_classifier", "bart"])
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-projection"])
def test_inputs_too_long_for_the_learnt_positions_are_refused_before_anything_runs(
    method: str, model: str
) -> None:
    adapter, given = adapted(inlay, method, model), inputs(model)
    room = {"gpt2": 48, "opt": 64, "bert_classifier": 32, "roberta_classifier": 33, "bart": 48}[model]
    ids = given["input_ids"]
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model == "bart" else {})
    name = "decoder_input_ids" if model == "bart" and method in PREFIXES else "input_ids"
    fits = given | {name: ids[:, :1].repeat(1, room - TOKENS)}
    adapter(**fits)
    too_long = fits | {name: ids[:, :1].repeat(1, room - TOKENS + 1)}
    with pytest.raises(ValueError, match=f"need {room + 1} positions.*cut inputs to {room - TOKENS} tokens"):
        adapter(**too_long)
    adapter(**fits)
