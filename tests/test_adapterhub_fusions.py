"""Fusions and setups of AdapterHub's library: read with its own outputs and gradients, written back tensor for tensor."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterhub_goldens import Golden
from inlay import (
    AdapterFileError,
    Average,
    BatchSplit,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    LoraConfig,
    Parallel,
    PeftModel,
    PeftWarning,
    Split,
    Stack,
    get_peft_model,
    get_peft_model_state_dict,
)
from inlay.adapterhub import fusion, write_adapterhub
from inlay.adapterhub.folder import describe, read_folder
from inlay.cli.main import main
from inlay.files.disk_keys import disk_keys
from inlay.injection.walk import places

SETUPS: dict[str, tuple[Any, list[str]]] = {
    "bert/compose_stack": (None, ["a", "b"]),
    "bert/compose_batchsplit": (BatchSplit("a", "b", batch_sizes=[1, 1]), ["a", "b"]),
    "bert/compose_parallel": (Parallel("a", "b"), ["a", "b"]),
    "gpt2/compose_parallel": (Parallel("a", "b"), ["a", "b"]),
    "bert/compose_fuse": (Fuse("a", "b", name="a,b"), ["a", "b", "a,b"]),
    "gpt2/compose_fuse": (Fuse("a", "b", name="a,b"), ["a", "b", "a,b"]),
}
each_family = pytest.mark.parametrize("family", ["bert", "gpt2"])


@pytest.fixture
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "adapterhub"


def logits(model: Any, golden: Golden, batch: str = "full") -> Tensor:
    inputs = golden.inputs()
    found: Tensor = model(
        input_ids=inputs[f"{batch}.input_ids"], attention_mask=inputs[f"{batch}.attention_mask"]
    ).logits
    return found


def off_by(model: Any, golden: Golden, batch: str = "full") -> float:
    """Return the largest error at real positions."""
    with torch.no_grad():
        got = logits(model.eval(), golden, batch)
    mask = golden.inputs()[f"{batch}.attention_mask"].bool()
    real = mask.repeat(len(got) // len(mask), 1)
    return float((got - golden.tensors("expected")[f"{batch}.logits"])[real].abs().max())


def edited(folder: Path, target: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a folder with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    change(values)
    (target / file).write_text(json.dumps(values))
    return target


@pytest.mark.parametrize("case", SETUPS)
def test_a_setup_comes_with_its_composition_on(goldens: Path, case: str) -> None:
    golden = Golden(goldens / case)
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "setup")
    composition, names = SETUPS[case]
    assert model.base_model.switch.now().composition == composition
    assert list(model.peft_config) == model.active_adapters == names
    assert not any(p.requires_grad for p in model.parameters())
    assert off_by(model, golden) <= 2e-5
    assert off_by(model, golden, "padded") <= 2e-5


@each_family
@pytest.mark.parametrize("files", ["fusion_bin", "fusion_safetensors"])
def test_a_fusion_of_members_that_are_there(goldens: Path, family: str, files: str) -> None:
    golden = Golden(goldens / family / "compose_fuse")
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "adapter_a", "a", is_trainable=True)
    model.load_adapter(golden.folder / "adapter_b", "b")
    model.load_adapter(golden.folder / files, "mix", is_trainable=True)
    assert model.active_adapters == ["a"]
    model.set_adapter("mix")
    assert off_by(model, golden) <= 2e-5
    weight, wanted = golden.inputs()["loss_weight"], golden.tensors("grads")
    loss = (logits(model.train(), golden, "padded") * weight).sum()
    assert torch.allclose(loss, wanted["loss"], rtol=1e-4)
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    keys = disk_keys(model, "mix")
    assert trained.keys() == keys.keys()
    found = fusion.keys_for(
        {keys[n]: g for n, g in trained.items() if g is not None}, "a,b", places(golden.base())
    )
    assert found.keys() == {key for key in wanted if "adapter_fusion_layer" in key}
    for key, gradient in found.items():
        if not key.endswith("key.bias"):  # nothing but rounding in AdapterHub
            assert float((gradient - wanted[key]).abs().max()) <= 4e-4 * float(wanted[key].abs().max()), key


@each_family
def test_members_beside_a_fusion_come_with_it(goldens: Path, family: str) -> None:
    golden = Golden(goldens / family / "compose_fuse")
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "setup" / "a,b", "mix")
    assert model.active_adapters == ["a", "b", "mix"]
    assert off_by(model, golden) <= 2e-5


def test_a_fusion_without_members_says_what_it_needs(goldens: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    base = golden.base()
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=r"needs its member 'a', which is not beside it; load it first"):
        PeftModel.from_pretrained(base, golden.folder / "fusion_bin")
    assert list(base.state_dict()) == before
    model = PeftModel.from_pretrained(base, golden.folder / "adapter_a", "a")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="needs its member 'b'"):
        model.load_adapter(golden.folder / "fusion_bin", "mix")
    assert list(model.state_dict()) == before


def test_a_setup_beside_other_adapters(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    model = PeftModel.from_pretrained(golden.base(), golden.folder / "adapter_a", "a")
    with pytest.raises(ValueError, match="there is one named 'a'"):
        model.load_adapter(golden.folder / "setup", "default")
    assert list(model.peft_config) == ["a"]
    model.load_adapter(golden.folder / "setup", "x")
    assert model.active_adapters == ["a"]
    model.set_adapter("x_a,b")
    assert model.active_adapters == ["x_a", "x_b", "x_a,b"]
    assert off_by(model, golden) <= 2e-5
    model.save_pretrained(tmp_path, selected_adapters=["x_a,b"])
    again = PeftModel.from_pretrained(golden.base(), tmp_path / "x_a,b", "mix")
    assert off_by(again, golden) <= 2e-5


@pytest.mark.parametrize(
    ("told", "block"),
    [
        ({"type": "Average", "kwargs": {"weights": [0.5, 1.5]}}, Average("a", "b", weights=[0.5, 1.5])),
        ({"type": "Split", "kwargs": {"splits": [3, 4]}}, Split("a", "b", splits=[3, 4])),
        ({"type": "Stack"}, None),
    ],
    ids=["average", "split", "stack"],
)
def test_other_compositions(goldens: Path, told: dict[str, Any], block: Any, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_stack")
    folder = edited(
        golden.folder / "setup",
        tmp_path / "other",
        "adapter_setup.json",
        lambda v: v["adapter_setup"].update(told),
    )
    if isinstance(block, Average):
        with pytest.warns(PeftWarning, match="divides an Average by the number of its children once more"):
            model = PeftModel.from_pretrained(golden.base(), folder)
    else:
        model = PeftModel.from_pretrained(golden.base(), folder)
    assert model.base_model.switch.now().composition == block
    assert model.active_adapters == ["a", "b"]


def test_what_a_stack_computes_otherwise_there_is_said(goldens: Path, tmp_path: Path) -> None:
    golden, kinds = (
        Golden(goldens / "bert" / "lora"),
        {"a": "lora", "b": "par_bn", "c": "seq_bn", "d": "lora"},
    )
    for name, case in kinds.items():
        model = PeftModel.from_pretrained(golden.base(), goldens / "bert" / case / "checkpoint_bin")
        write_adapterhub(
            tmp_path / name,
            golden.base(),
            model.peft_config["default"],
            get_peft_model_state_dict(model),
            name,
        )

    def warnings_of(*names: str) -> list[str]:
        children = [{"type": "single", "children": [name]} for name in names]
        setup = {"adapter_setup": {"type": "Stack", "children": children}}
        (tmp_path / "adapter_setup.json").write_text(json.dumps(setup))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(golden.base(), tmp_path)
        return [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]

    assert warnings_of("a", "c") == []
    (loras,) = warnings_of("a", "d")
    assert "feeds what one LoRA of a Stack adds into the next" in loras
    (parallel,) = warnings_of("b", "c")
    assert "loses the layer's output in a Stack with parallel adapters" in parallel


def test_a_stack_upon_a_fusion(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")

    def stacked(values: dict[str, Any]) -> None:
        first = {"type": "single", "children": ["c"]}
        values["adapter_setup"] = {"type": "Stack", "children": [first, values["adapter_setup"]]}

    folder = edited(golden.folder / "setup", tmp_path / "stack", "adapter_setup.json", stacked)
    renamed = {k.replace(".adapters.a.", ".adapters.c."): v for k, v in load_file(golden.folder / "adapter_a" / "adapter.safetensors").items()}  # fmt: skip
    edited(golden.folder / "adapter_a", folder / "c", "adapter_config.json", lambda v: v.update(name="c"))
    save_file(renamed, folder / "c" / "adapter.safetensors")
    model = PeftModel.from_pretrained(golden.base(), folder)
    assert model.base_model.switch.now().composition == Stack("c", Fuse("a", "b", name="a,b"))
    assert logits(model, golden).isfinite().all()
    model.set_adapter("a,b")
    assert off_by(model, golden) <= 2e-5


def test_a_fusion_without_values_has_the_identity(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    folder = tmp_path / "setup"
    shutil.copytree(golden.folder / "setup", folder)
    told = edited(
        golden.folder / "fusion_safetensors",
        tmp_path / "static",
        "adapter_fusion_config.json",
        lambda v: v["config"].update(value=False, regularization=False),
    )
    tensors = load_file(told / "model_adapter_fusion.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "value" not in k}, told / "model_adapter_fusion.safetensors"
    )
    shutil.rmtree(folder / "a,b")
    shutil.move(told, folder / "a,b")
    model = PeftModel.from_pretrained(golden.base(), folder)
    assert model.peft_config["a,b"].regularization == 0.0
    values = [p for n, p in model.named_parameters() if "fusion_value" in n]
    assert len(values) == 2 and all(torch.equal(p, torch.eye(32)) for p in values)


def without_layer_0(setup: Path, member: str) -> None:
    """Make an adapter one that leaves out the first layer."""
    told = json.loads((setup / member / "adapter_config.json").read_text())
    told["config"]["leave_out"] = [0]
    (setup / member / "adapter_config.json").write_text(json.dumps(told))
    tensors = torch.load(setup / member / "pytorch_adapter.bin", weights_only=True)
    torch.save(
        {k: v for k, v in tensors.items() if ".0.output" not in k}, setup / member / "pytorch_adapter.bin"
    )


def test_a_fusion_holds_layers_without_members(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    setup = Path(shutil.copytree(golden.folder / "setup", tmp_path / "setup"))
    without_layer_0(setup, "a")
    base = golden.base()
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=r"a single one of its members \['a', 'b'\] does at .*layer\.0"):
        PeftModel.from_pretrained(base, setup)
    assert list(base.state_dict()) == before
    without_layer_0(setup, "b")
    model = PeftModel.from_pretrained(base, setup)
    assert {slot.path for slot in model.base_model.slots("a,b")} == {"bert.encoder.layer.1.output.dropout"}
    wanted = logits(model, golden)
    assert wanted.isfinite().all()
    golden.base().save_pretrained(tmp_path / "base")
    command = [
        "convert",
        str(setup),
        "--model",
        str(tmp_path / "base"),
        "--output-dir",
        str(tmp_path / "here"),
    ]
    assert main(command) == 0
    assert torch.equal(logits(PeftModel.from_pretrained(golden.base(), tmp_path / "here"), golden), wanted)


def parallel_members(setup: Path) -> None:
    for member in "ab":
        told = json.loads((setup / member / "adapter_config.json").read_text())
        told["config"].update(is_parallel=True, original_ln_before=False)
        (setup / member / "adapter_config.json").write_text(json.dumps(told))


def in_setup(**told: Any) -> Callable[[Path], None]:
    def change(setup: Path) -> None:
        values = json.loads((setup / "adapter_setup.json").read_text())
        values["adapter_setup"].update(told)
        (setup / "adapter_setup.json").write_text(json.dumps(values))

    return change


def in_fusion(**told: Any) -> Callable[[Path], None]:
    def change(setup: Path) -> None:
        file = setup / "a,b" / "adapter_fusion_config.json"
        values = json.loads(file.read_text())
        values["config"].update(told)
        file.write_text(json.dumps(values))

    return change


def half(setup: Path) -> None:
    file = setup / "a,b" / "pytorch_model_adapter_fusion.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in tensors.items() if ".1." in k}, file)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no member": (lambda s: shutil.rmtree(s / "b"), r"Can't find 'adapter_config.json'"),
    "no fusion": (lambda s: shutil.rmtree(s / "a,b"), r"Can't find 'adapter_config.json'"),
    "unknown block": (in_setup(type="MultiTask"), "no composition 'MultiTask'"),
    "unknown setting": (in_setup(type="Stack", kwargs={"task_ids": 1}), "Stack has no task_ids"),
    "fused blocks": (
        in_setup(children=[{"type": "Stack", "children": [{"type": "single", "children": ["a"]}]}]),
        "fuses single adapters",
    ),
    "way out": (in_setup(children=[{"type": "single", "children": ["../a"]}]), r"'\.\./a' cannot be the name"),
    "no children": (lambda s: (s / "adapter_setup.json").write_text('{"adapter_setup": {"type": "Stack"}}'), "is no setup"),
    "cut off": (lambda s: (s / "adapter_setup.json").write_text('{"adapter_'), "is no setup of adapters"),
    "residual": (in_fusion(residual_before=True), "residual_before"),
    "temperature": (in_fusion(temperature=True), "temperature"),
    "dropout": (in_fusion(dropout_prob=0.1), "dropout_prob"),
    "half a file": (half, r"lacks 4 tensors"),
    "parallel members": (parallel_members, "parallel adapters"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_and_the_model_stays(goldens: Path, name: str, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    change, message = BAD[name]
    setup = Path(shutil.copytree(golden.folder / "setup", tmp_path / "setup"))
    change(setup)
    base = golden.base()
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises((ValueError, AdapterFileError), match=message):
        PeftModel.from_pretrained(base, setup)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    model = PeftModel.from_pretrained(base, golden.folder / "adapter_a", "own")
    parameters = list(model.state_dict())
    with pytest.raises((ValueError, AdapterFileError), match=message):
        model.load_adapter(setup, "default")
    assert list(model.peft_config) == ["own"] and list(model.state_dict()) == parameters


def test_a_setup_of_another_model_is_refused(goldens: Path) -> None:
    base = Golden(goldens / "gpt2" / "compose_fuse").base()
    with pytest.raises(AdapterFileError, match="another base model"):
        PeftModel.from_pretrained(base, goldens / "bert" / "compose_fuse" / "setup")


def same_tensors(there: Path, original: Path) -> None:
    """Check that two folders of AdapterHub hold the same, but for a bias that no softmax sees."""
    told, wanted = describe(there), describe(original)
    assert told is not None and wanted is not None
    tensors, expected = read_folder(there, told).tensors, read_folder(original, wanted).tensors
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, torch.zeros(32) if key.endswith(".key.bias") else expected[key]), key
    apart = ("config", "model_name")  # AdapterHub was given a model without a name
    assert {k: v for k, v in told.items() if k not in apart} == {
        k: v for k, v in wanted.items() if k not in apart
    }
    assert {k: told["config"][k] for k in wanted["config"]} == wanted["config"]


@each_family
def test_the_command_line_converts_a_setup_both_ways(
    goldens: Path, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Golden(goldens / family / "compose_fuse")
    base, source = tmp_path / "base", golden.folder / "setup"
    golden.base().save_pretrained(base)
    assert main(["convert", str(source), "--model", str(base), "--output-dir", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "here" / name) for name in ("a", "b", "a,b")]
    assert off_by(PeftModel.from_pretrained(golden.base(), tmp_path / "here"), golden) <= 2e-5
    assert off_by(PeftModel.from_pretrained(golden.base(), tmp_path / "here" / "a,b", "mix"), golden) <= 2e-5
    assert main(["convert", str(tmp_path / "here"), "--output-dir", str(tmp_path / "back")]) == 0
    for name in ("a", "b", "a,b"):
        same_tensors(tmp_path / "back" / name, source / name)
    setups = [
        json.loads((folder / "adapter_setup.json").read_text()) for folder in (tmp_path / "back", source)
    ]
    assert setups[0] == setups[1]
    assert (
        main(
            [
                "convert",
                str(source),
                "--model",
                str(base),
                "--name",
                "x",
                "--output-dir",
                str(tmp_path / "no"),
            ]
        )
        == 2
    )
    assert "leave out --name" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_command_line_converts_a_fusion_both_ways(goldens: Path, tmp_path: Path) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    base, source = tmp_path / "base", golden.folder / "fusion_bin"
    golden.base().save_pretrained(base)
    assert main(["convert", str(source), "--model", str(base), "--output-dir", str(tmp_path / "here")]) == 0
    assert main(["convert", str(tmp_path / "here"), "--output-dir", str(tmp_path / "back")]) == 0
    same_tensors(tmp_path / "back", source)


def trained_here(base: Any, members: Any, **settings: Any) -> PeftModel:
    model = get_peft_model(base, members, "a")
    model.add_adapter("b", members)
    model.add_adapter("mix", FusionConfig(members=["a", "b"], **settings))
    return model


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (BottleneckConfig.preset("seq_bn"), {"temperature": 2.0}, r"temperature=2\.0"),
        (BottleneckConfig.preset("seq_bn"), {"regularization": 0.5}, "0.01 or none, not 0.5"),
        (LoraConfig(target_modules=["query"]), {}, "fuses bottleneck adapters only"),
    ],
)
def test_what_adapterhub_cannot_say_is_not_written(
    goldens: Path, members: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    golden = Golden(goldens / "bert" / "compose_fuse")
    model = trained_here(golden.base(), members, **settings)
    with pytest.raises(ValueError, match=message):
        write_adapterhub(
            tmp_path,
            golden.base(),
            model.peft_config["mix"],
            get_peft_model_state_dict(model, adapter_name="mix"),
            "a,b",
        )
    assert not list(tmp_path.iterdir())
