"""AdapterFusion against its formula; its training, penalty, files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from composition_models import (
    CLOSE,
    Chain,
    bert_or_gpt2,
    chain,
    chain_input,
    each_layer,
    run,
    shake,
    weights_of,
)
from inlay import (
    AdaptedLayer,
    AdapterFileError,
    Average,
    Fuse,
    FusionConfig,
    LoraConfig,
    PeftModel,
    Stack,
    TaskType,
)
from tiny_models import output_of, tiny, tiny_inputs


def fused(*members: str, **settings: Any) -> PeftModel:
    model = chain(*members)
    model.add_adapter("mix", FusionConfig(members=list(members), **settings))
    shake(model, "mix")
    return model


def reference(model: PeftModel, members: tuple[str, ...], x: Tensor, temperature: float = 1.0) -> Tensor:
    """Return what a fused Chain puts out: keys and values of each member, as in the paper."""
    merged = {name: weights_of(model, name) for name in members}

    def layer(path: str, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        slot = model.get_base_model().get_submodule(path).slots["mix"]  # type: ignore[union-attr,operator,index]
        y = F.linear(x, w, b)
        u = torch.stack([F.linear(x, *merged[name][path]) - y for name in members], -2)
        scores = (slot["fusion_query"](y).unsqueeze(-2) * slot["fusion_key"](u)).sum(-1) / temperature
        return y + (scores.softmax(-1).unsqueeze(-1) * slot["fusion_value"](u)).sum(-2)

    return each_layer(model, layer, x)


@pytest.mark.parametrize("members", [("lora", "wide"), ("lora", "dora", "ia3"), ("shira", "bitfit")])
def test_a_fusion_is_what_its_formula_says(members: tuple[str, ...]) -> None:
    model, x = fused(*members, train_members=True, temperature=2.0), chain_input().requires_grad_()
    model.set_adapter("mix")
    trained = [p for p in model.parameters() if p.requires_grad]
    y, expected = model(x), reference(model, members, x, 2.0)
    torch.testing.assert_close(y, expected, **CLOSE)
    found, wanted = (
        torch.autograd.grad((out * y.detach().cos()).sum(), [x, *trained]) for out in (y, expected)
    )
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(
        model(x), y, rtol=0, atol=0
    )  # the temperature does not move (AdapterHub's does)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_fusion_starts_near_the_average_on_transformers(name: str) -> None:
    model, inputs = bert_or_gpt2(name), tiny_inputs(name)
    model.add_adapter("mix", FusionConfig(members=["a", "b", "c"]))
    for slot in model.base_model.own_slots("mix"):
        slot["fusion_query"].weight.data.zero_()
    for at, layer in ((path, m) for path, m in model.named_modules() if isinstance(m, AdaptedLayer)):
        assert ("mix" in layer.slots) == (len(layer.slots.keys() - {"mix"}) > 1), at
    model.set_adapter(Fuse("a", "b", "c"))
    y = output_of(model, inputs)
    for block in (Average("a", "b", "c"), Average("a", "c")):  # layers with three and with two members
        model.set_adapter(block)
        assert not torch.equal(output_of(model, inputs), y)
    query = next(layer for layer in model.base_model.layers() if len(layer.slots) == 4)
    x = torch.randn(2, 3, query.kind.in_features, dtype=torch.float64)
    model.set_adapter("mix")
    mixed = query(x)
    model.set_adapter(Average("a", "b", "c"))
    torch.testing.assert_close(mixed, query(x), **CLOSE)


def test_only_the_fusion_is_trained_and_can_be_switched() -> None:
    model, x = fused("lora", "wide"), chain_input()
    model.set_adapter("lora")
    alone = model(x)
    for asked in ("mix", Fuse("lora", "wide"), Fuse("lora", "wide", name="mix"), ["mix"]):
        model.set_adapter(asked)
        assert model.active_adapters == ["lora", "wide", "mix"]
        assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
            "fusion_query",
            "fusion_key",
            "fusion_value",
        }
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(run(model, "lora", x), alone)
    with pytest.raises(ValueError, match=r"runs its members \['lora', 'wide'\] itself"):
        model.set_adapter(["lora", "wide", "mix"])
    model.peft_config["mix"].train_members = True  # type: ignore[attr-defined]
    model.set_adapter("mix")
    assert sum(p.requires_grad for p in model.parameters()) == 4 * 4 + 2 * 2 * 4


def test_a_fusion_learns_which_adapter_fits() -> None:
    torch.manual_seed(0)
    model, x = chain("lora", "wide"), chain_input(16, 6)
    target = run(model, "wide", x).detach()
    model.add_adapter("mix", FusionConfig(members=["lora", "wide"]))
    model.set_adapter("mix")
    start = F.mse_loss(model(x), target).item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (F.mse_loss(model(x), target) + model.base_model.penalty()).backward()
        optimizer.step()
    assert F.mse_loss(model(x), target).item() < start / 5


def test_the_penalty_is_part_of_the_same_steps_loss() -> None:
    """AdapterHub's regulariser reaches the gradients one step late."""
    model = bert_or_gpt2("gpt2")
    model.add_adapter("mix", FusionConfig(members=["a", "b"], regularization=0.5))
    ids = tiny_inputs("gpt2")["input_ids"]
    model.set_adapter("mix")
    assert torch.equal(torch.as_tensor(model.base_model.penalty()), torch.zeros((), dtype=torch.float64))
    for slot in model.base_model.own_slots("mix"):
        slot["fusion_value"].weight.data[0, 1] = 2.0
    count = len(list(model.base_model.own_slots("mix")))
    torch.testing.assert_close(
        model.base_model.penalty(), torch.tensor(0.5 * 4.0 * count, dtype=torch.float64)
    )
    plain = model.eval()(input_ids=ids, labels=ids).loss
    penalised = model.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(
        penalised - plain, torch.tensor(2.0 * count, dtype=plain.dtype), check_dtype=False
    )
    model.peft_config["mix"].regularization = 0.0  # type: ignore[attr-defined]
    assert model.base_model.penalty() == 0.0


