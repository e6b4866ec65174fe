"""Training prompt methods: gradient checkpointing, memory, the Trainer, threads and torch.compile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import inlay
from prompt_models import (
    METHODS,
    PREFIXES,
    TASKS,
    TOKENS,
    VOCABULARY,
    adapted,
    build,
    configuration,
    inputs,
    output,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint"),
]


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**given).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("model", ["gpt2", "llama", "mistral", "gptj", "bert_classifier", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_computes_the_same_gradients(method: str, model: str, reentrant: bool) -> None:
    adapter, given = adapted(inlay, method, model).train(), inputs(model, labels=True)
    wanted = gradients(adapter, given)
    adapter.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(adapter, given)
    assert found.keys() == wanted.keys() and any(name.startswith("prompt_encoder") for name in found)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def saved_bytes(model: Any, given: dict[str, Tensor]) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**given).loss
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize("projection", [False, True])
def test_the_prefix_is_not_copied_for_each_sample(projection: bool) -> None:
    """Backward keeps the joined keys and values, as it must, and the mask; not the prefix once more for each sample."""
    tokens, length, layers, heads, width = 200, 4, 3, 4, 4
    settings = {"num_virtual_tokens": tokens, "prefix_projection": projection, "encoder_hidden_size": 32}
    config = configuration(inlay, "prefix", "llama", **settings)

    def per_sample(model: Any) -> float:
        few, many = (inputs("llama", batch=batch, length=length, labels=True) for batch in (4, 8))
        return (saved_bytes(model, many) - saved_bytes(model, few)) / 4

    extra = per_sample(inlay.get_peft_model(build("llama"), config).train())
    extra -= per_sample(
        inlay.get_peft_model(build("llama"), inlay.LoraConfig(r=1, target_modules=["q_proj"])).train()
    )
    joined = 4 * layers * 2 * tokens * heads * width  # keys and values of each query head, in float32
    assert joined / 2 < extra < 1.1 * joined  # one more copy of the key heads would make it 1.5


def test_virtual_tokens_are_expanded_not_repeated() -> None:
    adapter = adapted(inlay, "prompt-tuning", "llama")
    prompt = adapter.get_prompt(5)
    assert prompt.shape == (5, TOKENS, 16) and prompt.stride(0) == 0


@pytest.mark.parametrize("method", METHODS)
def test_only_the_prompt_and_the_head_are_trained(method: str) -> None:
    adapter = inlay.get_peft_model(
        build("bert_classifier"), configuration(inlay, method, "bert_classifier")
    ).train()
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    first = None
    for _ in range(12):
        loss = adapter(**inputs("bert_classifier", batch=3, labels=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or loss.item()
    assert loss.item() < 0.5 * first
    moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n, p in adapter.named_parameters() if p.requires_grad}
    assert all(n.startswith("prompt_encoder.default") or ".modules_to_save.default" in n for n in moved)


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning-lstm", "prefix-projection"])
def test_the_trainer_saves_and_resumes(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (24, 6), generator=generator)
    rows = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]

    def run(folder: str, **settings: Any) -> Any:
        torch.manual_seed(0)
        model = inlay.get_peft_model(
            build("bert_classifier"), configuration(inlay, method, "bert_classifier")
        )
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=2, learning_rate=0.05, report_to=[],
            per_device_train_batch_size=4, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, max_steps=4, **settings,
        )  # fmt: skip
        return tf.Trainer(model=model, args=arguments, train_dataset=rows)

    whole = run("whole")
    whole.train()
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and not any(n.startswith("model") for n in names)
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix"])
def test_threads_switch_for_themselves(method: str) -> None:
    adapter, given = adapted(inlay, method, "llama"), inputs("llama")
    with torch.no_grad():
        on = output(adapter(**given))
        with adapter.disable_adapter():
            off = output(adapter(**given))
        found: dict[bool, list[bool]] = {True: [], False: []}

        def serve(disabled: bool) -> None:
            for _ in range(10):
                with torch.no_grad():
                    if disabled:
                        with adapter.disable_adapter():
                            found[disabled].append(torch.equal(output(adapter(**given)), off))
                    else:
                        found[disabled].append(torch.equal(output(adapter(**given)), on))

        threads = [threading.Thread(target=serve, args=(disabled,)) for disabled in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {True: [True] * 10, False: [True] * 10}


@pytest.mark.parametrize("model", ["llama", "t5", "falcon"])
@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix", "prefix-projection"])
def test_compiled_whole_it_computes_the_same(method: str, model: str) -> None:
    adapter, given = adapted(inlay, method, model), inputs(model) | {"use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(output(compiled(**given)), output(adapter(**given)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [m for m in TASKS if m != "bart"])
def test_every_task_trains_a_prefix_on_every_layer(model: str) -> None:
    adapter = adapted(inlay, "prefix", model).train()
    result = adapter(**inputs(model, labels=True))
    (result.loss if "loss" in result else output(result).square().mean()).backward()
    grad = adapter.prompt_encoder["default"].embedding.weight.grad
    entries = grad.view(TOKENS, -1, adapter.peft_config["default"].token_dim).abs().sum((0, 2))
    used = entries > 1e-9
    # Of an encoder-decoder's entries PEFT's format uses half: the first two of each group of four.
    assert used.tolist() == (
        [n % 4 < 2 for n in range(len(used))] if model == "t5" and len(used) % 4 == 0 else [True] * len(used)
    )
    assert len(used) == 2 * 3 and model in TASKS and "prefix" in PREFIXES
