"""How parameters start: MindPet's statistics, MindSpore's names, and objects in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inlay.mindpet import AdapterDense, LoRADense, LowRankAdapterDense, PrefixEncoder, PrefixLayer
from inlay.mindpet.initial_values import _BY_NAME, fill
from mindpet.mindpet_cases import INDICES, inlay_name

LAYERS = {
    "LoRADense(400,300,r8)": lambda: LoRADense(400, 300, 8, 16),
    "AdapterDense(400,300,b64)": lambda: AdapterDense(400, 300, bottleneck_size=64),
    "LowRankAdapterDense(400,300,rf4,r2)": lambda: LowRankAdapterDense(
        400, 300, reduction_factor=4, low_rank_size=2
    ),
    "PrefixLayer": lambda: PrefixLayer(100, 2, 4, 256, 128),
    "PrefixEncoder": lambda: PrefixEncoder(64, 4, 4, 16, True, 128, 0.1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_start_as_mindpets(shared: Path, name: str) -> None:
    """Deviation and bounds, within what samples of these sizes scatter; the mean within four standard errors."""
    stats = json.loads((shared / "goldens" / "mindpet" / "init_stats.json").read_text())["stats"]
    assert set(stats) == set(LAYERS)
    wanted = {inlay_name(n): told for n, told in stats[name].items() if n not in INDICES}
    found = dict(LAYERS[name]().named_parameters())
    assert found.keys() == wanted.keys()
    for key, told in wanted.items():
        value, std = found[key].detach(), told["std"]
        assert list(value.shape) == told["shape"]
        if std == 0:
            assert not value.any(), key
            continue
        scatter = 4 / value.numel() ** 0.5  # of two samples, and more than that of a normal distribution
        assert value.std().item() == pytest.approx(std, rel=max(scatter, 0.01)), key
        assert abs(value.mean().item()) < 4 * std / value.numel() ** 0.5, key
        uniform = told["max"] < 2 * std
        assert (value.abs().max() < 2 * std * (1 + scatter)).item() is uniform, key


def test_a_lora_layer_starts_as_its_base() -> None:
    layer = LoRADense(12, 9, 4, 16)
    base = nn.Linear(12, 9)
    assert layer.load_state_dict(base.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(
    ("name", "std", "bound"),
    [
        ("normal", 0.01, 0.1),
        ("truncatedNormal", 0.0088, 0.02),
        ("uniform", 0.07 / 3**0.5, 0.07),
        ("xavier_uniform", (2 / 500) ** 0.5, (6 / 500) ** 0.5),
        ("XavierUniform", (2 / 500) ** 0.5, (6 / 500) ** 0.5),
        ("xavier_normal", (2 / 500) ** 0.5, 1),
        ("he_uniform", (2 / 300) ** 0.5, (6 / 300) ** 0.5),
        ("he_normal", (2 / 300) ** 0.5, 1),
        ("zeros", 0, 0),
        ("zero", 0, 0),
        ("one", 0, 1),
        ("ones", 0, 1),
    ],
)
def test_names_of_mindspore(name: str, std: float, bound: float) -> None:
    value = torch.empty(200, 300)
    fill("Layer", "weight_init", value, name)
    assert value.std().item() == pytest.approx(std, rel=0.02)
    assert value.abs().max() <= bound


def test_orthogonal_and_identity() -> None:
    value = torch.empty(3, 5)
    fill("Layer", "weight_init", value, "orthogonal")
    torch.testing.assert_close(value @ value.T, torch.eye(3))
    fill("Layer", "weight_init", value, "identity")
    assert torch.equal(value, torch.eye(3, 5))
    assert len(_BY_NAME) == 11


def test_numbers_tensors_and_functions() -> None:
    given = torch.randn(2, 4)
    layer = LoRADense(4, 3, 2, 4, 0.0, given, nn.init.ones_, weight_init=0.5, bias_init=-1)
    assert torch.equal(layer.mindpet_delta_lora_a, given)
    given.zero_()
    assert layer.mindpet_delta_lora_a.any()  # a copy
    assert bool((layer.mindpet_delta_lora_b == 1).all() and (layer.weight == 0.5).all())
    assert layer.bias is not None and layer.bias.tolist() == [-1, -1, -1]

    def countdown(tensor: Tensor) -> None:
        tensor.copy_(torch.arange(tensor.numel(), 0, -1).view(tensor.shape))

    low = LowRankAdapterDense(4, 6, reduction_factor=2, low_rank_w_init=countdown)
    up = low.mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_up_sampler
    assert up.mindpet_delta_low_rank_adapter_weight_left.tolist() == [[3], [2], [1]]
    assert up.mindpet_delta_low_rank_adapter_weight_right.tolist() == [[6, 5, 4, 3, 2, 1]]
