"""Ways to start LoRA: what they put into the factors, what they leave in the base, and who may use them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay import AdaptedLayer, LoftQConfig, LoraConfig, PeftModel, get_peft_model
from inlay.inits import INITS, changes_base
from inlay.inits.decompose import leading_part, leading_part_fast
from inlay.inits.loftq import normal_levels, quantised
from tiny_models import output_of, tiny, tiny_inputs

EXACT = ["pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "gaussian"]
CHANGING = ["pissa", "pissa_niter_2", "olora"]
KINDS: dict[str, Any] = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(5, 12)),
    "conv1d_gpt2": lambda: (Conv1D(10, 12), torch.randn(5, 12)),
    "conv2d": lambda: (nn.Conv2d(3, 9, 3, padding=1), torch.randn(2, 3, 6, 6)),
    "embedding": lambda: (nn.Embedding(30, 8), torch.randint(0, 30, (2, 7))),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def adapted(layer: nn.Module, how: Any, **settings: Any) -> tuple[PeftModel, AdaptedLayer]:
    """Return a model of one layer with an adapter that starts in a certain way, and the layer."""
    config = LoraConfig(
        target_modules=["0"], init_lora_weights=how, **({"r": 4, "lora_alpha": 12} | settings)
    )
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    return model, model.get_base_model()[0]


def product(layer: AdaptedLayer, name: str = "default") -> Tensor:
    """Return s B A in the layer's own layout."""
    return layer.get_delta_weight(name)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", EXACT)
def test_starts_as_the_layer_itself(how: str, kind: str, dtype: torch.dtype, use_dora: bool) -> None:
    layer, x = KINDS[kind]()
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    model, wrapped = adapted(layer, how, use_dora=use_dora)
    y = layer(x)
    torch.testing.assert_close(model(x), y, rtol=0, atol=8 * torch.finfo(dtype).eps * y.abs().max().item())
    assert wrapped.base_layer.weight.dtype == dtype
    assert torch.equal(wrapped.base_layer.weight, layer.weight) != (how in CHANGING)
    assert not wrapped.base_layer.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_holds_the_leading_components(kind: str) -> None:
    layer, _ = KINDS[kind]()
    _, wrapped = adapted(layer.double(), "pissa")
    values = torch.linalg.svdvals(wrapped.kind.matrix(layer.weight))
    torch.testing.assert_close(torch.linalg.svdvals(wrapped.kind.matrix(product(wrapped)))[:4], values[:4])
    torch.testing.assert_close(torch.linalg.svdvals(wrapped.base_matrix())[0], values[4])


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_3", "olora", "loftq"])
def test_the_same_weight_is_always_taken_apart_in_the_same_way(how: str) -> None:
    layer = nn.Linear(64, 48)
    settings = {"loftq_config": LoftQConfig()} if how == "loftq" else {}
    torch.manual_seed(1)
    first = adapted(layer, how, **settings)[1]
    torch.manual_seed(2)
    second = adapted(layer, how, **settings)[1]
    assert torch.equal(first.base_layer.weight, second.base_layer.weight)
    assert torch.equal(product(first), product(second))


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)], ids=["tall", "wide"])
def test_fast_decomposition_agrees_with_the_exact_one(shape: tuple[int, int]) -> None:
    u, _ = torch.linalg.qr(torch.randn(200, 120))
    v, _ = torch.linalg.qr(torch.randn(120, 120))
    w = u * torch.arange(1, 121).float().rsqrt() @ v
    w = w if shape == (200, 120) else w.mT
    exact, fast = leading_part(w, 8), leading_part_fast(w, 8, 16)
    torch.testing.assert_close(fast[0] * fast[1] @ fast[2], exact[0] * exact[1] @ exact[2], rtol=0, atol=1e-4)
    assert (
        [part.shape for part in exact]
        == [part.shape for part in fast]
        == [(shape[0], 8), (8,), (8, shape[1])]
    )


def test_orthogonal_factors_are_not_zero_and_have_gradients() -> None:
    model, wrapped = adapted(nn.Linear(12, 10), "orthogonal")
    model(torch.randn(3, 12)).square().sum().backward()
    for factor in (wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight):
        assert factor.abs().mean() > 0.01
        assert factor.grad.abs().max() > 0  # type: ignore[union-attr]


# ---------------------------------------------------------------------- LoftQ


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_loftq_comes_closer_than_its_quantised_base(kind: str, bits: int) -> None:
    layer, _ = KINDS[kind]()
    for rounds in (1, 5):
        config = LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
        _, wrapped = adapted(layer, "loftq", loftq_config=config)
        base = wrapped.base_layer.weight
        assert torch.equal(base, quantised(layer.weight, bits)) == (rounds == 1)
        assert (base + product(wrapped) - layer.weight).norm() < 0.9 * (base - layer.weight).norm()


