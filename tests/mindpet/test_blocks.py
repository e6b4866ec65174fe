"""The blocks that adapters are built of: a low-rank linear layer that never forms its weight, and the bottleneck's residual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from inlay.blocks import LowRankLinear, bottleneck_residual, low_rank_linear
from inlay.mindpet import LowRankAdapterLayer


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_the_product(bias: bool) -> None:
    layer = LowRankLinear(7, 5, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    weight = (layer.weight_left @ layer.weight_right).T
    wanted = nn.functional.linear(x, weight, layer.bias)
    named = [x, *layer.parameters()]
    gy = torch.randn_like(wanted)
    torch.testing.assert_close(layer(x), wanted)
    for mine, full in zip(
        torch.autograd.grad(layer(x), named, gy), torch.autograd.grad(wanted, named, gy), strict=True
    ):
        torch.testing.assert_close(mine, full, atol=1e-12, rtol=1e-12)


def test_parameters_and_how_they_start() -> None:
    layer = LowRankLinear(300, 200, 4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {"weight_left": (300, 4), "weight_right": (4, 200), "bias": (200,)}
    assert layer.bias is not None and not layer.bias.any()
    for factor in (layer.weight_left, layer.weight_right):
        bound = (6 / sum(factor.shape)) ** 0.5
        assert bound * 0.98 < factor.abs().max() <= bound
    assert LowRankLinear(3, 2, 1, bias=False).bias is None
    made = LowRankLinear(3, 2, 1, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}
    assert repr(made) == "LowRankLinear(3, 2, rank=1, bias=True)"


@pytest.mark.parametrize(("sizes", "argument"), [((0, 2, 1), "in_features=0"), ((2, -1, 1), "out_features=-1"), ((2, 2, 0), "rank=0")])  # fmt: skip
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int], argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1"):
        LowRankLinear(*sizes)


def test_the_bottleneck_is_the_input_plus_its_way_through() -> None:
    down, up = nn.Linear(6, 2), nn.Linear(2, 6)
    h = torch.randn(3, 4, 6)
    torch.testing.assert_close(bottleneck_residual(h, down, torch.tanh, up), h + up(torch.tanh(down(h))))


class LargestTensor(TorchDispatchMode):
    """Notes the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("width", [(768, 24), (24, 768)])
def test_the_product_of_the_factors_is_never_formed(width: tuple[int, int]) -> None:
    layer = LowRankLinear(*width, rank=1)
    x = torch.randn(5, width[0], requires_grad=True)
    with LargestTensor() as seen:
        layer(x).sum().backward()
    assert (5, width[1]) in seen.shapes
    assert not seen.shapes & {width, width[::-1]}


def flops(step: object) -> int:
    with FlopCounterMode(display=False) as counter:
        step().sum().backward()  # type: ignore[operator]
    return counter.get_total_flops()


def test_flops_are_below_those_of_the_materialised_form() -> None:
    """BERT's width, bottleneck 24, rank 1, 128 positions: forward and backward."""
    layer = LowRankAdapterLayer(768, 32)
    x = torch.randn(128, 768, requires_grad=True)

    def materialised() -> Tensor:
        h = x
        for sampler in (
            layer.mindpet_delta_low_rank_adapter_down_sampler,
            layer.mindpet_delta_low_rank_adapter_up_sampler,
        ):
            left = sampler.mindpet_delta_low_rank_adapter_weight_left
            right = sampler.mindpet_delta_low_rank_adapter_weight_right
            h = h @ (left @ right) + sampler.bias
        return x + h

    mine, full = flops(lambda: layer(x)), flops(materialised)
    # Each layer costs 2 n r (in + out) forward and twice that backward; the other 2 n in out, and the product itself.
    assert mine == 2 * 3 * 2 * 128 * (768 + 24)
    assert full == 2 * 3 * 2 * (128 * 768 * 24 + 768 * 24)
    assert full > 20 * mine


def test_low_rank_linear_without_a_bias() -> None:
    x, left, right = torch.randn(4, 8), torch.randn(8, 1), torch.randn(1, 6)
    torch.testing.assert_close(low_rank_linear(x, left, right), x @ (left @ right))
