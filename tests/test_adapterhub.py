"""Adapters of AdapterHub's library: read with its own outputs and gradients, written back tensor for tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_goldens import Golden
from inlay import AdapterFileError, BottleneckConfig, PeftModel, get_peft_model_state_dict
from inlay.adapterhub import bottleneck, low_rank, write_adapterhub
from inlay.adapterhub.folder import describe, read_folder
from inlay.adapterhub.prefix import NETWORK
from inlay.cli.main import main
from inlay.files.disk_keys import disk_keys
from inlay.injection.walk import places

BERT = [
    "seq_bn", "double_seq_bn", "par_bn", "channel_par_bn", "bn_leave_out_0", "bn_ln_after", "bn_ln_before", "bn_no_ln_after",
    "bn_residual_after_ln", "compacter", "compacter_full_W", "lora", "ia3", "prefix_tuning", "mam",
]  # fmt: skip
GPT2 = [
    "bn_houlsby_scaling2", "bn_ln_after", "compacter", "compacterpp", "double_seq_bn", "ia3", "lora_all",
    "par_bn_both_locations", "scaled_par_bn", "seq_bn_default_rf16", "prefix_tuning", "prefix_tuning_flat",
]  # fmt: skip
NOT_WRITTEN = ("gpt2/lora_all", "gpt2/ia3", "prefix_tuning", "mam")
"""Fused projections are read as one matrix, whose parts are not known any more; prefixes are read only."""
NO_SAFETENSORS = ("ln_before", "prefix_tuning", "mam")
"""Cases that AdapterHub cannot write in safetensors, because it keeps a tensor in two places."""
CASES = [f"bert/{name}" for name in BERT] + [f"gpt2/{name}" for name in GPT2]
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "adapterhub"


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


def part(inputs: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: inputs[f"{name}.{key}"] for key in ("input_ids", "attention_mask")}


@each_case
@pytest.mark.parametrize("files", ["checkpoint_bin", "checkpoint_safetensors"])
def test_outputs_and_gradients_are_adapterhubs(goldens: Path, case: str, files: str) -> None:
    golden = Golden(goldens / case)
    folder = golden.folder / files
    if not folder.is_dir():
        assert any(name in case for name in NO_SAFETENSORS)
        return
    model = PeftModel.from_pretrained(golden.base(), folder, is_trainable=True).eval()
    inputs, expected = golden.inputs(), golden.tensors("expected")
    for name in ("full", "padded"):
        seen = inputs[f"{name}.attention_mask"].bool()
        got = outputs(model, part(inputs, name))
        assert float((got - expected[f"{name}.logits"])[seen].detach().abs().max()) <= 5e-5
    loss = (outputs(model.train(), part(inputs, "padded")) * inputs["loss_weight"]).sum()
    wanted = golden.tensors("grads")
    assert torch.allclose(loss, wanted["loss"], rtol=1e-4)
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(g is not None and g.isfinite().all() for g in trained.values())
    if not any(name in case for name in NOT_WRITTEN):
        found = in_adapterhubs_names(model, trained, golden)
        assert found.keys() >= wanted.keys() - {"loss"}
        for key in wanted.keys() - {"loss"}:
            assert_gradient(found[key], wanted[key], key)
    elif "prefix_tuning" in case and "flat" not in case:
        network = {key.removeprefix("prompt_encoder.default."): g for key, g in trained.items()}
        for theirs, ours in NETWORK.items():
            key = next(k for k in wanted if k.endswith(f"self_prefix.{theirs}"))
            assert_gradient(network[ours], wanted[key], key)


def assert_gradient(got: torch.Tensor, wanted: torch.Tensor, key: str) -> None:
    assert float((got - wanted).abs().max()) <= 4e-4 * float(wanted.abs().max()), key


def in_adapterhubs_names(model: Any, gradients: dict[str, Any], golden: Golden) -> dict[str, torch.Tensor]:
    """Return gradients by the keys that AdapterHub gives to what they are of."""
    keys = disk_keys(model, "default")
    state = {disk: gradients[memory] for memory, disk in keys.items() if memory in gradients}
    config, base = model.peft_config["default"], golden.base()
    if isinstance(config, BottleneckConfig):
        return bottleneck.keys_for(state, config, "a", places(base), f"{base.base_model_prefix}.")
    return low_rank.fields_and_keys(config, state, "a")[1]


@each_case
def test_written_back_it_is_the_same_file(goldens: Path, case: str, tmp_path: Path) -> None:
    golden = Golden(goldens / case)
    source = golden.folder / "checkpoint_bin"
    model = PeftModel.from_pretrained(golden.base(), source)
    config, state = model.peft_config["default"], get_peft_model_state_dict(model)
    if any(name in case for name in NOT_WRITTEN):
        with pytest.raises(ValueError, match="AdapterHub"):
            write_adapterhub(tmp_path, golden.base(), config, state, "a")
        assert not list(tmp_path.iterdir())
        return
    write_adapterhub(tmp_path, golden.base(), config, state, "a")
    description = json.loads((source / "adapter_config.json").read_text())
    tensors = read_folder(source, description).tensors
    written = load_file(tmp_path / "adapter.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: told["config"][key] for key in description["config"]} == description["config"]
    apart = ("config", "model_name")  # AdapterHub was given a model without a name
    assert {k: v for k, v in told.items() if k not in apart} == {
        k: v for k, v in description.items() if k not in apart
    }


def test_several_of_them_on_one_model(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "seq_bn")
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "checkpoint_bin")
    model.load_adapter(goldens / "bert" / "lora" / "checkpoint_bin", "low_rank")
    inputs = part(golden.inputs(), "full")
    for name, case in (("default", "seq_bn"), ("low_rank", "lora")):
        model.set_adapter(name)
        wanted = load_file(goldens / "bert" / case / "expected.safetensors")["full.logits"]
        assert torch.allclose(outputs(model, inputs), wanted, atol=5e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(golden.base(), tmp_path)
    model.set_adapter("default")
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_model_in_another_class(goldens: Path) -> None:
    golden = Golden(goldens / "bert" / "double_seq_bn")
    headless = golden.base().bert
    model = PeftModel.from_pretrained(headless, golden.folder / "checkpoint_bin")
    inputs = part(golden.inputs(), "full")
    wanted = golden.tensors("expected")["full.hidden_states.2"]
    assert torch.allclose(model(**inputs).last_hidden_state, wanted, atol=5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"use_gating": True, "architecture": "lora", "r": 4, "alpha": 8}}, "use_gating"),
        ({"config": {"architecture": "reft"}}, "'reft'"),
        ({"name": "b"}, "no tensor of adapter 'b'"),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_model_stays(
    goldens: Path, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    golden = Golden(goldens / "bert" / "lora")
    folder = shutil.copytree(golden.folder / "checkpoint_bin", tmp_path / "changed")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | change))
    base = golden.base()
    before = list(base.state_dict())
    with pytest.raises((ValueError, AdapterFileError), match=message):
        PeftModel.from_pretrained(base, folder)
    assert list(base.state_dict()) == before


@pytest.mark.parametrize("case", ["seq_bn", "lora"])
def test_an_adapter_of_another_model_is_refused(
    goldens: Path, case: str
) -> None:  # S2-12: AdapterHub loads nothing and says nothing
    base = Golden(goldens / "gpt2" / "compacter").base()
    with pytest.raises(AdapterFileError, match="another base model"):
        PeftModel.from_pretrained(base, goldens / "bert" / case / "checkpoint_bin")


def test_half_a_file_is_refused(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "seq_bn")
    folder = shutil.copytree(golden.folder / "checkpoint_safetensors", tmp_path / "half")
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if "layer.0" in k}, folder / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match=r"lacks 4 tensors"):
        PeftModel.from_pretrained(golden.base(), folder)


@pytest.mark.parametrize(
    ("case", "message"),
    [("unipelt", "a gated prefix, which"), ("dora", "use_dora")],
)
def test_what_inlay_does_not_have_is_named(goldens: Path, case: str, message: str) -> None:
    golden = Golden(goldens / "bert" / case)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(golden.base(), golden.folder / "checkpoint_bin")


@pytest.mark.parametrize("case", ["bert/seq_bn", "gpt2/compacter", "bert/lora"])
def test_the_command_line_converts_both_ways(
    goldens: Path, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Golden(goldens / case)
    base, source = tmp_path / "base", golden.folder / "checkpoint_bin"
    golden.base().save_pretrained(base)
    assert main(["convert", str(source), "--model", str(base), "--output-dir", str(tmp_path / "here")]) == 0
    assert "here" in capsys.readouterr().out
    inputs = part(golden.inputs(), "full")
    wanted = golden.tensors("expected")["full.logits"]
    model = PeftModel.from_pretrained(golden.base(), tmp_path / "here")
    assert torch.allclose(outputs(model, inputs), wanted, atol=5e-5)
    assert (
        main(["convert", str(tmp_path / "here"), "--output-dir", str(tmp_path / "back"), "--name", "a"]) == 0
    )
    description = describe(tmp_path / "back")
    assert description is not None
    original = read_folder(source, json.loads((source / "adapter_config.json").read_text())).tensors
    back = read_folder(tmp_path / "back", description).tensors
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_the_command_line_says_what_it_cannot_write(
    tmp_path: Path, goldens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from inlay import VeraConfig, get_peft_model

    golden = Golden(goldens / "bert" / "seq_bn")
    golden.base().save_pretrained(tmp_path / "base")
    get_peft_model(golden.base(), VeraConfig(r=2, target_modules=["query"])).save_pretrained(
        tmp_path / "vera"
    )
    command = [
        "convert",
        str(tmp_path / "vera"),
        "--model",
        str(tmp_path / "base"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "VeraConfig cannot be written for AdapterHub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
