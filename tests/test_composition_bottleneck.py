"""Compositions of adapters that act on a module's output: bottlenecks, alone and together with adapters of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from composition_models import CLOSE, Chain, chain_input, run, with_adapters
from inlay import (
    Average,
    BatchSplit,
    BitFitConfig,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    LoraConfig,
    Parallel,
    PeftModel,
    Split,
    Stack,
)
from inlay.composition import Block
from tiny_models import output_of, tiny, tiny_inputs

SERIES: dict[str, Any] = {"bottleneck_size": 3, "non_linearity": "swish"}


def chain() -> PeftModel:
    """Return a Chain with bottlenecks a and b behind its "down" layers, c behind "up" too, and LoRA on "down"."""
    return with_adapters(
        Chain().double(),
        {
            "a": BottleneckConfig(target_modules=["down"], **SERIES),
            "b": BottleneckConfig(target_modules=["down"], ln_after=True, **SERIES),
            "c": BottleneckConfig(target_modules=["up", "down"], parallel=True, scaling="learned", **SERIES),
            "lora": LoraConfig(r=2, target_modules=["down"]),
            "dora": LoraConfig(r=2, use_dora=True, target_modules=["down"]),
        },
    )


def explicit(model: PeftModel, node: Any, x: Tensor, y: Tensor, outside: Any) -> Tensor:
    """Return what a composition of bottlenecks makes of an output."""
    if isinstance(node, str):
        slot = outside.slots.get(node)
        return y if slot is None else slot.method.after(slot, x, y)
    if isinstance(node, Stack):
        for child in node.children:
            y = explicit(model, child, x, y, outside)
        return y
    if isinstance(node, Average):
        changes = [explicit(model, child, x, y, outside) - y for child in node.children]
        return y + sum((w * d for w, d in zip(node.weights, changes, strict=True)), torch.zeros_like(y))
    axis = 1 if isinstance(node, Split) else 0
    sizes = getattr(node, "splits", None) or getattr(node, "batch_sizes", None)
    sizes = list(sizes or [len(x) // len(node.children)] * len(node.children))
    parts = zip(node.children, x.split(sizes, axis), y.split(sizes, axis), strict=True)
    return torch.cat([explicit(model, child, *part, outside) for child, *part in parts], axis)


@pytest.mark.parametrize(
    "block",
    [
        Average("a", "b", weights=[0.25, 0.5]),
        Average("a", "b", "c"),
        Split("a", "c", splits=[1, 3]),
        BatchSplit("c", "b", batch_sizes=[1, 2]),
        Stack("a", Average("b", "c")),
        Stack(Split("a", "b", splits=2), "c"),
        BatchSplit(Stack("a", "b"), Average("a", "c", weights=[2.0, -1.0]), batch_sizes=[2, 1]),
    ],
    ids=str,
)
def test_a_block_is_what_its_formula_says(block: Block) -> None:
    model, x = chain(), chain_input().requires_grad_()
    y = run(model, block, x)

    def layer(i: int, part: str, x: Tensor) -> Tensor:
        outside = model.get_base_model().layers[i][part]  # type: ignore[index,union-attr]
        with model.disable_adapter():
            return explicit(model, block, x, outside.get_base_layer()(x), outside)

    expected = x
    for i in range(2):
        expected = expected + layer(i, "down", torch.tanh(layer(i, "up", expected)))
    torch.testing.assert_close(y, expected, **CLOSE)
    trained = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (
        torch.autograd.grad((out * y.detach().cos()).sum(), [x, *trained], allow_unused=True)
        for out in (y, expected)
    )
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_bottlenecks_upon_adapters_of_weights() -> None:
    model, x = chain(), chain_input()
    alone = run(model, Stack("lora", "a"), x)
    assert torch.equal(run(model, Stack("a", "lora"), x), alone)  # a weight is there before its output
    torch.testing.assert_close(run(model, [Average("lora"), Average("a")], x), alone, **CLOSE)
    y = run(model, Parallel(Stack("dora", "a"), "b", "lora"), x)
    for i, same in enumerate((["dora", "a"], "b", "lora")):
        torch.testing.assert_close(y[3 * i : 3 * i + 3], run(model, same, x), **CLOSE)


def test_a_fusion_of_bottlenecks_upon_another(tmp_path: Any) -> None:
    model, x = chain(), chain_input()
    model.add_adapter("mix", FusionConfig(members=["a", "b"]))
    places = {n.rpartition(".fusion_query")[0] for n, _ in model.named_parameters() if "fusion_query" in n}
    assert {p.rsplit(".", 1)[-1] for p in places} == {"down"} and len(places) == 2
    y = run(model, Stack("c", Fuse("a", "b")), x)
    y.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "fusion_value" in n)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    torch.manual_seed(1)
    again = with_adapters(Chain().double(), {"c": model.peft_config["c"]})
    again.get_base_model().load_state_dict(  # type: ignore[union-attr]
        {k: v for k, v in model.get_base_model().state_dict().items() if ".c" in k or "base_layer" in k},
        strict=False,
    )
    again.load_adapter(tmp_path / "mix", "mix")
    assert sorted(again.peft_config) == ["a", "b", "c", "mix"]
    for one, other in zip(again.base_model.own_slots("mix"), model.base_model.own_slots("mix"), strict=True):
        torch.testing.assert_close(one.parameters(), other.parameters(), rtol=0, atol=0)


def test_half_precision_keeps_small_changes() -> None:
    """An average of twins is the adapter also where the difference of two outputs would be rounding alone."""
    model = with_adapters(
        tiny("bert", torch.float64), {"a": BottleneckConfig(placement="feedforward", original_ln_before=True)}
    )
    slot = next(model.base_model.own_slots("a"))
    r, y = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    exact = slot.method.after(slot, r, y) - y
    torch.testing.assert_close(slot.method.change(slot, r, y), exact, **CLOSE)
    y = (y * 200).bfloat16()
    model.float()
    wanted = slot.method.change(slot, r.float(), y.float())
    model.bfloat16()
    small = slot.method.change(slot, r.bfloat16(), y)
    assert (small - wanted).norm() < 0.03 * wanted.norm()
    rounded = slot.method.after(slot, r.bfloat16(), y) - y
    assert (rounded - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_rows_of_transformers_are_those_of_separate_runs(name: str) -> None:
    """Also where the model's norms, which the bottlenecks use, are adapted themselves."""
    norms = ["LayerNorm"] if name == "bert" else ["ln_1", "ln_2", "ln_f"]
    model = with_adapters(
        tiny(name, torch.float64),
        {
            "a": BottleneckConfig(placement="both", original_ln_before=True),
            "b": BottleneckConfig(placement="feedforward", parallel=True, scaling=4.0),
            "n": BitFitConfig(target_modules=norms),
            "m": BitFitConfig(target_modules=norms),
        },
    )
    inputs, alone = tiny_inputs(name), []
    pair = Stack("n", "a"), Stack("m", "b"), Stack("m", "a")
    for stack in pair:
        model.set_adapter(stack)
        alone.append(output_of(model, inputs))
    model.set_adapter(Parallel(*pair))
    torch.testing.assert_close(output_of(model, inputs), torch.cat(alone), **CLOSE)
    model.set_adapter(BatchSplit(*pair, batch_sizes=1))
    torch.testing.assert_close(
        output_of(model, inputs), torch.stack([y[i] for i, y in enumerate(alone)]), **CLOSE
    )
    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), output_of(tiny(name, torch.float64), inputs))


def test_what_passes_the_norm_by_stands_alone() -> None:
    told = {"placement": "feedforward", "original_ln_after": False}
    model = with_adapters(
        tiny("bert", torch.float64),
        {n: BottleneckConfig(**told) for n in "ab"} | {"l": LoraConfig(target_modules=["query"])},
    )
    inputs = tiny_inputs("bert")
    for block in (Average("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 2])):
        model.set_adapter(block)
        with pytest.raises(
            ValueError, match=r"passes the model's normalisation by \(original_ln_after=False\)"
        ):
            output_of(model, inputs)
    model.set_adapter(["l", "a"])
    expected = output_of(model, inputs)
    model.set_adapter(Stack(Average("l"), "a"))
    torch.testing.assert_close(output_of(model, inputs), expected, **CLOSE)


def test_one_bottleneck_runs_no_composition_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import inlay.layers.output

    def refuse(*args: object) -> None:
        raise AssertionError("composition code ran")

    monkeypatch.setattr(inlay.layers.output, "after_composed", refuse)
    model, x = chain(), chain_input()
    run(model, ["a", "b", "lora"], x)
    with pytest.raises(AssertionError, match="composition code ran"):
        run(model, Average("a", "b"), x)