def test_loftq_leaves_a_base_that_quantising_again_does_not_change() -> None:
    w = torch.randn(24, 50)
    for bits in (2, 4, 8):
        q = quantised(w, bits)
        torch.testing.assert_close(quantised(q, bits), q, rtol=1e-6, atol=1e-7)
        assert q.abs().max() <= w.abs().max() * (1 + 1e-6)
    assert torch.equal(quantised(torch.zeros(3, 5), 4), torch.zeros(3, 5))


def test_levels_are_those_of_nf4() -> None:
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(normal_levels(4).tolist(), published, rtol=0, atol=3e-7)
    assert len(normal_levels(2)) == 4


def test_quantised_weights_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    w = 0.02 * torch.randn(24, 50)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    torch.testing.assert_close(
        quantised(w, 4), bnb.functional.dequantize_4bit(packed, state), rtol=0, atol=1e-7
    )
    rows, scale, _ = bnb.functional.int8_vectorwise_quant(w.half())
    torch.testing.assert_close(
        quantised(w.half().float(), 8), rows.float() * scale[:, None] / 127, rtol=1e-3, atol=1e-6
    )


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pisa"}, "Unknown initialization init_lora_weights='pisa'"),
        ({"init_lora_weights": "pissa_niter_x"}, "Unknown initialization"),
        ({"init_lora_weights": "olora_niter_4"}, "Unknown initialization"),
        ({"init_lora_weights": "loftq"}, "`loftq_config` must be specified"),
    ],
)
def test_impossible_configurations_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_impossible_loftq_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="loftq_bits=3 is not possible; choose 2, 4 or 8"):
        LoftQConfig(loftq_bits=3)
    with pytest.raises(ValueError, match="loftq_iter=0"):
        LoftQConfig(loftq_iter=0)
    with pytest.raises(ValueError, match="loftq_bits=5 is not possible"):
        adapted(nn.Linear(8, 8), "loftq", loftq_config={"loftq_bits": 5})


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "loftq"])
def test_what_a_matrix_does_not_have_is_refused(how: str) -> None:
    settings = {"loftq_config": LoftQConfig()} if how == "loftq" else {}
    layer = nn.Linear(12, 3)
    with pytest.raises(ValueError, match=r"cannot take r=4 components of .*3 x 12 and has 3; lower r"):
        adapted(layer, how, **settings)
    with pytest.raises(ValueError, match="choose lora_alpha > 0"):
        adapted(nn.Linear(12, 8), how, lora_alpha=0, **settings)
    with pytest.raises(
        ValueError, match=r"needs a layer with one matrix, and .*Conv.* a matrix for each of its groups"
    ):
        adapted(nn.Conv2d(8, 8, 3, groups=2), how, **settings)


@pytest.mark.parametrize("how", ["pissa", "orthogonal"])
def test_experts_are_refused(how: str) -> None:
    model = tiny("mixtral")
    parameters = ["experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=how)
    with pytest.raises(
        ValueError, match=r"Experts.* holds a matrix for each expert; use init_lora_weights=True"
    ):
        get_peft_model(model, config)


def test_orthogonal_refuses_odd_ranks() -> None:
    with pytest.raises(ValueError, match=r"needs an even rank, and r is 3 on .*; choose 4"):
        adapted(nn.Linear(8, 8), "orthogonal", r=3)


def test_a_base_that_others_rely_on_is_not_changed() -> None:
    model, wrapped = adapted(nn.Linear(12, 10), True)
    before = wrapped.base_layer.weight.clone()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match=r"changing the base weights, which adapters \['default'\] were made for"
    ):
        model.add_adapter("other", config)
    assert torch.equal(wrapped.base_layer.weight, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_tied_layers_start_as_they_were_and_stay_tied(how: str) -> None:
    base = tiny("llama_tied")
    inputs = tiny_inputs("llama_tied")
    before = output_of(base, inputs)
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=how, ensure_weight_tying=True)
    model = get_peft_model(base, config)
    torch.testing.assert_close(output_of(model, inputs), before, rtol=1e-4, atol=1e-4)
    inner, outer = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert inner.base_layer.weight is outer.base_layer.weight


@pytest.mark.filterwarnings("ignore:.*share one weight")
def test_a_tied_layer_keeps_its_weight() -> None:
    base = tiny("llama_tied")
    inputs = tiny_inputs("llama_tied")
    before = output_of(base, inputs)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa"))
    torch.testing.assert_close(output_of(model, inputs), before)


def test_every_initialisation_says_whether_it_changes_the_base() -> None:
    assert {name for name, how in INITS.items() if how.changes_base} == {"pissa", "olora", "loftq"}
    assert changes_base(LoraConfig(init_lora_weights="pissa_niter_4"))
    assert not changes_base(LoraConfig())


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_a_refusal_leaves_every_layer_as_it_was(how: str) -> None:
    base = nn.Sequential(nn.Linear(12, 10), nn.Conv2d(8, 8, 3, groups=2))
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match="needs a layer with one matrix, and 1 "):
        get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=how))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
