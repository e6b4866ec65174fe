"""Adapters of AdapterHub's library: read with its own outputs and gradients, written back tensor for tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_goldens import Golden
from inlay import (
    AdapterFileError,
    BottleneckConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from inlay.adapterhub import Part, bottleneck, low_rank, write_adapterhub, write_union
from inlay.adapterhub.folder import describe, read_folder
from inlay.adapterhub.prefix import NETWORK
from inlay.cli.main import main
from inlay.files.disk_keys import disk_keys
from inlay.injection.walk import places

BERT = [
    "seq_bn", "double_seq_bn", "par_bn", "channel_par_bn", "bn_leave_out_0", "bn_ln_after", "bn_ln_before", "bn_no_ln_after",
    "bn_residual_after_ln", "compacter", "compacter_full_W", "lora", "ia3", "prefix_tuning", "prefix_tuning_gated_kv", "mam", "unipelt",
]  # fmt: skip
GPT2 = [
    "bn_houlsby_scaling2", "bn_ln_after", "compacter", "compacterpp", "double_seq_bn", "ia3", "lora_all",
    "par_bn_both_locations", "scaled_par_bn", "seq_bn_default_rf16", "prefix_tuning", "prefix_tuning_flat",
]  # fmt: skip
NOT_WRITTEN = ("gpt2/lora_all", "gpt2/ia3")
"""Fused projections are read as one matrix, whose parts are not known any more."""
WITH_PREFIX = ("prefix_tuning", "mam", "unipelt")
"""Cases with a prefix, or with several parts."""
NO_SAFETENSORS = ("ln_before", *WITH_PREFIX)
"""Cases that AdapterHub cannot write in safetensors, because it keeps a tensor in two places."""
CASES = [f"bert/{name}" for name in BERT] + [f"gpt2/{name}" for name in GPT2]
PLACES_OF_PARTS = {".output.adapters.a.": ".output.dropout.", ".loras.a.": "."}
"""Where the parts beside a prefix are in the goldens, and here."""
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
    if not any(name in case for name in (*NOT_WRITTEN, *WITH_PREFIX)):
        found = in_adapterhubs_names(model, trained, golden)
        assert found.keys() >= wanted.keys() - {"loss"}
        for key in wanted.keys() - {"loss"}:
            assert_gradient(found[key], wanted[key], key)
    elif any(name in case for name in WITH_PREFIX) and "flat" not in case:
        network = {key.removeprefix("prompt_encoder.default."): g for key, g in trained.items()}
        for theirs, ours in NETWORK.items():
            key = next(k for k in wanted if k.endswith(f"self_prefix.{theirs}"))
            assert_gradient(network[ours], wanted[key], key)
        for key in (key for key in wanted if "gate" in key and "prefix" in key):
            number = re.search(r"layer\.(\d)", key)
            assert number is not None
            assert_gradient(network[f"gates.{number[1]}.{key.rpartition('.')[2]}"], wanted[key], key)
        for theirs, ours in PLACES_OF_PARTS.items():
            for key in (key for key in wanted if theirs in key):
                name = key.replace(theirs, ours)
                name = re.sub(
                    r"\.lora_(A|B)$", lambda m: f".adapter_{'down' if m[1] == 'A' else 'up'}.weight", name
                )
                name = re.sub(
                    r"\.(scaling|gate)(\.|$)",
                    r".adapter_\1\2",
                    name.replace("adapter_down.0", "adapter_down"),
                )
                column, _, rest = name.rpartition(".")
                kind = "lora" if ".loras." in theirs else "bottleneck"
                assert_gradient(trained[f"base_model.model.{column}.default_{kind}.{rest}"], wanted[key], key)


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
    model = PeftModel.from_pretrained(golden.base(), source, is_trainable=True)
    parts = [
        Part(config, get_peft_model_state_dict(model, adapter_name=name), model.base_model.remembered(name))
        for name, config in model.peft_config.items()
    ]
    if any(name in case for name in NOT_WRITTEN):
        with pytest.raises(ValueError, match="AdapterHub"):
            write_adapterhub(tmp_path, golden.base(), parts[0].config, parts[0].tensors, "a")
        assert not list(tmp_path.iterdir())
        return
    if len(parts) == 1:
        write_adapterhub(tmp_path, golden.base(), parts[0].config, parts[0].tensors, "a", parts[0].state)
    else:
        write_union(tmp_path, golden.base(), parts, "a")
    description = json.loads((source / "adapter_config.json").read_text())
    tensors = read_folder(source, description).tensors
    written = load_file(tmp_path / "adapter.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert without_alpha_of_a_gate(told["config"]) == without_alpha_of_a_gate(description["config"])
    apart = ("config", "model_name")  # AdapterHub was given a model without a name
    assert {k: v for k, v in told.items() if k not in apart} == {
        k: v for k, v in description.items() if k not in apart
    }


def without_alpha_of_a_gate(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of each part; a LoRA's gate stands in place of alpha / r, whatever alpha is."""
    parts = fields.get("configs", [fields])
    gated = [part.get("architecture") == "lora" and part["use_gating"] for part in parts]
    return [part | {"alpha": None} if open_ else part for part, open_ in zip(parts, gated, strict=True)]


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
        ({"config": {"use_gating": True, "architecture": "lora", "r": 4, "dropout": 0.1}}, "with dropout"),
        (
            {"config": {"use_gating": True, "architecture": "lora", "r": 4, "composition_mode": "scale"}},
            "use_gating",
        ),
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


