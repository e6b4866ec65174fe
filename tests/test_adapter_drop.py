"""AdapterDrop: blocks without adapters, at inference and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from composition_models import bert_or_gpt2, chain, chain_input, run
from inlay import AdapterDropCallback, Average, LoraConfig, get_peft_model
from inlay.injection.targets import block_index
from tiny_models import output_of, tiny, tiny_inputs


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("encoder.layer.3.attention.self.query", 3),
        ("h.11.attn.c_attn", 11),
        ("model.layers.2", 2),
        ("layers.1.experts.7.up", 1),
        ("0.model.layer.2.dense", 2),
        ("pooler.dense", None),
    ],
)
def test_the_block_of_a_path(path: str, index: int | None) -> None:
    assert block_index(path) == index


def test_skipped_blocks_are_those_of_the_base() -> None:
    model, x = chain("lora", "dora"), chain_input()
    full = run(model, "lora", x)
    with model.disable_adapter():
        base = model(x)
        middle = x + model.get_base_model().layers[0]["down"](  # type: ignore[index]
            torch.tanh(model.get_base_model().layers[0]["up"](x))  # type: ignore[index]
        )
    second = model.get_base_model().layers[1]  # type: ignore[index]
    expected = middle + second["down"](torch.tanh(second["up"](middle)))
    model.set_adapter("lora", skip_layers=[0])
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(expected, full)
    model.set_adapter("lora", skip_layers=range(2))
    assert torch.equal(model(x), base)
    model.set_adapter("lora")
    assert torch.equal(model(x), full)


def test_skipping_costs_nothing_below_the_lowest_adapter() -> None:
    model = bert_or_gpt2("bert")
    model.set_adapter("a", skip_layers=[0])
    y = output_of(model, tiny_inputs("bert"))
    y.sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(".layer.1." in n for n in with_gradient)
    hidden = model(**tiny_inputs("bert"), output_hidden_states=True).hidden_states
    assert not hidden[1].requires_grad and hidden[2].requires_grad


def test_skipping_in_compositions_and_mixed_batches() -> None:
    model, x = chain("lora", "dora"), chain_input()
    model.set_adapter(Average("lora", "dora"), skip_layers=[0, 1])
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    assert torch.equal(model(x, adapter_names=["lora", "dora", "__base__"]), base)
    model.set_adapter("lora", skip_layers=[1])
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="skip_layers needs the adapters beside the weights"):
        model.set_adapter("lora", skip_layers=[0])


def test_blocks_that_are_not_there_are_refused() -> None:
    model = chain("lora")
    for wrong in ([2], [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"are no blocks with adapters; the last one is 1"):
            model.set_adapter("lora", skip_layers=wrong)
    assert model.base_model.switch.setting.skip_layers == frozenset()
    bare = get_peft_model(
        torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2)}), LoraConfig(target_modules=["up"])
    )
    with pytest.raises(ValueError, match="none sits in a numbered block"):
        bare.set_adapter("default", skip_layers=[0])


def test_skipping_compiles() -> None:
    model, x = chain("lora", dtype=torch.float32), chain_input(dtype=torch.float32)
    model.set_adapter("lora", skip_layers=[0])
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_numbers_are_drawn_from_the_seed_and_the_step() -> None:
    callback = AdapterDropCallback(max_layers=5, seed=3)
    numbers = [callback.number(step) for step in range(200)]
    assert numbers == [AdapterDropCallback(max_layers=5, seed=3).number(step) for step in range(200)]
    assert set(numbers) == set(range(6))
    assert numbers != [AdapterDropCallback(max_layers=5, seed=4).number(step) for step in range(200)]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_layers must be a whole number"):
            AdapterDropCallback(max_layers=wrong)  # type: ignore[arg-type]


class Watch(tf.TrainerCallback):
    """Notes which blocks are skipped in each step, and during evaluation."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps, self.evaluations = model, [], []  # type: ignore[var-annotated]

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(len(self.model.base_model.switch.setting.skip_layers))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations.append(self.model.base_model.switch.setting.skip_layers)


def test_the_trainer_drops_blocks(tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert_classifier"), LoraConfig(target_modules=["query"]))
    ids = tiny_inputs("bert")["input_ids"][0]
    rows = [{"input_ids": ids, "labels": torch.tensor(i % 3)} for i in range(16)]
    callback, watch = AdapterDropCallback(max_layers=1, seed=1), Watch(model)
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", eval_strategy="steps", eval_steps=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = tf.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[callback, watch]
    )  # type: ignore[arg-type]
    trainer.train()
    assert watch.steps == [callback.number(step) for step in range(6)] and set(watch.steps) == {0, 1}
    assert watch.evaluations == [frozenset()] * 2
    assert model.base_model.switch.setting.skip_layers == frozenset()
    too_many = tf.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[AdapterDropCallback(2)]
    )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_layers=2 would leave no block with adapters.*\[0, 1\]"):
        too_many.train()
