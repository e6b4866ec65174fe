"""What the law leaves open for LoHa, LoKr and OFT: settings, how values start, dropout, several blocks of a rotation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import LoHaConfig, LoKrConfig, OFTConfig, PeftModel, get_peft_model
from inlay.methods.lokr import split


def adapted(config: Any, layer: nn.Module | None = None) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(layer or nn.Linear(12, 10)), config)


def trained(config: Any, layer: nn.Module | None = None) -> PeftModel:
    model = adapted(config, layer)
    with torch.no_grad():
        for p in model.base_model.adapter_parameters("default"):
            p += 0.3 * torch.randn_like(p)
    return model


def rotation(model: PeftModel, sign: int = 1) -> Tensor:
    """Return the exact R of the first layer."""
    slot = model.base_model.model[0].slots["default"]
    size, blocks = slot["oft_block_size"], []
    for row in slot["oft_R"].weight.detach():
        q = torch.zeros(size, size)
        q[torch.ones(size, size).triu(1).bool()] = sign * row
        q, eye = q - q.mT, torch.eye(size)
        blocks.append((eye + q) @ torch.linalg.inv(eye - q))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("layer", [nn.Linear(12, 10), nn.Conv2d(3, 10, 2)], ids=["linear", "conv2d"])
def test_blocks_of_a_rotation_turn_their_own_inputs(layer: nn.Module) -> None:
    model = trained(OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=False), layer)
    base, turn = layer.weight.detach().flatten(1), rotation(model, -1)
    assert torch.allclose(turn @ turn.mT, torch.eye(12), atol=1e-5)
    merged = model.merge_and_unload()[0].weight
    assert torch.allclose(merged.flatten(1), base @ turn.mT, atol=1e-5)
    assert torch.allclose(merged.flatten(1).norm(dim=1), base.norm(dim=1), atol=1e-5)


def test_the_series_comes_near_the_rotation() -> None:
    errors = []
    for terms in (2, 3, 5, 8, 40):
        model = trained(OFTConfig(target_modules=["0"], oft_block_size=4, num_cayley_neumann_terms=terms))
        w = model.base_model.model[0].base_layer.weight.detach().clone()
        for p in model.base_model.adapter_parameters("default"):
            p.data *= 0.5
        wanted = w @ rotation(model).mT
        errors.append(float((model.merge_and_unload()[0].weight - wanted).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < 0.05 < errors[0]


def test_a_size_that_does_not_fit_is_replaced_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="oft_block_size=5 does not divide the 12 features of 0; 4 is used"):
        model = adapted(OFTConfig(target_modules=["0"], oft_block_size=5))
    assert model.base_model.model[0].oft_R["default"].weight.shape == (3, 6)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["0"], rank_dropout=0.5),
        LoKrConfig(r=2, target_modules=["0"], rank_dropout=0.5),
        LoKrConfig(r=2, target_modules=["0"], rank_dropout=0.5, rank_dropout_scale=True),
    ],
    ids=["loha", "lokr", "lokr_scaled"],
)
def test_rank_dropout_leaves_out_the_update_of_some_outputs(config: Any) -> None:
    model, x = trained(config), torch.randn(5, 12)
    with model.disable_adapter():
        base = model(x)
    full = model.eval()(x) - base
    seen = model.train()(x) - base
    factors = seen.mean(0) / full.mean(0)
    kept = factors.abs() > 1e-3
    assert 0 < int(kept.sum()) < 10
    scale = 10 / int(kept.sum()) if getattr(config, "rank_dropout_scale", False) else 1.0
    assert torch.allclose(seen, torch.where(kept, scale * full, 0.0), atol=1e-5)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig], ids=["loha", "lokr"])
def test_module_dropout_leaves_out_whole_updates(config: Any) -> None:
    model, x = trained(config(r=2, target_modules=["0"], module_dropout=0.5)), torch.randn(5, 12)
    full = model.eval()(x)
    with model.disable_adapter():
        base = model(x)
    model.train()
    seen = [model(x) for _ in range(20)]
    assert all(torch.allclose(y, full) or torch.equal(y, base) for y in seen)
    assert 2 < sum(torch.equal(y, base) for y in seen) < 18


def test_dropout_of_a_rotation_leaves_blocks_as_they_are() -> None:
    model = trained(OFTConfig(target_modules=["0"], oft_block_size=4, module_dropout=0.5))
    x = torch.eye(12)
    with model.disable_adapter():
        base = model(x)
    full, changed = model.eval()(x), []
    for _ in range(20):
        y = model.train()(x)
        turned = [bool((y - base)[i : i + 4].abs().max() > 1e-3) for i in (0, 4, 8)]
        assert all(
            torch.allclose(y[4 * i : 4 * i + 4], (full if t else base)[4 * i : 4 * i + 4], atol=1e-5)
            for i, t in enumerate(turned)
        )
        changed.append(sum(turned))
    assert {1, 2} <= set(changed)


def test_dropout_is_refused_where_the_layer_runs_through_merged_weights() -> None:
    x = torch.randn(2, 3, 8)
    for config in (
        LoHaConfig(r=2, target_modules=["0"], rank_dropout=0.5),
        LoKrConfig(r=2, target_modules=["0"], module_dropout=0.5),
    ):
        model = get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), config).train()
        with pytest.raises(ValueError, match="dropout"):
            model.base_model.model[0](x, x, x)
        model.eval().base_model.model[0](x, x, x)


def test_half_precision_does_not_round_small_updates_away() -> None:
    model = adapted(LoHaConfig(r=2, target_modules=["0"]), nn.Linear(12, 10, bias=False).to(torch.bfloat16))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
            getattr(layer, name)["default"].fill_(0.05)
    x = torch.zeros(12, 12, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, -1.0
    with torch.no_grad():
        layer.hada_w2_b["default"][:, 1] = 0.0
        assert 4e-5 < float(model(x)[0, 0]) < 2e-4  # 4 * (2 * 0.05^2)^2, beside weights of 1


@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        (LoHaConfig, {"r": 0}, "positive integer"),
        (LoHaConfig, {"rank_dropout": 1.5}, r"rank_dropout=1.5 is not a probability"),
        (LoHaConfig, {"layers_pattern": "h"}, "layers_to_transform"),
        (LoKrConfig, {"init_weights": "lora"}, "init_weights='lora'; known"),
        (LoKrConfig, {"decompose_factor": 0}, "decompose_factor=0"),
        (OFTConfig, {"r": 4}, "r=4 and oft_block_size=32"),
        (OFTConfig, {"r": 0, "oft_block_size": 0}, "r=0 and oft_block_size=0"),
        (OFTConfig, {"coft": True}, "coft=True is not implemented"),
        (OFTConfig, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms=0"),
    ],
)
def test_values_that_cannot_be_are_refused(config: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        config(target_modules=["0"], **settings)


@pytest.mark.parametrize("size", [1, 7, 12, 250, 360, 1024])
@pytest.mark.parametrize("largest", [-1, 1, 4, 8, 1000])
def test_a_split_is_the_most_even_one_that_is_allowed(size: int, largest: int) -> None:
    first, second = split(size, largest)
    assert first * second == size
    if largest > 0 and size % largest == 0:
        assert first == largest
    else:
        most = min(math.isqrt(size), largest if largest > 0 else size)
        assert first <= most and not any(size % n == 0 for n in range(first + 1, most + 1))
