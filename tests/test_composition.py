"""Compositions against explicit calculation, and the laws they obey."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import inlay.layers.layer
from composition_models import (
    ALL,
    CLOSE,
    bert_or_gpt2,
    chain,
    chain_input,
    each_layer,
    run,
    weights_of,
)
from inlay import Average, BatchSplit, Parallel, PeftModel, Split, Stack
from inlay.composition import Block
from tiny_models import output_of, tiny_inputs


def gradients(model: PeftModel, y: Tensor, x: Tensor) -> list[Tensor | None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((y * y.detach().cos()).sum(), [x, *trained], allow_unused=True))


def reference(model: PeftModel, node: Any, x: Tensor) -> Tensor:
    """Return what a Chain puts out, each adapter by its merged weight."""
    merged = {name: weights_of(model, name) for name in model.peft_config}

    def layer(node: Any, path: str, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if isinstance(node, str):
            return F.linear(x, *merged[node][path])
        if isinstance(node, Stack):  # of additive adapters
            y = F.linear(x, w, b)
            return y + sum((layer(c, path, x, w, b) - y for c in node.children), torch.zeros_like(y))
        if isinstance(node, Average):
            y = F.linear(x, w, b)
            return y + sum(
                (s * (layer(c, path, x, w, b) - y) for c, s in zip(node.children, node.weights, strict=True)),
                torch.zeros_like(y),
            )
        axis = 1 if isinstance(node, Split) else 0
        sizes = getattr(node, "splits", None) or getattr(node, "batch_sizes", None)
        sizes = sizes or [x.shape[0] // len(node.children)] * len(node.children)
        parts, start = [], 0
        for child, size in zip(node.children, sizes, strict=True):
            parts.append(layer(child, path, x.narrow(axis, start, size), w, b))
            start += size
        assert start == x.shape[axis]
        return torch.cat(parts, axis)

    return each_layer(model, lambda path, x, w, b: layer(node, path, x, w, b), x)


BLOCKS = [
    Average("lora", "wide", weights=[0.25, 0.75]),
    Average("lora", "dora", "ia3", "bitfit", "shira"),
    Average("dora", "ia3", weights=[0.4, 0.6]),
    Average("shira", "wide", weights=[1.5, -0.5]),
    BatchSplit("lora", "dora", batch_sizes=[2, 1]),
    BatchSplit("shira", "ia3", "bitfit", batch_sizes=1),
    Split("lora", "ia3", splits=[3, 1]),
    Split("dora", "shira", splits=2),
    Stack("lora", BatchSplit("wide", "bitfit", batch_sizes=[1, 2])),
    Stack(Average("lora", "dora", weights=[0.3, 0.4]), "wide", "bitfit"),
    Average(Stack("lora", "wide"), Split("dora", "bitfit", splits=[1, 3]), weights=[0.5, 2.0]),
    BatchSplit(Average("lora", "ia3"), Split("wide", "dora", splits=2), batch_sizes=[2, 1]),
    Stack(Split("lora", "wide", splits=2), Average("bitfit", "wide")),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_what_its_formula_says(block: Block, training: bool) -> None:
    model = chain().train(training)
    x = chain_input().requires_grad_()
    y = run(model, block, x)
    expected = reference(model, block, x)
    torch.testing.assert_close(y, expected, **CLOSE)
    for found, wanted in zip(gradients(model, y, x), gradients(model, expected, x), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_an_average_of_one_or_of_twins_is_the_adapter(name: str) -> None:
    """AdapterHub divides twice: its average of two identical adapters is half of the adapter."""
    model, x = chain(name), chain_input()
    alone = run(model, name, x)
    model.add_adapter("twin", copy.deepcopy(model.peft_config[name]))
    for one, other in zip(model.base_model.own_slots("twin"), model.base_model.own_slots(name), strict=True):
        for key, value in other.saved().items():
            one.saved()[key].data.copy_(value)
    torch.testing.assert_close(run(model, Average(name), x), alone, **CLOSE)
    torch.testing.assert_close(run(model, Average(name, "twin"), x), alone, **CLOSE)
    torch.testing.assert_close(run(model, Average(name, "twin", weights=[3.0, -2.0]), x), alone, **CLOSE)


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ["lora", "dora", "shira"])
def test_rows_are_those_of_separate_runs(first: str, second: str) -> None:
    model, x = chain(*dict.fromkeys((first, second))), chain_input()
    alone = {name: run(model, name, x) for name in (first, second)}
    y = run(model, BatchSplit(first, second, batch_sizes=[1, 2]), x)
    torch.testing.assert_close(y, torch.cat([alone[first][:1], alone[second][1:]]), **CLOSE)
    y = run(model, Parallel(first, second, first), x)
    torch.testing.assert_close(y, torch.cat([alone[first], alone[second], alone[first]]), **CLOSE)


def test_a_stack_is_the_list() -> None:
    model, x = chain(), chain_input()
    for names in (["lora", "wide"], ["lora", "dora"], ["ia3", "shira", "lora"], ["wide"]):
        expected = run(model, names, x)
        for same in (Stack(*names), [Stack(*names)], Stack(Stack(*names[:1]), *names[1:])):
            assert torch.equal(run(model, same, x), expected)
            assert model.base_model.switch.setting.composition is None
            assert model.active_adapters == names


def test_a_stack_ends_with_an_adapter_of_weights() -> None:
    """DoRA upon an average acts on the averaged weight."""
    model, x = chain(), chain_input()
    y = run(model, Stack(Average("lora", "ia3", weights=[0.5, 0.25]), "dora"), x)
    lora, ia3 = weights_of(model, "lora"), weights_of(model, "ia3")

    def layer(path: str, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        (w_l, b_l), (w_i, b_i) = lora[path], ia3[path]
        mean = w + 0.5 * (w_l - w) + 0.25 * (w_i - w), b + 0.5 * (b_l - b) + 0.25 * (b_i - b)
        slot = model.get_base_model().get_submodule(path).slots["dora"]  # type: ignore[union-attr,operator,index]
        return F.linear(x, *slot.method.merge(slot, *mean))

    torch.testing.assert_close(y, each_layer(model, layer, x), **CLOSE)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if all(type(x) in (Average, Stack) for x in [b])], ids=str
)
def test_merging_is_running(block: Block) -> None:
    model, x = chain(), chain_input()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(model, block, x)
    if "Split" in repr(block):
        with pytest.raises(ValueError, match="cannot be written into the weights"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, **CLOSE)
        model.merge_adapter()  # again: nothing is left to do
        with pytest.raises(ValueError, match="call unmerge_adapter"):
            model.set_adapter(block)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        assert all(torch.equal(before[k], after[k]) for k in before)
        model.merge_adapter(adapter_names=["bitfit"])
        if "bitfit" in model.active_adapters:
            with pytest.raises(ValueError, match="cannot be merged upon other adapters"):
                model.merge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), expected, **CLOSE)
    if "Split" in repr(block):
        assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------- models of transformers


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_rows_of_transformers_are_those_of_separate_runs(name: str) -> None:
    model, inputs = bert_or_gpt2(name), tiny_inputs(name)
    alone = {}
    for adapter in "abc":
        model.set_adapter(adapter)
        alone[adapter] = output_of(model, inputs)
    model.set_adapter(Parallel("a", "b", "c"))
    torch.testing.assert_close(output_of(model, inputs), torch.cat(list(alone.values())), **CLOSE)
    model.set_adapter(BatchSplit("c", "a", batch_sizes=[1, 2]))
    torch.testing.assert_close(output_of(model, inputs), torch.cat([alone["c"][:1], alone["a"][1:]]), **CLOSE)
    model.set_adapter(Stack("a", Parallel("b", "c")))
    y = output_of(model, inputs)
    model.set_adapter(["a", "c"])
    torch.testing.assert_close(y[3:], output_of(model, inputs), **CLOSE)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_average_of_transformers_is_its_merged_model(name: str) -> None:
    model, inputs = bert_or_gpt2(name), tiny_inputs(name)
    model.set_adapter(Average("a", "b", "c", weights=[0.7, 0.2, 0.4]))
    y = output_of(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, inputs), y, **CLOSE)


def test_disabled_is_the_base_bit_for_bit() -> None:
    from tiny_models import tiny

    base = output_of(tiny("bert", torch.float64), tiny_inputs("bert"))
    model = bert_or_gpt2("bert")
    for block in (Average("a", "c"), Parallel("a", "b"), Split("a", "b", splits=3)):
        model.set_adapter(block)
        with model.disable_adapter():
            assert torch.equal(output_of(model, tiny_inputs("bert")), base)
    model.add_adapter("nothing", copy.deepcopy(model.peft_config["b"]))  # B is zero
    model.set_adapter(Parallel("a", "nothing"))
    assert torch.equal(output_of(model, tiny_inputs("bert"))[3:], base)


def test_parallel_repeats_labels_and_masks_and_generates() -> None:
    model, inputs = bert_or_gpt2("gpt2"), tiny_inputs("gpt2")
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    losses, texts = [], []
    for adapter in "ac":
        model.set_adapter(adapter, inference_mode=True)
        losses.append(model(input_ids=ids, attention_mask=mask, labels=ids).loss)
        texts.append(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        )
    model.set_adapter(Parallel("a", "c"), inference_mode=True)
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean())  # transformers computes it in float32
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
    length = min(found.shape[1], *(t.shape[1] for t in texts))
    assert torch.equal(found[:, :length], torch.cat([t[:, :length] for t in texts]))
    model.set_adapter(Split("a", "c", splits=3))
    with pytest.raises(ValueError, match="cached generation feeds one token at a time"):
        model.generate(input_ids=ids, max_new_tokens=2)


# ---------------------------------------------------------------------- switching


def test_one_active_adapter_runs_no_composition_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain(), chain_input()
    model.set_adapter(Average("lora", "wide"))
    model.set_adapter("lora")

    def refuse(*args: object) -> None:
        raise AssertionError("composition code ran")

    monkeypatch.setattr(inlay.layers.layer, "run_composed", refuse)
    model(x).sum().backward()
    model.set_adapter(["lora", "wide"])
    model(x)
    model.set_adapter(Average("lora", "wide"))
    with pytest.raises(AssertionError, match="composition code ran"):
        model(x)


def test_additive_adapters_need_one_base_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain("lora", "wide", "bitfit"), chain_input()
    products = []
    for layer in model.base_model.layers():
        layer.get_base_layer().register_forward_hook(lambda *_: products.append(1))
    run(model, Stack(Average("lora", "wide"), "bitfit"), x)
    assert len(products) == 4


def test_training_and_freezing_follow_the_blocks() -> None:
    model = chain()
    model.set_adapter(Average("lora", "dora"))
    on = {n.split(".")[-2] if "bias" not in n else n for n, p in model.named_parameters() if p.requires_grad}
    assert on and all("lora" in n or "dora" in n for n in on)
    assert model.active_adapters == ["lora", "dora"]
    model.set_adapter(Average("wide", "bitfit"), inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_adapter_beside_a_composition_is_deleted_and_one_in_it_is_not() -> None:
    model, x = chain("lora", "wide", "bitfit"), chain_input()
    model.set_adapter(Average("lora", "wide"))
    y = model(x)
    model.delete_adapter("bitfit")
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="wide takes part in Average"):
        model.delete_adapter("wide")
    assert torch.equal(model(x), y)
    model.set_adapter("lora")
    model.delete_adapter("wide")
    assert torch.equal(model(x), run(model, "lora", x))


def test_routes_and_threads_keep_working() -> None:
    model, x = chain("lora", "dora"), chain_input()
    alone = {name: run(model, name, x) for name in ("lora", "dora")}
    mean = run(model, Average("lora", "dora"), x)
    y = model(x, adapter_names=["dora", "__base__", "lora"])
    torch.testing.assert_close(y[0], alone["dora"][0], **CLOSE)
    found: dict[str, Tensor] = {}

    def base() -> None:
        with model.disable_adapter():
            found["base"] = model(x)

    with model.base_model.switch.within(active=("lora",), composition=None):
        thread = threading.Thread(target=base)
        thread.start()
        thread.join()
        torch.testing.assert_close(model(x), alone["lora"], **CLOSE)
    assert torch.equal(model(x), mean)
    with model.disable_adapter():
        assert torch.equal(found["base"], model(x))
    for block in (Parallel("lora", "dora"), BatchSplit("lora", "dora", batch_sizes=[1, 2])):
        model.set_adapter(block)
        with pytest.raises(ValueError, match="adapter_names cannot be used under"):
            model(x, adapter_names=["lora"] * 3)


def test_a_single_layer_set_apart_leaves_the_composition() -> None:
    model, x = chain("lora", "wide"), chain_input()
    model.set_adapter(Average("lora", "wide"))
    layer = next(model.base_model.layers())
    layer.set_adapter("lora")
    torch.testing.assert_close(layer(x), F.linear(x, *weights_of(model, "lora")["layers.0.up"]), **CLOSE)
    model.set_adapter(Average("lora", "wide"))
    assert not torch.allclose(layer(x), F.linear(x, *weights_of(model, "lora")["layers.0.up"]))


@pytest.mark.parametrize(
    "block",
    [
        Stack(Average("lora", "dora"), "bitfit"),
        BatchSplit("lora", Split("ia3", "wide", splits=2), batch_sizes=[1, 2]),
        Parallel("lora", "ia3"),
    ],
    ids=str,
)
def test_compiles_into_one_graph(block: Block) -> None:
    model, x = (
        chain("lora", "wide", "bitfit", "dora", "ia3", dtype=torch.float32),
        chain_input(dtype=torch.float32),
    )
    model.set_adapter(block)
    expected = model(x)
    expected.sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(model.base_model, fullgraph=True, backend="eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from inlay import LoraConfig, get_peft_model
    from tiny_models import tiny

    inputs, found = tiny_inputs("bert"), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("bert", torch.float64), LoraConfig(target_modules=["query"]), "a")
        model.add_adapter("b", LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model.set_adapter(Average("a", "b"))
        output_of(model, inputs).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(g.abs().max() > 0 for g in found[0])
    torch.testing.assert_close(found[0], found[1])


def test_a_deep_copy_keeps_the_composition() -> None:
    model, x = chain("lora", "dora"), chain_input()
    model.set_adapter(Average("lora", "dora", weights=[0.1, 0.8]))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("kind", ["conv", "norm", "embedding", "mha"])
def test_other_kinds_of_layers(kind: str) -> None:
    from torch import nn

    from composition_models import with_adapters
    from inlay import LNTuningConfig, LoraConfig

    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv1d(4, 6, 3, groups=2),
        "norm": nn.LayerNorm(4),
        "embedding": nn.Embedding(7, 4),
        "mha": nn.MultiheadAttention(4, 2, batch_first=True),
    }
    model = nn.ModuleDict({"layer": layers[kind]}).double()
    chosen = LNTuningConfig if kind == "norm" else LoraConfig
    peft_model = with_adapters(model, {n: chosen(target_modules=["layer"]) for n in "ab"})
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    layer = peft_model.get_base_model()["layer"]  # type: ignore[index]
    inputs = (x, x, x) if kind == "mha" else (torch.arange(6).view(3, 2),) if kind == "embedding" else (x,)

    def out() -> Tensor:
        y = layer(*inputs)
        return y[0] if kind == "mha" else y

    peft_model.set_adapter(Average("a", "b", weights=[0.5, 0.3]))
    y = out()
    peft_model.merge_adapter()
    torch.testing.assert_close(out(), y, **CLOSE)
    peft_model.unmerge_adapter()
    ys = []
    for name in "ab":
        peft_model.set_adapter(name)
        ys.append(out())
    peft_model.set_adapter(BatchSplit("a", "b", batch_sizes=[2, 1]))
    if kind == "mha":
        with pytest.raises(ValueError, match="need the batch as a whole"):
            out()
    else:
        torch.testing.assert_close(out(), torch.cat([ys[0][:2], ys[1][2:]]), **CLOSE)


def test_threads_at_the_same_time_do_not_disturb_each_other() -> None:
    model, x = chain("lora", "dora"), chain_input()
    mean = run(model, Average("lora", "dora"), x).detach()
    with model.disable_adapter():
        base = model(x).detach()
    wrong: list[str] = []

    def work(kind: str) -> None:
        for _ in range(50):
            if kind == "base":
                with model.disable_adapter():
                    right = torch.equal(model(x), base)
            elif kind == "route":
                right = torch.allclose(model(x, adapter_names=["__base__"] * 3), base)
            else:
                right = torch.equal(model(x), mean)
            if not right:
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("base", "mean", "route", "mean")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
