"""Blocks as values, what ``set_adapter`` refuses, saved modules under compositions, and the inputs of ``Parallel``."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from composition_models import chain, chain_input, run, shake, with_adapters
from inlay import (
    Average,
    BatchSplit,
    Fuse,
    FusionConfig,
    LoraConfig,
    Parallel,
    PeftModel,
    Split,
    Stack,
    get_peft_model,
)
from inlay.composition.inputs import repeated
from small_net import Net
from tiny_models import tiny, tiny_inputs


def test_blocks_are_values() -> None:
    block = Stack("lang", Average("a", "b", weights=[1, 2]), BatchSplit("c", "d", batch_sizes=3))
    assert block == Stack(
        "lang", Average("a", "b", weights=[1.0, 2.0]), BatchSplit("c", "d", batch_sizes=[3, 3])
    )
    assert len({block, pickle.loads(pickle.dumps(block))}) == 1
    assert block != Stack("lang") and Stack("a", "b") != Parallel("a", "b")
    assert (
        repr(block)
        == "Stack('lang', Average('a', 'b', weights=(1.0, 2.0)), BatchSplit('c', 'd', batch_sizes=(3, 3)))"
    )
    assert eval(repr(block)) == block
    with pytest.raises(AttributeError):
        block.children = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack(), r"Stack\(\) has no child"),
        (lambda: Average(), r"Average\(\) has no child"),
        (lambda: Stack(1), "takes names of adapters and blocks, not 1"),  # type: ignore[arg-type]
        (lambda: Average("a", "b", weights=[1.0]), "2 children but 1 weights"),
        (lambda: Average("a", weights=[float("nan")]), "finite numbers"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1]), "2 children but 1 batch_sizes"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1, 0]), "1 or more, not"),
        (lambda: Split("a", "b", splits=[-1, 2]), "1 or more, not"),
        (lambda: Split("a", "b", splits=[1.5, 2]), "whole numbers"),  # type: ignore[list-item]
        (lambda: Fuse("a"), "two or more different members"),
        (lambda: Fuse("a", "a"), "two or more different members"),
        (lambda: Fuse("a", Stack("b", "c")), "its members are names"),  # type: ignore[arg-type]
    ],
)
def test_bad_blocks_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Average("lora", "bitfti"), r"Adapter bitfti not found; did you mean 'bitfit'\?"),
        ("zzz", r"Adapter zzz not found\. There are: \['bitfit', 'lora'\]"),
        (BatchSplit(Parallel("lora", "bitfit"), "lora", batch_sizes=1), "can stand alone or in a Stack"),
        (Stack(Parallel("lora"), Parallel("bitfit")), "there can be one Parallel"),
        (Fuse("lora", "bitfit"), r"no fusion of \['lora', 'bitfit'\]; add one"),
        (Fuse("lora", "bitfit", name="x"), "there is no fusion 'x'"),
    ],
)
def test_bad_requests_change_nothing(asked: Any, message: str) -> None:
    model = chain("lora", "bitfit")
    model.set_adapter(Average("lora", "bitfit"))
    setting, trained = model.base_model.switch.setting, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.set_adapter(asked)
    assert model.base_model.switch.setting is setting
    assert [p.requires_grad for p in model.parameters()] == trained


def test_sizes_that_do_not_fit_what_arrives() -> None:
    model, x = chain("lora", "dora"), chain_input(3, 4)
    for block, message in [
        (BatchSplit("lora", "dora", batch_sizes=[2, 2]), r"has 4 rows but a layer received 3, no multiple"),
        (Split("lora", "dora", splits=[2, 3]), "has 5 positions but the sequence has 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(model, block, x)
    with pytest.raises(ValueError, match=r"needs layers that read \[batch, sequence, features\]"):
        run(model, Split("lora", "dora", splits=2), x[0])
    assert run(model, BatchSplit("lora", "dora", batch_sizes=[2, 1]), torch.cat([x, x])).shape[0] == 6


def test_a_weight_cannot_be_changed_upon_what_has_no_weight() -> None:
    model, x = chain("lora", "bitfit", "dora"), chain_input()
    model.add_adapter("mix", FusionConfig(members=["lora", "bitfit"]))
    with pytest.raises(ValueError, match="'dora' changes the layer's weight, so it cannot act upon Fuse"):
        run(model, ["mix", "dora"], x)
    run(model, ["dora", "mix"], x)
    nested = Stack(BatchSplit("lora", "bitfit", batch_sizes=[1, 2]), Split("dora", "lora", splits=2))
    with pytest.raises(ValueError, match="cannot divide what"):
        run(model, nested, x)


# ---------------------------------------------------------------------- inputs


def test_every_tensor_of_the_batch_is_repeated() -> None:
    ids, mask, other = torch.arange(6).view(3, 2), torch.ones(3, 1), torch.zeros(2, 5)
    args, kwargs = repeated((ids,), {"mask": mask, "other": other, "pair": (mask, None), "flag": True}, 2)
    assert torch.equal(args[0], torch.cat([ids, ids]))
    assert kwargs["mask"].shape == (6, 1) and kwargs["other"] is other and kwargs["flag"] is True
    assert kwargs["pair"][0].shape == (6, 1) and kwargs["pair"][1] is None
    assert repeated((ids,), {}, 1)[0][0] is ids


def test_an_encoders_output_is_repeated() -> None:
    model = with_adapters(tiny("t5"), {n: LoraConfig(target_modules=["q"]) for n in "ab"})
    inputs = tiny_inputs("t5")
    decoder = {"decoder_input_ids": inputs["decoder_input_ids"]}
    encoded = model.get_base_model().get_encoder()(inputs["input_ids"])  # type: ignore[operator]
    alone = [run(model, n, encoder_outputs=encoded, **decoder).logits for n in "ab"]
    both = run(model, Parallel("a", "b"), encoder_outputs=encoded, **decoder).logits
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- saved modules


def nets() -> PeftModel:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["head"]}
    model = get_peft_model(Net().double(), LoraConfig(**settings), "a")
    model.add_adapter("b", LoraConfig(**settings))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model, "a", "b", "c")
    return model


def test_rows_have_their_own_heads() -> None:
    model, ids = nets(), torch.randint(10, (3, 4))
    alone = {name: run(model, name, ids) for name in "abc"}
    torch.testing.assert_close(run(model, Parallel("a", "b", "c"), ids), torch.cat(list(alone.values())))
    y = run(model, BatchSplit("b", "c", batch_sizes=[1, 2]), ids)
    torch.testing.assert_close(y, torch.cat([alone["b"][:1], alone["c"][1:]]))
    assert run(model, Split("b", "c", splits=2), ids).shape == (3, 4, 3)


def test_an_average_has_the_average_of_the_heads() -> None:
    model, x = nets(), torch.randn(2, 4, 6, dtype=torch.float64)
    wrapper: Any = model.get_base_model().head
    heads: dict[str, Tensor] = {name: run_head(model, name, x) for name in "abc"}
    for block, expected in [
        (Average("a", "b", weights=[0.25, 0.75]), 0.25 * heads["a"] + 0.75 * heads["b"]),
        (Average("a", "c", weights=[0.5, 0.2]), 0.5 * heads["a"] + 0.5 * heads["c"]),
        (Stack("c", Average("b")), heads["b"]),
    ]:
        torch.testing.assert_close(run_head(model, block, x), expected)
    model.set_adapter(Average("a", "b"))
    for needs_one in (lambda: wrapper.weight, model.merge_and_unload):
        with pytest.raises(ValueError, match="runs several copies of a saved Linear"):
            needs_one()
    model.set_adapter(Stack(Average("c"), "b"))
    ids = torch.randint(10, (3, 4))
    y = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), y)


def run_head(model: PeftModel, asked: Any, x: Tensor) -> Tensor:
    model.set_adapter(asked)
    y: Tensor = model.get_base_model().head(x)  # type: ignore[operator]
    return y


def test_a_fusion_has_a_head_of_its_own() -> None:
    model, ids = nets(), torch.randint(10, (3, 4))
    model.add_adapter("mix", FusionConfig(members=["a", "b"]))
    with pytest.raises(ValueError, match=r"let the fusion train one: FusionConfig\(modules_to_save"):
        run(model, "mix", ids)
    model.delete_adapter("mix")
    model.add_adapter("mix", FusionConfig(members=["a", "b"], modules_to_save=["head"]))
    y = run(model, "mix", ids)
    head: Any = model.get_base_model().head
    assert {n for n, p in head.named_parameters() if p.requires_grad} == {
        "modules_to_save.mix.weight",
        "modules_to_save.mix.bias",
    }
    head.modules_to_save["mix"].weight.data.add_(1.0)
    assert not torch.equal(model(ids), y)
