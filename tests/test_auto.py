"""``AutoPeftModelFor*`` and what ``get_peft_model`` records for it. Hub repositories are in ``test_hub``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf

import inlay
from tiny_models import VOCABULARY, output_of, tiny, tiny_inputs

KINDS = {
    "gpt2": ("CAUSAL_LM", "ForCausalLM"),
    "t5": ("SEQ_2_SEQ_LM", "ForSeq2SeqLM"),
    "bert_classifier": ("SEQ_CLS", "ForSequenceClassification"),
    "bert_tagger": ("TOKEN_CLS", "ForTokenClassification"),
    "bert_answerer": ("QUESTION_ANS", "ForQuestionAnswering"),
    "bert": ("FEATURE_EXTRACTION", "ForFeatureExtraction"),
}


def trained(name: str, folder: Path, task: str | None = None, **changes: Any) -> Any:
    """Save a base model and an adapter for it, and return the model that has both."""
    tiny(name).save_pretrained(folder / "base")
    base = type(tiny(name)).from_pretrained(folder / "base")
    config = inlay.LoraConfig(task_type=task, init_lora_weights=False, **changes)
    model = inlay.get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    model.save_pretrained(folder / "adapter")
    return model


def equal_outputs(one: Any, other: Any, name: str) -> bool:
    with torch.no_grad():
        return torch.equal(output_of(one, tiny_inputs(name)), output_of(other, tiny_inputs(name)))


@pytest.mark.parametrize("name", KINDS)
def test_each_task_has_its_class(name: str, tmp_path: Path) -> None:
    task, ending = KINDS[name]
    model = trained(name, tmp_path, task)
    loaded = getattr(inlay, f"AutoPeftModel{ending}").from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model) is getattr(inlay, f"PeftModel{ending}")
    assert type(loaded.get_base_model()) is type(model.get_base_model())
    assert equal_outputs(model, loaded, name)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_the_general_class_finds_the_right_one(task: str | None, tmp_path: Path) -> None:
    saved = None if task else ["classifier"]
    model = trained("bert_classifier", tmp_path, task, target_modules=["query"], modules_to_save=saved)
    loaded = inlay.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model)
    assert isinstance(loaded.get_base_model(), tf.BertForSequenceClassification)
    assert equal_outputs(model, loaded, "bert_classifier")


def test_arguments_go_where_they_belong(tmp_path: Path) -> None:
    trained("gpt2", tmp_path, "CAUSAL_LM")
    (tmp_path / "adapter").rename(tmp_path / "inner")
    loaded = inlay.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, adapter_name="mine", is_trainable=True, subfolder="inner", dtype=torch.bfloat16
    )
    assert loaded.active_adapters == ["mine"]
    weights = {n: p for n, p in loaded.named_parameters() if ".lora_" in n}
    assert weights
    assert all(p.requires_grad for p in weights.values())
    assert loaded.get_base_model().transformer.wte.weight.dtype == torch.bfloat16
    config = inlay.PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    config.lora_alpha = 0  # type: ignore[attr-defined]
    off = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path, config=config, subfolder="inner")
    assert equal_outputs(off, tiny("gpt2"), "gpt2")


def test_added_tokens_have_room(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    )
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.add_tokens(["new", "newer"])
    tiny("llama").save_pretrained(tmp_path / "base")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer))
    model = inlay.get_peft_model(
        base, inlay.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, VOCABULARY, VOCABULARY + 1]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_another_task_is_refused_by_name(tmp_path: Path) -> None:
    trained("bert_classifier", tmp_path, "SEQ_CLS")
    with pytest.raises(
        ValueError, match=r"SEQ_CLS; use AutoPeftModelForSequenceClassification instead of .*CausalLM"
    ):
        inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model_name_or_path": None}, "does not say which base model"),
        ({"auto_mapping": None}, "no task"),
        ({"auto_mapping": {"base_model_class": "Mine", "parent_library": "os"}}, "'Mine'"),
        ({"auto_mapping": {"base_model_class": "pipeline", "parent_library": "os"}}, "'pipeline'"),
    ],
)
def test_an_adapter_that_does_not_say_enough_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    trained("bert", tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        inlay.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_it_is_made_by_from_pretrained_only(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM\.from_pretrained"):
        inlay.AutoPeftModelForCausalLM()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "own", "recorded"),
    [("abc", None, "abc"), ("abc", "xyz", "abc"), (None, "xyz", "xyz"), (None, None, None)],
)
def test_the_base_models_revision_is_recorded(
    given: str | None, own: str | None, recorded: str | None, tmp_path: Path
) -> None:
    config = inlay.LoraConfig(revision=own)
    model = inlay.get_peft_model(tiny("gpt2"), config, revision=given)
    assert config.revision == own, "the given configuration is not changed"
    model.save_pretrained(tmp_path)
    assert inlay.PeftConfig.from_pretrained(tmp_path).revision == recorded
