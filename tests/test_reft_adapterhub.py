"""ReFT of AdapterHub's library: read with its own outputs and gradients, and written so that it computes the same there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterhub_goldens import Golden
from inlay import (
    AdapterFileError,
    PeftModel,
    PeftWarning,
    ReftConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from inlay.adapterhub import write_adapterhub
from inlay.adapterhub.folder import describe, read_folder
from inlay.adapterhub.reft import parametrised
from inlay.cli.main import main

FILES = ["checkpoint_bin", "checkpoint_safetensors"]


@pytest.fixture
def golden(shared: Path) -> Golden:
    return Golden(shared / "goldens" / "adapterhub" / "bert" / "loreft")


def part(golden: Golden, name: str) -> dict[str, Tensor]:
    inputs = golden.inputs()
    return {key: inputs[f"{name}.{key}"] for key in ("input_ids", "attention_mask")}


def projection(original: Tensor, base: Tensor) -> nn.Module:
    """Return a layer with PyTorch's own parametrisation, as AdapterHub keeps it; its weight is R."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    layer.load_state_dict(
        {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    )
    return layer


def rotations(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the layers of a file's orthogonal projections, by the path of each intervention."""
    ending = ".projection.parametrizations.weight.original"
    units = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    return {
        unit: projection(tensors[unit + ending], tensors[f"{unit}.projection.parametrizations.weight.0.base"])
        for unit in units
    }


@pytest.mark.parametrize("files", FILES)
def test_outputs_and_hidden_states_are_adapterhubs(golden: Golden, files: str) -> None:
    model = PeftModel.from_pretrained(golden.base(), golden.folder / files).eval()
    expected = golden.tensors("expected")
    for name in ("full", "padded"):
        given = part(golden, name)
        out, seen = model(**given, output_hidden_states=True), given["attention_mask"].bool()
        assert (out.logits - expected[f"{name}.logits"])[seen].abs().max() <= 1e-5
        for number, states in enumerate(out.hidden_states):
            assert (states - expected[f"{name}.hidden_states.{number}"])[seen].abs().max() <= 5e-6


def test_gradients_are_adapterhubs(golden: Golden) -> None:
    """W and b as they are; R's through PyTorch's parametrisation, from which its numbers there get theirs."""
    folder = golden.folder / "checkpoint_safetensors"
    model = PeftModel.from_pretrained(golden.base(), folder, is_trainable=True).train()
    loss = (model(**part(golden, "padded")).logits * golden.inputs()["loss_weight"]).sum()
    wanted = golden.tensors("grads")
    torch.testing.assert_close(loss, wanted["loss"], rtol=1e-4, atol=0)
    loss.backward()
    layers = rotations(load_file(folder / "adapter.safetensors"))
    compared = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block, _, rest = name.removeprefix("base_model.model.").partition(".reft_prefix.default.")
        unit, grad = f"{block}.reft_layer.refts.a.units.0", p.grad
        if rest == "projection.weight":
            layers[unit].weight.backward(grad)
            rest, grad = (
                "projection.parametrizations.weight.original",
                layers[unit].parametrizations.weight.original.grad,
            )
        theirs = wanted[f"{unit}.{rest}"]
        assert grad is not None and theirs.abs().max() > 0
        assert (grad - theirs).abs().max() <= 4e-5 * theirs.abs().max(), name
        compared += 1
    assert compared == 2 * 3
    assert not any(g.any() for key, g in wanted.items() if ".units.1." in key)  # what Inlay does not keep


def test_a_trained_rotation_is_read_as_pytorch_computes_it() -> None:
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(9, 3, bias=False))
    inner = layer.parametrizations.weight
    with torch.no_grad():
        inner.original += torch.randn_like(inner.original).triu(1)  # what training changes
        inner.original[1, 1] = 1.0
    r = parametrised(inner.original.detach(), inner[0].base)
    torch.testing.assert_close(r, layer.weight.detach(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="r=3 directions of 3"):
        parametrised(torch.eye(3), torch.eye(3))


def test_what_is_kept_is_a_fraction(golden: Golden, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "checkpoint_bin")
    numbers = sum(t.numel() for t in get_peft_model_state_dict(model).values())
    assert numbers == 2 * (2 * 32 + 2 + 2 * 32)  # of one intervention in each of two blocks
    theirs = load_file(golden.folder / "checkpoint_safetensors" / "adapter.safetensors")
    assert numbers < sum(t.numel() for t in theirs.values()) / 17


def test_written_back_it_is_the_same_adapter(golden: Golden, tmp_path: Path) -> None:
    source = golden.folder / "checkpoint_safetensors"
    model = PeftModel.from_pretrained(golden.base(), source).eval()
    state = get_peft_model_state_dict(model)
    write_adapterhub(tmp_path, golden.base(), model.peft_config["default"], state, "a")
    told, written = (json.loads((f / "adapter_config.json").read_text()) for f in (source, tmp_path))
    assert written | {"model_name": ""} == told
    theirs, ours = load_file(source / "adapter.safetensors"), load_file(tmp_path / "adapter.safetensors")
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert all(torch.equal(ours[key], t) for key, t in theirs.items() if ".units.0.learned" in key)
    again = rotations(ours)
    for unit, layer in rotations(theirs).items():
        base = again[unit].parametrizations.weight[0].base
        torch.testing.assert_close(base @ base.T, torch.eye(32), rtol=0, atol=1e-5)
        if ".units.0" in unit:
            torch.testing.assert_close(again[unit].weight, layer.weight, rtol=0, atol=1e-6)
    read = PeftModel.from_pretrained(golden.base(), tmp_path).eval()
    given = part(golden, "padded")
    torch.testing.assert_close(read(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


def test_the_command_line_converts_both_ways(golden: Golden, tmp_path: Path) -> None:
    base, source = tmp_path / "base", golden.folder / "checkpoint_bin"
    golden.base().save_pretrained(base)
    here, back = tmp_path / "here", tmp_path / "back"
    assert main(["convert", str(source), "--model", str(base), "--output-dir", str(here)]) == 0
    assert main(["convert", str(here), "--output-dir", str(back), "--name", "a"]) == 0
    given, wanted = part(golden, "full"), golden.tensors("expected")["full.logits"]
    for folder in (here, back):
        model = PeftModel.from_pretrained(golden.base(), folder).eval()
        torch.testing.assert_close(model(**given).logits, wanted, rtol=0, atol=1e-5)
    description = describe(back)
    assert description is not None
    assert (
        read_folder(back, description).tensors.keys()
        == read_folder(source, describe(source) or {}).tensors.keys()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"suffix_positions": 2},
        {"suffix_positions": 2, "prefix_positions": 0},
        {"suffix_positions": 2, "tied_weights": True},
        {"tied_weights": True},
        {"layers": [1]},
        {"non_linearity": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["loreft", "noreft", "direft"])
def test_every_form_is_written_and_read(
    golden: Golden, preset: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = ReftConfig.preset(preset, r=2, dropout=0.0, **changes)
    model = get_peft_model(golden.base(), config).eval()
    state, given = get_peft_model_state_dict(model), part(golden, "padded")
    if preset == "direft" and "non_linearity" in changes:
        with pytest.raises(ValueError, match="no word for subtract_projection=False with non_linearity"):
            write_adapterhub(tmp_path / "out", golden.base(), config, state, "a")
        return
    write_adapterhub(tmp_path, golden.base(), config, state, "a")
    if preset == "loreft":
        again = PeftModel.from_pretrained(golden.base(), tmp_path).eval()
    else:
        with pytest.warns(PeftWarning, match="do not tell DiReFT from NoReFT"):
            again = PeftModel.from_pretrained(golden.base(), tmp_path).eval()
    units = {key.partition(".units.")[2][0] for key in load_file(tmp_path / "adapter.safetensors")}
    assert units == ({"0"} if "tied_weights" in changes else {"0", "1"})
    real = given["attention_mask"].bool()
    torch.testing.assert_close(again(**given).logits[real], model(**given).logits[real], rtol=0, atol=1e-4)


def test_direft_is_read_as_what_it_is_once_its_file_says_so(golden: Golden, tmp_path: Path) -> None:
    model = get_peft_model(golden.base(), ReftConfig.preset("noreft", dropout=0.0))
    config = model.peft_config["default"]
    write_adapterhub(tmp_path, golden.base(), config, get_peft_model_state_dict(model), "a")
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    told["config"]["subtract_projection"] = False
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    again = PeftModel.from_pretrained(golden.base(), tmp_path)
    assert again.peft_config["default"].subtract_projection is False


def test_what_cannot_be_exchanged_is_named(golden: Golden, tmp_path: Path) -> None:
    folder = shutil.copytree(golden.folder / "checkpoint_safetensors", tmp_path / "changed")
    for file in folder.iterdir():
        file.chmod(0o644)
    told = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (({"dtype": "bfloat16"}, "dtype"), ({"gates": 2}, "gates")):
        (folder / "adapter_config.json").write_text(json.dumps(told | {"config": told["config"] | change}))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(golden.base(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(told))
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("0.base")}, folder / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match="lacks"):
        PeftModel.from_pretrained(golden.base(), folder)
    model = get_peft_model(golden.base(), ReftConfig(target_modules=["output.dense"]))
    with pytest.raises(ValueError, match="no word for target_modules"):
        write_adapterhub(
            tmp_path / "out",
            golden.base(),
            model.peft_config["default"],
            get_peft_model_state_dict(model),
            "a",
        )
    assert not (tmp_path / "out").exists()
