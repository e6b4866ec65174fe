"""What the law leaves open for VeRA: the pair that all layers share, files with and without it, and its cost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inlay import AdapterFileError, PeftModel, VeraConfig, get_peft_model
from inlay.kinds import kind_of

FILE = "adapter_model.safetensors"


def net(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


def config(**settings: object) -> VeraConfig:
    return VeraConfig(**({"r": 5, "target_modules": ["0", "2"]} | settings))  # type: ignore[arg-type]


def trained(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator)
    return model.eval()


def test_one_pair_serves_all_layers_and_is_not_trained() -> None:
    model = get_peft_model(net(), config())
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {
        "vera_lambda_b",
        "vera_lambda_d",
    }
    assert model.get_nb_trainable_parameters()[0] == (12 + 5) + (4 + 5)
    model(torch.randn(3, 6))
    method = model.base_model.methods["default"]
    ((a, b),) = method.copies.values()
    assert (a.shape, b.shape) == ((5, 12), (12, 5))
    assert a.data_ptr() == method.pair[0].data_ptr()  # in float32 on the CPU: the drawn tensors themselves


def test_the_input_is_not_kept_for_backward() -> None:
    model = get_peft_model(net(64)[:1], config(target_modules=["0"]))
    x = torch.randn(50, 6)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)


def test_a_file_with_the_pair_and_one_without(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    for name, save in (("with", True), ("without", False)):
        model = trained(get_peft_model(net(), config(save_projection=save, projection_prng_key=7)))
        model.save_pretrained(tmp_path / name)
        state = load_file(tmp_path / name / FILE)
        assert ("base_model.vera_A" in state) == save
        assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / name)(x), model(x))
    assert (tmp_path / "without" / FILE).stat().st_size < (tmp_path / "with" / FILE).stat().st_size


def test_the_pair_of_a_file_is_used_not_that_of_the_seed(tmp_path: Path) -> None:
    model = trained(get_peft_model(net(), config()))
    x = torch.randn(3, 6)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    state["base_model.vera_A"] = 2 * state["base_model.vera_A"]
    save_file(state, tmp_path / FILE)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    with torch.no_grad():
        for layer in model.base_model.layers():
            layer.slots["default"]["vera_lambda_d"].mul_(2)
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert torch.equal(
        loaded.merge_and_unload()(x), PeftModel.from_pretrained(net(), tmp_path).merge_and_unload()(x)
    )


def test_a_pair_that_is_missing_or_too_small_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    trained(get_peft_model(net(), config())).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    base = net()
    before = copy.deepcopy(base.state_dict())
    save_file({k: v for k, v in state.items() if k != "base_model.vera_B"}, tmp_path / FILE)
    with pytest.raises(AdapterFileError, match=r"base_model\.vera_B"):
        PeftModel.from_pretrained(base, tmp_path)
    save_file(state | {"base_model.vera_B": state["base_model.vera_B"][:11].contiguous()}, tmp_path / FILE)
    with pytest.raises(AdapterFileError, match=r"vera_B has the shape \(11, 5\).*at least \(12, 5\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before.keys()


def test_two_adapters_have_pairs_of_their_own() -> None:
    model = trained(get_peft_model(net(), config()))
    x = torch.randn(3, 6)
    alone = model(x)
    model.add_adapter(
        "other", config(r=9, projection_prng_key=3)
    )  # PEFT refuses another seed and a higher rank
    assert torch.equal(model(x), alone)
    model.set_adapter("other")
    trained(model)
    assert not torch.allclose(model(x), alone)
    model.delete_adapter("other")
    assert torch.equal(model(x), alone)


def test_half_precision_and_moves() -> None:
    model = trained(get_peft_model(net().to(torch.bfloat16), config()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(3, 6)
    narrow = model(x.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(model.float()(x), narrow.float(), atol=0.2, rtol=0.1)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "positive integer"),
        ({"vera_dropout": 1.0}, r"vera_dropout=1.0 is not a probability"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_biases_of_the_adapted_layers(tmp_path: Path) -> None:
    model = get_peft_model(net(), config(bias="vera_only", target_modules=["0"]))
    names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert names == ["base_model.model.0.base_layer.bias"]
    model.save_pretrained(tmp_path)
    assert "base_model.model.0.base_layer.bias" in load_file(tmp_path / FILE)
    with pytest.raises(NotImplementedError, match="vera_only"):
        get_peft_model(net(), config(bias="lora_only"))


def test_a_normalisation_is_refused() -> None:
    layer = nn.LayerNorm(4)
    assert kind_of(layer) is not None
    with pytest.raises(ValueError, match="normalisation"):
        get_peft_model(nn.Sequential(layer), config(target_modules=["0"]))