def test_half_precision_masters() -> None:
    model = chain("lora", "dora", dtype=torch.bfloat16)
    model.add_adapter("mix", FusionConfig(members=["lora", "dora"]))
    model.set_adapter("mix")
    y = model(chain_input(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_fusion_upon_a_language_adapter_compiles() -> None:
    model, x = chain("bitfit", "lora", "dora", dtype=torch.float32), chain_input(dtype=torch.float32)
    model.add_adapter("mix", FusionConfig(members=["lora", "dora"]))
    shake(model, "mix")
    expected = run(model, Stack("bitfit", "mix"), x)
    assert not torch.allclose(expected, run(model, "mix", x))
    model.set_adapter(Stack("bitfit", "mix"))
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- files


def test_a_fusion_is_saved_with_its_members_and_loaded_with_them(tmp_path: Path) -> None:
    model, x = fused("lora", "dora"), chain_input()
    y = run(model, "mix", x)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dora", "lora", "mix"]
    assert json.loads((tmp_path / "mix" / "adapter_config.json").read_text())["members"] == ["lora", "dora"]

    torch.manual_seed(1)
    again = PeftModel.from_pretrained(Chain().double(), tmp_path / "mix", adapter_name="mix")
    assert torch.equal(again(x), y) and not again.training
    assert again.active_adapters == ["lora", "dora", "mix"]
    assert not any(p.requires_grad for p in again.parameters())

    trained = PeftModel.from_pretrained(again.unload(), tmp_path, subfolder="mix", is_trainable=True)
    assert torch.equal(trained(x), y)
    assert all(("fusion" in n) == p.requires_grad for n, p in trained.named_parameters())

    hot = FusionConfig(members=["lora", "dora"], temperature=100.0)
    torch.manual_seed(1)
    changed = PeftModel.from_pretrained(Chain().double(), tmp_path / "mix", adapter_name="mix", config=hot)
    assert not torch.allclose(changed(x), y)

    third = chain("lora")
    third.load_adapter(tmp_path / "mix", "other")
    assert sorted(third.peft_config) == ["dora", "lora", "other"]
    assert torch.equal(run(third, "other", x), y)
    third.load_adapter(tmp_path / "mix", "other")  # values of one that is there


def test_a_fusion_named_default_with_its_members_inside(tmp_path: Path) -> None:
    model, x = chain("lora", "wide"), chain_input()
    model.add_adapter("default", FusionConfig(members=["lora", "wide"]))
    shake(model, "default")
    y = run(model, "default", x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    assert torch.equal(PeftModel.from_pretrained(Chain().double(), tmp_path)(x), y)


def test_a_fusion_of_a_task_brings_its_head(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_type": TaskType.SEQ_CLS}
    model = PeftModel.for_task[TaskType.SEQ_CLS](
        tiny("bert_classifier"),
        LoraConfig(target_modules=["query"], init_lora_weights=False, **settings),
        "default",
    )
    model.add_adapter("b", LoraConfig(target_modules=["query"], init_lora_weights=False, **settings))
    model.add_adapter("mix", FusionConfig(members=["default", "b"], **settings))
    shake(model, "mix")
    model.set_adapter("mix")
    y = output_of(model, tiny_inputs("bert"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert_classifier"), tmp_path / "mix", adapter_name="mix")
    assert type(again) is PeftModel.for_task[TaskType.SEQ_CLS]
    torch.testing.assert_close(output_of(again, tiny_inputs("bert")), y)


def test_a_fusion_without_its_members_is_not_loaded(tmp_path: Path) -> None:
    model = fused("lora", "wide")
    model.save_pretrained(tmp_path)
    for name in ("lora", "wide"):
        shutil.rmtree(tmp_path / "old", ignore_errors=True)
        (tmp_path / name).rename(tmp_path / "old")
        bare = Chain().double()
        with pytest.raises(
            ValueError, match=f"needs its member {name!r}, which is not beside it; load it first"
        ):
            PeftModel.from_pretrained(bare, tmp_path / "mix", "mix")
        assert all(p.requires_grad for p in bare.parameters())
        assert [k for k, _ in bare.named_parameters()] == [k for k, _ in Chain().named_parameters()]
        (tmp_path / "old").rename(tmp_path / name)
    with pytest.raises(ValueError, match="has a member 'lora' itself; load it by another name"):
        PeftModel.from_pretrained(Chain().double(), tmp_path / "mix", "lora")
    (tmp_path / "mix" / "adapter_model.safetensors").write_bytes(b"broken")
    other = chain("bitfit")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        other.load_adapter(tmp_path / "mix", "mix")
    assert list(other.peft_config) == ["bitfit"]


# ---------------------------------------------------------------------- refusals


def test_members_are_needed() -> None:
    model = fused("lora", "wide")
    with pytest.raises(
        ValueError, match=r"Adapter lora is a member of the fusions \['mix'\]; delete them first"
    ):
        model.delete_adapter("lora")
    model.delete_adapter("mix")
    model.delete_adapter("lora")
    assert not any("fusion" in n for n, _ in model.named_modules())


def test_fusions_that_cannot_be_are_refused() -> None:
    model = fused("lora", "wide")
    before = set(dict(model.named_parameters()))
    model.add_adapter("up", LoraConfig(target_modules=["layers.0.up"]))
    model.add_adapter("down", LoraConfig(target_modules=["layers.0.down"]))
    before = set(dict(model.named_parameters()))
    for members, message in [
        (["lora", "nobody"], "member 'nobody' is not loaded"),
        (["lora", "mix"], "'mix' is a fusion itself"),
        (["up", "down"], "sit on no layer together"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_adapter("x", FusionConfig(members=members))
    assert set(dict(model.named_parameters())) == before
    for settings, message in [
        ({"members": ["lora"]}, "two or more"),
        ({"members": ["a", "b"], "temperature": 0.0}, "temperature=0.0"),
        ({"members": ["a", "b"], "regularization": -1.0}, "regularization=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FusionConfig(**settings)


def test_a_fusion_is_not_merged_and_not_routed_to() -> None:
    model, x = fused("lora", "wide"), chain_input()
    model.set_adapter("mix")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be written into the weights"):
            merge()
    with pytest.raises(ValueError, match=r"'mix' \(Fusion\) is not linear, so it cannot be merged"):
        model.merge_adapter(adapter_names=["mix"])
    with pytest.raises(ValueError, match="adapter_names cannot name fusions"):
        model(x, adapter_names=["mix", "lora", "wide"])
    torch.testing.assert_close(model(x, adapter_names=["lora"] * 3), run(model, "lora", x), **CLOSE)


def test_two_fusions_of_the_same_members_need_a_name() -> None:
    model, x = fused("lora", "wide"), chain_input()
    model.add_adapter("mix2", FusionConfig(members=["lora", "wide"]))
    with pytest.raises(ValueError, match=r"name one of \['mix', 'mix2'\]"):
        model.set_adapter(Fuse("lora", "wide"))
    y = run(model, Fuse("lora", "wide", name="mix2"), x)
    assert torch.equal(y, run(model, "mix2", x)) and not torch.equal(y, run(model, "mix", x))


def test_a_member_that_joins_a_layer_later_is_noticed() -> None:
    model = chain("lora")
    model.add_adapter("up", LoraConfig(target_modules=["up"]))
    model.add_adapter("mix", FusionConfig(members=["lora", "up"]))
    layer = model.get_base_model().layers[0]["down"]  # type: ignore[index]
    layer.add("up", model.base_model.methods["up"], model.peft_config["up"], "layers.0.down")
    with pytest.raises(ValueError, match="meet on a layer that the fusion does not sit on"):
        run(model, "mix", chain_input())
