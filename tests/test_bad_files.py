"""Files that are no good: one clear error, and the model is what it was before."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlay import (
    AdapterFileError,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from law_checks import assert_unchanged, seeded, snapshot
from small_net import Net, config

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with seeded():
        get_peft_model(Net(), config()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("a_pickle_ran_code"),))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return spoil


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def as_pickle(content: Any, save: Callable[[Any, Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        save(content, folder / "adapter_model.bin")

    return spoil


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


FIRST = "base_model.model.blocks.0.q_proj.lora_A.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "truncated": (rewrite(WEIGHTS, lambda b: b[: len(b) // 2]), AdapterFileError, "truncated"),
    "truncated_header": (rewrite(WEIGHTS, lambda b: b[:5]), AdapterFileError, "truncated"),
    "empty": (rewrite(WEIGHTS, lambda b: b""), AdapterFileError, "cannot be read"),
    "foreign": (rewrite(WEIGHTS, lambda b: b"PK\x03\x04 this is no adapter" * 30), AdapterFileError, "cannot be read"),
    "a_tensor_is_missing": (edit_tensors(lambda t: t.__delitem__(FIRST)), AdapterFileError, r"lacks 1 tensors \(base_model.model.blocks.0.q_proj.lora_A"),
    "a_tensor_is_unknown": (edit_tensors(lambda t: t.update({"stranger": torch.zeros(1)})), AdapterFileError, "has 1 tensors .stranger"),
    "another_shape": (edit_tensors(lambda t: t.update({FIRST: torch.zeros(2, 7)})), AdapterFileError, r"size mismatch.*\n.*\(2, 7\).*\(2, 6\)"),
    "another_rank": (edit_config(r=3), AdapterFileError, "size mismatch"),
    "other_targets": (edit_config(target_modules=["q_proj"]), AdapterFileError, "does not know"),
    "no_targets": (edit_config(target_modules=["k_proj"]), NoMatchingPeftModuleError, "k_proj"),
    "no_json": (rewrite(CONFIG, lambda b: b[:40]), ValueError, "not valid JSON"),
    "a_list": (rewrite(CONFIG, lambda b: b"[1]"), ValueError, "not an object"),
    "unknown_method": (edit_config(peft_type="LORRA"), ValueError, "did you mean 'LORA'"),
    "no_config": (lambda folder: (folder / CONFIG).unlink(), ValueError, "Can't find 'adapter_config.json'"),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), ValueError, "Can't find 'adapter_model.safetensors'"),
    "a_field_that_is_not_implemented": (edit_config(use_qalora=True), ValueError, "use_qalora"),
    "pickle_with_code": (as_pickle({"x": Bomb()}, torch.save), AdapterFileError, "could run code"),
    "old_pickle_with_code": (as_pickle(Bomb(), plain_pickle), AdapterFileError, "could run code|cannot be read"),
    "pickle_of_a_list": (as_pickle([torch.zeros(1)], torch.save), AdapterFileError, "dictionary of tensors"),
    "pickle_of_numbers": (as_pickle({FIRST: 3}, torch.save), AdapterFileError, "dictionary of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_leaves_a_bare_model_alone(
    spoil: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, message = SPOILT[spoil]
    change(folder)
    monkeypatch.chdir(folder.parent)
    model = Net()
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){message}"):
        PeftModel.from_pretrained(model, folder)
    assert_unchanged(before, model)
    assert not Path("a_pickle_ran_code").exists()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_leaves_an_adapted_model_alone(
    spoil: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, message = SPOILT[spoil]
    with seeded():
        model = get_peft_model(Net(), config())
        model.add_adapter("second", config(use_dora=True, r=1))
    change(folder)
    monkeypatch.chdir(folder.parent)
    before, settings = snapshot(model), dict(model.peft_config)
    with pytest.raises(error, match=f"(?s){message}"):
        model.load_adapter(folder, "third")
    assert_unchanged(before, model)
    assert model.peft_config == settings and model.active_adapters == ["default"]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_leaves_another_models_adapters_on_the_same_base_alone(
    spoil: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, message = SPOILT[spoil]
    with seeded():
        model = get_peft_model(Net(), config())
    change(folder)
    monkeypatch.chdir(folder.parent)
    before, base = snapshot(model), model.get_base_model()
    with pytest.raises(error, match=f"(?s){message}"):
        PeftModel.from_pretrained(base, folder, "second")
    assert_unchanged(before, model)
    assert base.peft_config is model.peft_config and list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("spoil", ["truncated", "a_tensor_is_missing", "another_shape", "another_rank"])
def test_a_spoilt_file_leaves_the_adapter_it_was_to_replace_alone(spoil: str, folder: Path) -> None:
    model = get_peft_model(Net(), config(r=2))
    if spoil == "another_rank":
        model = get_peft_model(Net(), config(r=3))
    else:
        SPOILT[spoil][0](folder)
    before = snapshot(model)
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "default")
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    "other", [Net(layers=3), Net(layers=1), Net(width=8)], ids=["more_layers", "fewer_layers", "wider"]
)
def test_an_adapter_of_another_model_is_refused(other: Net, folder: Path) -> None:
    before = snapshot(other)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(other, folder)
    assert_unchanged(before, other)


def test_states_that_do_not_fit_are_refused_whole() -> None:
    model = get_peft_model(Net(), config())
    before = snapshot(model)
    good, bad = torch.ones(2, 6), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, {FIRST: good, FIRST.replace(".0.", ".1."): bad})
    assert_unchanged(before, model)
    result = set_peft_model_state_dict(
        model, {FIRST: good, FIRST.replace(".0.", ".1."): bad, "stranger": bad}, ignore_mismatched_sizes=True
    )
    assert "stranger" in result.unexpected_keys and len(result.missing_keys) == 8 + 2 - 1
    assert torch.equal(model.get_parameter(FIRST.replace("lora_A", "lora_A.default")), good)


def test_unknown_fields_of_a_newer_version_are_named(folder: Path) -> None:
    edit_config(use_new_thing=True, harmless_new_thing=None)(folder)
    with pytest.warns(PeftWarning, match=r"\['use_new_thing'\]"):
        assert PeftConfig.from_pretrained(folder).r == 2  # type: ignore[attr-defined]


def test_an_unknown_argument_is_named(folder: Path) -> None:
    with pytest.warns(PeftWarning, match="is_trianable"):
        PeftModel.from_pretrained(Net(), folder, is_trianable=True)


def test_a_file_where_a_folder_belongs(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        get_peft_model(Net(), config()).save_pretrained(tmp_path / "file")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="Can't find"):
        load_peft_weights(folder)
