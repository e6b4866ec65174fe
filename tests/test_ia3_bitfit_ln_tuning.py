"""(IA)3, BitFit and LayerNorm tuning: what they choose by themselves, how much they train, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from inlay import BitFitConfig, IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from inlay.kinds import Norm, kind_of
from inlay.methods.ia3 import DEFAULT_TARGETS
from tiny_models import tiny


def bert_base_chinese() -> Any:
    """Return BERT-base with the Chinese vocabulary and fifteen classes, without memory for its numbers."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=21128, num_labels=15))


def trained(model: PeftModel) -> dict[str, int]:
    """Return the number of trained parameters by the column they stand in, the head's under "head"."""
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            column = "head" if "modules_to_save" in name else name.split(".default")[0].rpartition(".")[2]
            counts[column] = counts.get(column, 0) + p.numel()
    return counts


def test_default_targets_of_ia3_are_those_of_peft() -> None:
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert DEFAULT_TARGETS.keys() == targets.keys()
    for model_type, names in targets.items():
        outputs, feedforward = DEFAULT_TARGETS[model_type]
        assert outputs | feedforward == set(names), model_type
        assert (set() if model_type == "mt5" else feedforward) == set(inputs[model_type]), model_type


@pytest.mark.parametrize(
    ("norms", "biases"), [(False, 83_712), (True, 83_712 + 25 * 768)], ids=["without_norms", "with_norms"]
)
def test_bitfit_trains_what_the_table_of_mindpet_counts(norms: bool, biases: int) -> None:
    model = get_peft_model(bert_base_chinese(), BitFitConfig(task_type="SEQ_CLS", norms=norms))
    assert trained(model) == {"bitfit_bias": biases, "head": 768 * 15 + 15}
    if not norms:
        assert model.get_nb_trainable_parameters()[0] == 95_247


def test_the_smaller_variant_of_bitfit_trains_two_biases_a_block() -> None:
    model = get_peft_model(bert_base_chinese(), BitFitConfig(task_type="SEQ_CLS", query_and_second_mlp=True))
    assert trained(model)["bitfit_bias"] == 12 * (768 + 3072)


def test_bitfit_adds_to_other_methods(tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.add_adapter("biases", BitFitConfig())
    model.set_adapter(["default", "biases"])
    ids = torch.tensor([[3, 4, 5]])
    model.eval()
    before = model(ids).last_hidden_state
    for name, p in model.named_parameters():
        if "bitfit" in name:
            nn.init.normal_(p)
    both = model(ids).last_hidden_state
    assert not torch.allclose(both, before)
    model.merge_adapter()
    assert torch.allclose(model(ids).last_hidden_state, both, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "biases" / "adapter_model.safetensors").stat().st_size < 20_000


def test_ln_tuning_finds_every_norm_and_nothing_else() -> None:
    base = tiny("llama")
    wanted = {path for path, module in base.named_modules() if isinstance(kind_of(module), Norm)}
    model = get_peft_model(base, LNTuningConfig(task_type="CAUSAL_LM"))
    assert {s.name.removeprefix("model.") for s in model.get_layer_status()} == wanted
    assert set(trained(model)) == {"weight"} or set(trained(model)) == {"ln_tuning_layers"}


def test_modules_that_share_a_norms_last_name_are_left_alone() -> None:
    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 4))
    model = get_peft_model(base, LNTuningConfig())
    assert model.peft_config["default"].target_modules == {"0.1"}


def test_names_of_the_feed_forward_must_be_targets() -> None:
    with pytest.raises(ValueError, match="subset of `target_modules`; \\['b'\\]"):
        IA3Config(target_modules=["a"], feedforward_modules=["b"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["1"]), "1 normalises"),
        (LNTuningConfig(target_modules=["0"]), "0 is none"),
        (BitFitConfig(target_modules=["2"]), "2 has no bias"),
        (LoraConfig(target_modules=["1"]), "no matrix"),
    ],
    ids=["ia3", "ln_tuning", "bitfit", "lora"],
)
def test_layers_that_do_not_suit_are_refused_and_nothing_changes(config: Any, message: str) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4))
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_parameters()] == names


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="has no bias that BitFit could train"):
        get_peft_model(tiny("llama"), BitFitConfig())
