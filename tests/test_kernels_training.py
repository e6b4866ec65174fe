"""The fused functions inside training: checkpointing, autocast, compilation, memory, accuracy of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.kernels import dora_linear, dora_norm, lora_linear
from kernel_cases import (
    EVERYTHING,
    NAMES,
    SCALE,
    TOLERANCE,
    fused,
    gradients,
    leaves,
    make_tensors,
    reference,
    relative_error,
)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reproduces_the_mask(dora: bool, reentrant: bool) -> None:
    needed = EVERYTHING | ({"magnitude"} if dora else set())
    tensors = make_tensors()
    results = []
    for wrapped in (False, True):
        mine = leaves(tensors, needed)

        def run(x: Tensor, mine: dict[str, Tensor | None] = mine) -> Tensor:
            return fused({**mine, "x": x}, 0.5, dora).square()

        torch.manual_seed(4)
        y = checkpoint(run, mine["x"], use_reentrant=reentrant) if wrapped else run(mine["x"])
        y.sum().backward()
        results.append([y, *(mine[name].grad for name in sorted(needed))])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast_computes_like_linear(dora: bool) -> None:
    needed = {"x", "a", "b"} | ({"magnitude"} if dora else set())
    tensors = leaves(make_tensors(dtype=torch.float32), needed)
    truth = leaves(tensors, needed, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(tensors, 0.0, dora)
    assert y.dtype == torch.bfloat16
    expected = reference(truth, None, 0.0, dora)
    assert relative_error(y, expected) <= TOLERANCE[torch.bfloat16]
    wanted = gradients(expected, truth, needed)
    for name, got in gradients(y, tensors, needed).items():
        assert got.dtype == torch.float32
        assert relative_error(got, wanted[name]) <= TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_survives_torch_compile(p: float, dora: bool) -> None:
    needed = {"x", "a", "b"} | ({"magnitude"} if dora else set())
    tensors = leaves(make_tensors(dtype=torch.float32), needed)
    torch.manual_seed(2)
    y = fused(tensors, p, dora)
    torch.manual_seed(2)
    compiled = torch.compile(fused, backend="aot_eager")(tensors, p, dora)
    torch.testing.assert_close(compiled, y)
    wanted, got = gradients(y, tensors, needed), gradients(compiled, tensors, needed)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=name)


def saved_bytes(tensors: dict[str, Tensor | None], p: float, dora: bool) -> int:
    """Bytes kept for backward beyond the inputs themselves and the output."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    norm = dora_norm(tensors["weight"], tensors["a"], tensors["b"], SCALE) if dora else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x, weight, bias, a, b, magnitude = (tensors[name] for name in NAMES)
        if dora:
            y = dora_linear(x, weight, bias, a, b, magnitude, SCALE, p, norm)
        else:
            y = lora_linear(x, weight, bias, a, b, SCALE, p)
    known = [y, *(t for t in tensors.values() if t is not None), *([] if norm is None else [norm])]
    for t in known:
        seen.pop(t.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_thin_tensors_and_byte_masks_are_kept(dtype: torch.dtype, dora: bool) -> None:
    needed = {"x", "a", "b", "magnitude"}
    tensors = leaves(make_tensors(shape=(64, 24), dtype=dtype, master=torch.float32), needed)
    gains = 4 * tensors["b"].shape[0] if dora else 0  # one float32 for each output feature
    thin = 64 * 4 * dtype.itemsize + gains
    assert saved_bytes(tensors, 0.0, dora) == thin
    assert saved_bytes(tensors, 0.5, dora) == thin + 64 * 24


def test_frozen_a_keeps_the_thin_product_and_not_the_input() -> None:
    tensors = leaves(make_tensors(shape=(64, 24)), {"b"})
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        fused(tensors, 0.0, dora=False)
    assert (64, 24) not in kept and (64, 4) in kept


def llama_gradients(library: str, tokens: Tensor, dora: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the adapters of a small Llama whose weights are bf16 numbers, computed in `dtype`."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip(library)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=50, **sizes)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora)
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1).bfloat16())
    if dtype == torch.float64:
        model = model.double()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bf16_gradients_are_as_accurate_as_those_of_fp32_adapters(dora: bool) -> None:
    """PEFT casts activations up to its fp32 adapters; computing in bf16 must not show in a model's gradients."""
    tokens = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(2))
    truth = llama_gradients("peft", tokens, dora, torch.float64)
    errors = {}
    for library in ("inlay", "peft"):
        found = llama_gradients(library, tokens, dora, torch.bfloat16)
        errors[library] = sum(((found[n] - t).norm() / t.norm()).item() for n, t in truth.items()) / len(
            truth
        )
    assert errors["inlay"] <= 1.5 * errors["peft"], errors
