"""Files go both ways: what either library saves, the other loads, with the same bits and the same results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import inlay
from peft_cross.conftest import Pair
from peft_cross.cross_cases import BY_NAME, CrossCase, parameters_of, without_double_merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def configuration(folder: Path, case: CrossCase) -> dict[str, Any]:
    """Return what must be equal in saved configurations.

    PEFT writes its sets in the order of their hashes, spells "all-linear" out by the shortest endings from twenty layers on, and
    names modules that are tied to one another by their paths too.
    """
    values = json.loads((folder / CONFIG).read_text())
    if case.settings.get("target_modules") == "all-linear":
        del values["target_modules"]
    for name in {"target_modules", "exclude_modules", "target_parameters"} & values.keys():
        if isinstance(values[name], list):
            values[name] = sorted(values[name])
    if case.name == "tied_modules_to_save":
        values["modules_to_save"] = sorted({path.rsplit(".", 1)[-1] for path in values["modules_to_save"]})
    if case.config == "TrainableTokensConfig" and isinstance(values["target_modules"], str):
        values["target_modules"] = [values["target_modules"]]
    return values


def test_both_write_the_same_files(pair: Pair, tmp_path: Path) -> None:
    case, mine, theirs = pair
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }
    got, wanted = (
        load_file(tmp_path / "mine" / WEIGHTS),
        load_file(tmp_path / "theirs" / WEIGHTS),
    )
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
    assert configuration(tmp_path / "mine", case) == configuration(tmp_path / "theirs", case)
    for side in ("mine", "theirs"):
        with safe_open(tmp_path / side / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_inlay_loads_what_peft_saves(pair: Pair, tmp_path: Path) -> None:
    case, _, theirs = pair
    theirs.save_pretrained(tmp_path)
    mine = inlay.PeftModel.from_pretrained(case.base(), tmp_path)
    assert_same_values(mine, theirs)
    assert torch.allclose(case.run(mine), case.run(theirs), rtol=1e-4, atol=1e-5)
    assert type(mine).__name__ == type(theirs).__name__


def test_peft_loads_what_inlay_saves(pair: Pair, tmp_path: Path) -> None:
    case, mine, _ = pair
    mine.save_pretrained(tmp_path)
    theirs = without_double_merge(peft.PeftModel.from_pretrained(case.base(), tmp_path))
    assert_same_values(mine, theirs)
    assert torch.allclose(case.run(mine), case.run(theirs), rtol=1e-4, atol=1e-5)


def test_states_are_set_alike(pair: Pair) -> None:
    case, mine, theirs = pair
    state = peft.get_peft_model_state_dict(theirs)
    fresh, wanted = case.adapted(inlay), case.adapted(peft)
    result = inlay.set_peft_model_state_dict(fresh, state)
    assert (
        list(result.unexpected_keys)
        == list(peft.set_peft_model_state_dict(wanted, state).unexpected_keys)
        == []
    )
    assert_same_values(fresh, wanted)
    assert torch.allclose(case.run(fresh), case.run(mine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "dora", "embedding", "head_sequence", "tokens_tied"])
def test_pickles_of_weights_go_both_ways(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    mine, theirs = case.pair()
    for library, model, other in ((inlay, mine, peft), (peft, theirs, inlay)):
        folder = tmp_path / library.__name__
        model.save_pretrained(folder, safe_serialization=False)
        assert not (folder / WEIGHTS).exists()
        assert torch.equal(
            case.run(other.PeftModel.from_pretrained(case.base(), folder)),
            case.run(theirs if other is peft else mine),
        )


@pytest.mark.parametrize("task", ["CausalLM", "SequenceClassification"])
def test_auto_classes_find_the_base_model(task: str, tmp_path: Path) -> None:
    case = BY_NAME[{"CausalLM": "llama", "SequenceClassification": "head_sequence"}[task]]
    case.base().save_pretrained(tmp_path / "base")
    import transformers

    base = getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path / "base")
    model = inlay.get_peft_model(base, case.configuration(inlay)).eval()
    model.save_pretrained(tmp_path / "adapter")
    for library in (inlay, peft):
        loaded = getattr(library, f"AutoPeftModelFor{task}").from_pretrained(tmp_path / "adapter")
        assert torch.allclose(case.run(loaded.eval()), case.run(model), atol=1e-5)


def test_several_adapters_go_both_ways(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    for library, other in ((inlay, peft), (peft, inlay)):
        folder = tmp_path / library.__name__
        model = case.adapted(library)
        model.add_adapter(
            "second",
            library.LoraConfig(
                r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        )
        model.set_adapter("second")
        model.save_pretrained(folder)
        assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, "README.md", "second"])
        loaded = other.PeftModel.from_pretrained(case.base(), folder)
        loaded.load_adapter(folder / "second" if other is inlay else str(folder / "second"), "renamed")
        loaded.set_adapter("renamed")
        assert torch.allclose(case.run(loaded), case.run(model), atol=1e-5)


def assert_same_values(mine: Any, theirs: Any) -> None:
    left, right = parameters_of(mine), parameters_of(theirs)
    assert left.keys() == right.keys()
    for key, value in right.items():
        assert torch.equal(left[key], value), key


def test_experts_that_peft_finds_by_itself(tmp_path: Path) -> None:
    """PEFT turns "all-linear" on fused experts into parameters with patterns for rank and scale, and saves those."""
    case = CrossCase(
        "experts_all_linear",
        "mixtral",
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False},
    )
    theirs = case.adapted(peft)
    theirs.save_pretrained(tmp_path)
    mine = inlay.PeftModel.from_pretrained(case.base(), tmp_path)
    assert_same_values(mine, theirs)
    assert torch.allclose(case.run(mine), case.run(theirs), rtol=1e-4, atol=1e-5)