def test_what_inlay_does_not_have_is_named(goldens: Path) -> None:
    golden = Golden(goldens / "bert" / "dora")
    with pytest.raises(ValueError, match="use_dora"):
        PeftModel.from_pretrained(golden.base(), golden.folder / "checkpoint_bin")


@pytest.mark.parametrize("case", ["bert/seq_bn", "gpt2/compacter", "bert/lora", "gpt2/prefix_tuning_flat"])
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


@pytest.mark.parametrize("case", ["bert/mam", "bert/unipelt"])
def test_the_command_line_converts_several_in_one_both_ways(goldens: Path, case: str, tmp_path: Path) -> None:
    golden = Golden(goldens / case)
    base, source = tmp_path / "base", golden.folder / "checkpoint_bin"
    golden.base().save_pretrained(base)
    assert main(["convert", str(source), "--model", str(base), "--output-dir", str(tmp_path / "here")]) == 0
    first, *others = [
        kind for kind in ("prefix_tuning", "bottleneck", "lora") if (tmp_path / "here" / kind).is_dir()
    ]
    model = PeftModel.from_pretrained(golden.base(), tmp_path / "here" / first, first)
    for kind in others:
        model.load_adapter(tmp_path / "here" / kind, kind)
    model.set_adapter([first, *others])
    wanted = golden.tensors("expected")["full.logits"]
    assert torch.allclose(outputs(model.eval(), part(golden.inputs(), "full")), wanted, atol=5e-5)
    assert (
        main(["convert", str(tmp_path / "here"), "--output-dir", str(tmp_path / "back"), "--name", "a"]) == 0
    )
    description = describe(tmp_path / "back")
    assert description is not None
    original = read_folder(source, json.loads((source / "adapter_config.json").read_text())).tensors
    back = read_folder(tmp_path / "back", description).tensors
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


def grown_bias(model: PeftModel) -> None:
    bias = next(p for n, p in model.named_parameters() if "adapter_up" in n and n.endswith("bias"))
    with torch.no_grad():
        bias.add_(1)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3), None, "leave the positions as they are"),
        (
            BottleneckConfig.preset("gated_lora", target_modules=["query"]),
            grown_bias,
            "has no bias, and .* is not zero",
        ),
        (
            BottleneckConfig.preset("gated_lora", target_modules=["query"], scaling=2.0),
            None,
            "target_modules",
        ),
        (
            BottleneckConfig.preset("gated_lora", target_modules=["attention.output.dense"]),
            None,
            "has no LoRA on",
        ),
    ],
    ids=["positions", "bias", "scale", "place"],
)
def test_what_adapterhub_cannot_say_of_gates_is_not_written(
    goldens: Path, config: Any, change: Any, message: str, tmp_path: Path
) -> None:
    golden = Golden(goldens / "bert" / "unipelt")
    model = get_peft_model(golden.base(), config)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message):
        write_adapterhub(
            tmp_path, golden.base(), model.peft_config["default"], get_peft_model_state_dict(model), "a"
        )
    assert not list(tmp_path.iterdir())


def test_each_method_is_once_in_a_union(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "unipelt")
    model = get_peft_model(golden.base(), BottleneckConfig.preset("seq_bn"))
    twice = [Part(model.peft_config["default"], get_peft_model_state_dict(model))] * 2
    with pytest.raises(ValueError, match="each method once"):
        write_union(tmp_path, golden.base(), twice, "a")


def test_the_command_line_says_what_it_cannot_write(
    tmp_path: Path, goldens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from inlay import VeraConfig

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
