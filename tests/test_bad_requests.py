"""Requests that cannot be met: one clear line, and the model is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import inlay
from inlay import (
    NoMatchingPeftModuleError,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from law_checks import assert_unchanged, snapshot
from small_net import Net, config

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "typo_in_all_targets": (lambda: config(target_modules=["q_porj"]), NoMatchingPeftModuleError, r"q_porj.*did you mean \[.*'q_proj'"),
    "expression_that_matches_nothing": (lambda: config(target_modules=".*k_proj"), NoMatchingPeftModuleError, "k_proj"),
    "all_excluded": (lambda: config(exclude_modules=["q_proj", "v_proj"]), NoMatchingPeftModuleError, "exclude_modules"),
    "a_module_of_no_kind": (lambda: config(target_modules=["blocks"]), ValueError, "ModuleList.*not supported.*torch.nn.Linear"),
    "rank_zero": (lambda: config(r=0), ValueError, "positive"),
    "negative_rank_in_a_pattern": (lambda: config(rank_pattern={"q_proj": -1}), ValueError, "positive|-1"),
    "dropout_above_one": (lambda: config(lora_dropout=1.5), ValueError, "1.5"),
    "unknown_bias": (lambda: config(bias="some"), NotImplementedError, "some"),
    "unknown_task": (lambda: config(task_type="CHAT"), ValueError, "CHAT"),
    "unknown_init": (lambda: config(init_lora_weights="pisa"), ValueError, "pisa"),
    "no_such_token": (lambda: config(trainable_token_indices={"embed": [10]}), ValueError, r"\[10\].*0 to 9"),
    "no_such_embedding": (lambda: config(trainable_token_indices={"embedd": [1]}), ValueError, "embedd"),
    "a_token_twice": (lambda: TrainableTokensConfig(token_indices=[1, 1], target_modules=["embed"]), ValueError, "twice"),
    "no_tokens": (lambda: TrainableTokensConfig(target_modules=["embed"]), ValueError, "none given"),
    "tokens_and_target": (lambda: config(target_modules=["embed"], trainable_token_indices={"embed": [1]}), ValueError, "embed"),
    "no_such_parameter": (lambda: config(target_modules=[], target_parameters=["blocks.0.gate"]), ValueError, "blocks.0.gate"),
    "saved_and_targeted": (lambda: config(target_modules=["head"], modules_to_save=["head"]), ValueError, "head"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_leaves_the_model_alone(case: str) -> None:
    make, error, message = WRONG[case]
    for carry_one in (False, True):
        model: Any = get_peft_model(Net(), config()) if carry_one else Net()
        before = snapshot(model)
        with pytest.raises(error, match=message) as caught:
            model.add_adapter("new", make()) if carry_one else get_peft_model(model, make())
        assert "\n" not in str(caught.value)
        assert_unchanged(before, model)


def test_a_typo_beside_a_match_is_reported() -> None:
    with pytest.warns(PeftWarning, match=r"\['v_porj'\]; did you mean \[.*'v_proj'"):
        get_peft_model(Net(), config(target_modules=["q_proj", "v_porj"]))


def test_a_module_to_save_that_is_not_there_is_reported_unless_it_is_a_usual_head() -> None:
    with pytest.warns(
        PeftWarning, match=r"modules_to_save entries \['haed'\].*not trained; did you mean \['head'\]"
    ):
        get_peft_model(Net(), config(modules_to_save=["haed", "classifier", "score"]))


@pytest.mark.parametrize(
    ("task", "cls", "message"),
    [
        (
            "CAUSAL_LM",
            tf.BertForSequenceClassification,
            "its head is not trained; with task_type='SEQ_CLS' it is",
        ),
        ("SEQ_2_SEQ_LM", tf.BertForTokenClassification, "with task_type='TOKEN_CLS' it is"),
        (
            "SEQ_CLS",
            tf.BertForMaskedLM,
            "it has no classifier or score, so no head is trained; name it in modules_to_save",
        ),
        ("QUESTION_ANS", tf.BertModel, "it has no qa_outputs"),
    ],
)
def test_a_task_that_is_not_the_models_is_reported(task: str, cls: Any, message: str) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    base = cls(tf.BertConfig(vocab_size=20, **sizes))
    with pytest.warns(PeftWarning, match=f"task_type='{task}' does not fit {cls.__name__}: .*{message}"):
        get_peft_model(base, inlay.LoraConfig(task_type=task, target_modules=["query"]))


def test_a_pattern_that_nothing_matches_is_reported() -> None:
    with pytest.warns(PeftWarning, match="k_proj"):
        get_peft_model(Net(), config(rank_pattern={"k_proj": 4}))


@pytest.mark.parametrize("name", ["a.b", "", "keys", "__base__", "default", "/elsewhere"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(), config())
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"name|exists"):
        model.add_adapter(name, config())
    if name != "default":
        with pytest.raises(ValueError, match="name"):
            model.load_adapter(tmp_path, name)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    "name", ["lora", "lora_A", "weight", "base_layer", "modules_to_save", "2", "model", "a-b c", "ä"]
)
def test_names_that_look_odd_work(name: str, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    model = get_peft_model(Net(), config(init_lora_weights=False), name).eval()
    wanted = model(ids)
    model.save_pretrained(tmp_path)
    bare = Net()
    bare.load_state_dict(
        {
            k.replace(".base_layer", "").replace(".original_module", ""): v
            for k, v in model.get_base_model().state_dict().items()
            if "lora_" not in k and f".modules_to_save.{name}." not in k
        }
    )
    loaded = PeftModel.from_pretrained(bare, tmp_path / name, name)
    assert torch.equal(loaded(ids), wanted)
    loaded.load_adapter(tmp_path / name, "plain")
    loaded.set_adapter("plain")
    assert torch.equal(loaded(ids), wanted)
    loaded.delete_adapter(name)
    assert torch.equal(loaded(ids), wanted)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(ids), wanted, atol=1e-5)


def test_unknown_adapters() -> None:
    model = get_peft_model(Net(), config())
    before = snapshot(model)
    acts: list[Callable[[], Any]] = [
        lambda: model.set_adapter("defualt"),
        lambda: model.delete_adapter("defualt"),
        lambda: model.merge_adapter(["defualt"]),
        lambda: model.merge_and_unload(adapter_names=["default", "defualt"]),
        lambda: model.save_pretrained("nowhere", selected_adapters=["defualt"]),
        lambda: model(torch.tensor([[1]]), adapter_names=["defualt"]),
        lambda: model.base_model.set_requires_grad("defualt"),
    ]
    for act in acts:
        with pytest.raises(ValueError, match="defualt"):
            act()
    assert_unchanged(before, model)
    assert not Path("nowhere").exists()


def test_adapting_twice_is_refused() -> None:
    model = get_peft_model(Net(), config())
    with pytest.raises(ValueError, match="add_adapter"):
        get_peft_model(model, config())


def test_a_merged_adapter_is_not_deleted() -> None:
    model = get_peft_model(Net(), config())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")
    assert_unchanged(before, model)


def test_injecting_what_does_not_fit_leaves_the_model_alone() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(NoMatchingPeftModuleError):
        inject_adapter_in_model(config(target_modules=["k_proj"]), model)
    assert_unchanged(before, model)
