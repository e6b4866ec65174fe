"""Outputs and all gradients of the layers are MindPet's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inlay.mindpet import PrefixLayer
from mindpet.mindpet_cases import CASES, CLASSES, DENSE, Golden, inlay_name

DTYPES = {"Float16": torch.float16, "Float32": torch.float32}


def results(layer: nn.Module, y: Tensor, gy: Tensor, x: Tensor | None = None) -> dict[str, Tensor]:
    """Return the gradients of sum(y gy) by name."""
    named = dict(layer.named_parameters()) | ({} if x is None else {"x": x})
    grads = torch.autograd.grad((y * gy).sum(), list(named.values()))
    return dict(zip(named, grads, strict=True))


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("layer", CASES)
def test_all_golden_cases_are_tried(shared: Path, layer: str) -> None:
    told = json.loads((shared / "goldens" / "mindpet" / f"{layer}.json").read_text())
    assert [case["name"] for case in told["cases"]] == CASES[layer]


@pytest.mark.parametrize(("layer", "case"), DENSE)
def test_outputs_and_gradients_in_mindpets_dtypes(shared: Path, layer: str, case: str) -> None:
    golden = Golden(shared, layer, case)
    compute = DTYPES[golden.settings["compute_dtype"]]
    built = golden.build(compute_dtype=compute, param_init_type=DTYPES[golden.settings["param_init_type"]])
    x = golden["x"].requires_grad_()
    y = built(x)
    assert y.dtype == x.dtype
    atol = 2e-2 if compute == torch.float16 else 1e-5
    exact = "tanh" in str(golden.settings["hyper"])  # MindSpore's tanh is off by 1.5e-5
    agree({"y": y}, {"y": golden["out64" if exact else "out"]}, atol)
    agree(results(built, y, golden["gy"], x), golden.group("grad64" if exact else "grad"), atol)


@pytest.mark.parametrize(("layer", "case"), DENSE)
def test_outputs_and_gradients_in_float64(shared: Path, layer: str, case: str) -> None:
    golden = Golden(shared, layer, case)
    built = golden.build(compute_dtype=torch.float64, param_init_type=torch.float64)
    x = golden["x"].double().requires_grad_()
    y = built(x)
    agree({"y": y}, {"y": golden["out64"]}, 1e-12)
    agree(results(built, y, golden["gy"], x), golden.group("grad64"), 1e-7)


@pytest.mark.parametrize(("layer", "case"), DENSE)
def test_parameters_are_those_of_mindpet(shared: Path, layer: str, case: str) -> None:
    golden = Golden(shared, layer, case)
    built = golden.build()
    shapes = {inlay_name(name): shape for name, shape in golden.settings["weights"].items()}
    assert {name: list(p.shape) for name, p in built.named_parameters()} == shapes
    trained = {name for name, p in built.named_parameters() if p.requires_grad}
    assert trained == {inlay_name(name) for name in golden.settings["trainable_default"]}


@pytest.mark.parametrize("case", CASES["prefix_layer"])
def test_a_prefix_is_mindpets_and_has_the_gradients_that_mindpet_lacks(shared: Path, case: str) -> None:
    golden = Golden(shared, "prefix_layer", case)
    layer = golden.build()
    assert isinstance(layer, PrefixLayer)
    for past, name in zip((layer.past_key, layer.past_value), ("past_key", "past_value"), strict=True):
        agree({"y": past}, {"y": golden[name]}, 1e-5)
    assert all(not grad.any() for grad in golden.group("grad_actual").values())  # MindPet trains nothing
    layer.double()
    for past in (layer.past_key, layer.past_value):
        agree({"y": past}, {"y": golden["out64"]}, 1e-12)
        agree(results(layer, past, golden["gy"]), golden.group("grad64_if_reparam_were_live"), 1e-7)


@pytest.mark.parametrize("case", CASES["prefix_encoder"])
def test_prefixes_of_all_layers_are_mindpets(shared: Path, case: str) -> None:
    golden = Golden(shared, "prefix_encoder", case)
    batch_size = golden.settings["hyper"]["batch_size"]
    encoder = golden.build()
    y = torch.stack(encoder(batch_size))
    agree({"y": y}, {"y": golden["out"]}, 1e-5)
    agree(results(encoder, y, golden["gy"]), golden.group("grad"), 1e-5)
    half = encoder(batch_size, torch.float16)
    assert {past.dtype for past in half} == {torch.float16}
    agree({"y": torch.stack(half)}, {"y": golden["out_default_half"]}, 2e-3)
    encoder.double()
    y = torch.stack(encoder(batch_size, torch.float64))
    agree({"y": y}, {"y": golden["out64"]}, 1e-12)
    agree(results(encoder, y, golden["gy"]), golden.group("grad64"), 1e-7)


def test_every_layer_has_goldens() -> None:
    from inlay import mindpet

    assert sorted(CLASSES.values()) == mindpet.__all__ == dir(mindpet)
