"""What every layer goes through: shapes, dtypes, autocast, compilers, copies, files, pretrained weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inlay import mindpet
from inlay.mindpet import AdapterDense, AdapterLayer, LoRADense, LowRankAdapterDense, LowRankAdapterLayer

HALVES = [torch.float16, torch.bfloat16]
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LoRADense": lambda **d: LoRADense(16, 12, 4, 8, activation="gelu", **d),
    "AdapterLayer": lambda **d: AdapterLayer(16, 6, "prelu", **d),
    "AdapterDense": lambda **d: AdapterDense(16, 12, activation="relu", bottleneck_size=6, **d),
    "LowRankAdapterLayer": lambda **d: LowRankAdapterLayer(16, 2, 3, **d),
    "LowRankAdapterDense": lambda **d: LowRankAdapterDense(16, 12, reduction_factor=2, low_rank_size=3, **d),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def filled(name: str, **dtypes: torch.dtype) -> nn.Module:
    """Return a layer whose parameters are all far from zero."""
    layer = LAYERS[name](**dtypes)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def test_every_layer_is_tried() -> None:
    assert {*LAYERS, "PrefixEncoder", "PrefixLayer"} == set(mindpet.__all__)


@every_layer
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape(name: str, shape: tuple[int, ...]) -> None:
    layer = filled(name)
    x = torch.randn(*shape, 16)
    y = layer(x)
    assert y.shape[:-1] == shape
    rows = x.reshape(-1, 16)
    torch.testing.assert_close(y.reshape(-1, y.shape[-1]), layer(rows))
    spread = torch.randn(16, *shape).movedim(0, -1)  # not contiguous
    torch.testing.assert_close(layer(spread), layer(spread.contiguous()))


@every_layer
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision_computation(name: str, half: torch.dtype) -> None:
    layer, wide = filled(name, compute_dtype=half), LAYERS[name]()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16)
    y = layer(x)
    assert y.dtype == torch.float32 and not torch.equal(y, wide(x))
    torch.testing.assert_close(y, wide(x), atol=0.1, rtol=0.05)
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in layer.parameters())


@every_layer
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_model_moved_to_half_precision(name: str, half: torch.dtype) -> None:
    """Parameters and activations are half; the products are computed in float32 until asked otherwise."""
    layer = filled(name)
    wide = copy.deepcopy(layer)
    layer = layer.half() if half == torch.float16 else layer.bfloat16()
    assert {p.dtype for p in layer.parameters()} == {half}
    x = torch.randn(5, 16).to(half)
    y = layer(x)
    assert y.dtype == half
    torch.testing.assert_close(y.float(), wide(x.float()), atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {half}


@every_layer
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_parameters_made_in_half_precision(name: str, half: torch.dtype) -> None:
    layer = LAYERS[name](param_init_type=half, compute_dtype=half)
    assert {p.dtype for p in layer.parameters()} == {half}
    assert layer(torch.randn(5, 16).to(half)).dtype == half


@every_layer
def test_autocast(name: str) -> None:
    layer = filled(name)
    x = torch.randn(5, 16, requires_grad=True)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert not torch.equal(y, wanted)  # its products were bf16
    torch.testing.assert_close(y, wanted, atol=0.2, rtol=0.05)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@every_layer
def test_compiled_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    layer = filled(name)
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    grads = [torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer)]
    torch.testing.assert_close(*grads)


@every_layer
def test_copies_files_and_pickles(name: str) -> None:
    layer = filled(name).eval()
    x = torch.randn(5, 16)
    wanted = layer(x)
    twin = copy.deepcopy(layer)
    for p in layer.parameters():
        p.data.zero_()
    assert torch.equal(twin(x), wanted)
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer(x), wanted)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


@every_layer
def test_made_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    shapes = {key: p.shape for key, p in layer.named_parameters()}
    assert shapes == {key: p.shape for key, p in LAYERS[name]().named_parameters()}


@every_layer
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer = filled(name, param_init_type=torch.float64, compute_dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        y: Tensor = torch.func.functional_call(layer, named, (x,))
        return y

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize("name", ["LoRADense", "AdapterDense", "LowRankAdapterDense"])
def test_a_pretrained_linear_layer_is_loaded_by_its_names(name: str) -> None:
    layer, linear = LAYERS[name](), nn.Linear(16, 12)
    keys = layer.load_state_dict(linear.state_dict(), strict=False)
    assert keys.unexpected_keys == [] and all("mindpet_delta" in key for key in keys.missing_keys)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


@every_layer
def test_what_is_printed(name: str) -> None:
    assert "compute_dtype=torch.float32" in repr(LAYERS[name]())
