"""Adapters whose start changed the base: their files, loaded again, converted to plain LoRA, and exchanged with PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from inlay import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from inlay.files.checkpoint import load_peft_weights
from tiny_models import output_of, tiny, tiny_inputs

peft = pytest.importorskip("peft")
of_peft = pytest.mark.filterwarnings("ignore")  # what PEFT warns of is not the subject


def adapted(layer: nn.Module, how: Any, **settings: Any) -> PeftModel:
    """Return a model of one layer with an adapter that starts in a certain way."""
    config = LoraConfig(
        target_modules=["0"], init_lora_weights=how, **({"r": 4, "lora_alpha": 12} | settings)
    )
    return get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "loftq"])
def test_a_trained_adapter_is_loaded_onto_the_same_base(how: str, use_dora: bool, tmp_path: Any) -> None:
    inputs = tiny_inputs("gpt2")
    settings = {"loftq_config": LoftQConfig(loftq_bits=4)} if how == "loftq" else {}
    config = LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=how, use_dora=use_dora, **settings
    )
    model = get_peft_model(tiny("gpt2"), config)
    train(model)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(output_of(loaded, inputs), output_of(model.eval(), inputs))


def train(model: nn.Module) -> None:
    """Change every trained number of a model, as training would."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("pattern", [False, True], ids=["uniform", "patterns"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha_by_r", "rslora"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_1", "olora", "gaussian", "orthogonal"])
def test_conversion_to_plain_lora(how: str, use_rslora: bool, pattern: bool, tmp_path: Any) -> None:
    patterns = {"rank_pattern": {"c_fc": 6}, "alpha_pattern": {"h.0.attn.c_attn": 20}} if pattern else {}
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["c_attn", "c_fc", "wte"], init_lora_weights=how, use_rslora=use_rslora,
        modules_to_save=["ln_f"], **patterns,
    )  # fmt: skip
    model = get_peft_model(untied("gpt2"), config)
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    loaded = PeftModel.from_pretrained(untied("gpt2"), tmp_path / "plain")
    plain: Any = loaded.peft_config["default"]
    assert (plain.r, plain.init_lora_weights) == (8, True)
    inputs = tiny_inputs("gpt2")
    torch.testing.assert_close(
        output_of(loaded, inputs), output_of(model.eval(), inputs), rtol=1e-4, atol=1e-4
    )


def untied(name: str) -> Any:
    """Return a tiny language model whose output layer has a weight of its own."""
    model = tiny(name)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_conversion_of_dora_keeps_its_lengths(how: str, tmp_path: Any) -> None:
    layer, x = nn.Conv2d(3, 9, 3, padding=1), torch.randn(2, 3, 6, 6)
    model = adapted(layer, how, use_dora=True)
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    loaded = PeftModel.from_pretrained(nn.Sequential(layer), tmp_path / "plain")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_impossible_conversions_are_refused(tmp_path: Any) -> None:
    initial = str(tmp_path / "initial")
    model = adapted(nn.Linear(12, 10), "pissa", r=2)
    model.save_pretrained(initial)
    larger = adapted(nn.Linear(12, 10), "pissa", r=3)
    with pytest.raises(
        ValueError,
        match=r"before its training: .*lora_A.weight, of shape \(3, 12\), has shape \(2, 12\) there",
    ):
        larger.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    quantising = adapted(nn.Linear(12, 10), "loftq", r=2, loftq_config=LoftQConfig())
    with pytest.raises(ValueError, match="init_lora_weights='loftq' cannot be converted"):
        quantising.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    assert not (tmp_path / "plain").exists()


def test_parameters_on_the_meta_device_are_not_initialised(tmp_path: Any) -> None:
    model = adapted(nn.Linear(12, 10), "orthogonal")
    train(model)
    model.save_pretrained(tmp_path)
    base, x = copy.deepcopy(nn.Sequential(nn.Linear(12, 10))), torch.randn(3, 12)
    state = torch.get_rng_state()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), state)
    usual = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), usual(x))


# ---------------------------------------------------------------------- PEFT


def both(how: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """Return a tiny Llama with the same adapter, by Inlay and by PEFT."""
    common = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": how,
    } | settings
    ours = get_peft_model(tiny("llama", dtype), LoraConfig(**common))
    return ours, peft.get_peft_model(tiny("llama", dtype), peft.LoraConfig(**common))


@of_peft
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha_by_r", "rslora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_base_and_product_are_those_of_peft(how: str, dtype: torch.dtype, use_rslora: bool) -> None:
    ours, theirs = both(how, dtype, use_rslora=use_rslora)
    names = [name for name, module in ours.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 6
    tolerance: dict[str, float] = {"rtol": 0, "atol": 0.02 if dtype == torch.bfloat16 else 2e-6}
    for name in names:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        torch.testing.assert_close(mine.base_layer.weight, other.base_layer.weight, **tolerance)
        torch.testing.assert_close(
            mine.get_delta_weight("default").float(), other.get_delta_weight("default").float(), **tolerance
        )
        if how == "olora" and dtype == torch.float32:
            assert torch.equal(mine.lora_A["default"].weight, other.lora_A["default"].weight)
            assert torch.equal(mine.lora_B["default"].weight, other.lora_B["default"].weight)


@of_peft
@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_trained_adapters_are_exchanged_with_peft(how: str, tmp_path: Any) -> None:
    inputs = tiny_inputs("llama")
    for model, other in zip(both(how), (peft.PeftModel, PeftModel), strict=True):
        train(model)
        model.save_pretrained(tmp_path)
        loaded = other.from_pretrained(tiny("llama"), tmp_path)
        torch.testing.assert_close(
            output_of(loaded, inputs), output_of(model.eval(), inputs), rtol=1e-4, atol=1e-4
        )


@of_peft
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_conversion_writes_what_peft_writes(how: str, settings: dict[str, Any], tmp_path: Any) -> None:
    _, theirs = both(how, **settings)
    initial = str(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(initial)
    train(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "plain_peft", path_initial_model_for_weight_conversion=initial)
    ours = PeftModel.from_pretrained(tiny("llama"), tmp_path / "raw")
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    mine, other = load_peft_weights(tmp_path / "plain"), load_peft_weights(tmp_path / "plain_peft")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    configs = [peft.LoraConfig.from_pretrained(tmp_path / name) for name in ("plain", "plain_peft")]
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert getattr(configs[0], name) == getattr(configs[1], name)
    loaded = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "plain")
    inputs = tiny_inputs("llama")
    torch.testing.assert_close(
        output_of(loaded, inputs), output_of(theirs.eval(), inputs), rtol=1e-4, atol=1e-4
    )
