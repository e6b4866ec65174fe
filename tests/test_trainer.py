"""transformers' own Trainer with Inlay's models: what checkpoints hold, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import inlay
from tiny_models import VOCABULARY, tiny

CHECKPOINTING = (
    "activation_checkpointing"  # the name of transformers 5
    if "activation_checkpointing" in {f.name for f in fields(tf.TrainingArguments)}
    else "gradient_checkpointing"
)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (24, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def classifier(seed: int = 0, name: str = "bert_classifier", **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = inlay.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, **changes)
    return inlay.get_peft_model(tiny(name), config)


def trainer(model: Any, rows: list[dict[str, Any]], folder: Path, **arguments: Any) -> Any:
    other = {
        k: arguments.pop(k)
        for k in ("callbacks", "compute_metrics", "processing_class", "optimizers")
        if k in arguments
    }
    settings: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.05,
        "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = tf.TrainingArguments(output_dir=str(folder), **(settings | arguments))
    return tf.Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], **other)


def values(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {k: v.clone() for k, v in inlay.get_peft_model_state_dict(model, adapter_name=name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(run: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


def test_a_checkpoint_holds_the_adapter_and_the_head_only(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = classifier()
    run = trainer(model, rows, tmp_path)
    run.train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "training_args.bin", "optimizer.pt"}
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert same(saved, values(model))
    assert "base_model.model.classifier.weight" in saved
    assert all(".lora_" in key or ".classifier." in key for key in saved)


@pytest.mark.parametrize(
    ("name", "task", "labels"),
    [
        ("bert_classifier", "SEQ_CLS", ["labels"]),
        ("bert_answerer", "QUESTION_ANS", ["start_positions", "end_positions"]),
        ("t5", None, ["labels"]),
    ],
)
def test_label_names_are_those_of_the_base_model(
    name: str, task: str | None, labels: list[str], tmp_path: Path
) -> None:
    plain = trainer(tiny(name), [], tmp_path)
    model = inlay.get_peft_model(tiny(name), inlay.LoraConfig(task_type=task))
    run = trainer(model, [], tmp_path)
    assert run.label_names == plain.label_names == labels
    assert run.can_return_loss == plain.can_return_loss
    assert run.model_accepts_loss_kwargs == plain.model_accepts_loss_kwargs


def test_a_resumed_run_is_the_same_run(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = trainer(classifier(), rows, tmp_path)
    whole.train()
    resumed = trainer(classifier(seed=7), rows, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(values(whole.model), values(resumed.model))
    assert losses(whole) == losses(resumed)
    again = trainer(classifier(seed=8), rows, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(values(whole.model), values(again.model))


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]])
def test_several_adapters_are_resumed(active: list[str], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    def model(seed: int) -> Any:
        built = classifier(seed, target_modules=["query"])
        config = inlay.LoraConfig(r=2, target_modules=["value"], init_lora_weights=False)
        built.add_adapter("second", copy.deepcopy(config))
        built.base_model.set_adapter(active)
        return built

    whole = trainer(model(0), rows, tmp_path)
    whole.train()
    resumed = trainer(model(7), rows, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.model.active_adapters == active
    for name in ("default", "second"):
        assert same(values(whole.model, name), values(resumed.model, name))
        trained = not same(values(whole.model, name), values(model(0), name))
        assert trained == (name in active)
    frozen = {n: p.requires_grad for n, p in whole.model.named_parameters()}
    assert frozen == {n: p.requires_grad for n, p in resumed.model.named_parameters()}


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_the_best_adapter_is_restored(adapter: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = classifier()
    model.add_adapter("second", inlay.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    model.set_adapter(adapter)
    scores: Iterator[float] = iter([0.1, 0.9, 0.5])
    run = trainer(
        model, rows, tmp_path, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for name in ("default", "second"):
        inside = "" if name == "default" else name
        best = load_file(tmp_path / "checkpoint-2" / inside / "adapter_model.safetensors")
        last = load_file(tmp_path / "checkpoint-3" / inside / "adapter_model.safetensors")
        assert same(best, values(model, name))
        assert same(best, last) == (name != adapter)


def test_a_truncated_checkpoint_is_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer(classifier(), rows, tmp_path).train()
    weights = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    model = classifier(seed=7)
    before = values(model)
    with pytest.raises(inlay.AdapterFileError, match="truncated"):
        trainer(model, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(before, values(model))


@pytest.mark.parametrize("name", ["bert_classifier", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(
    name: str, reentrant: bool, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    if name == "vit":
        pictures = torch.stack([row["input_ids"] for row in rows]).repeat(1, 32).reshape(-1, 3, 8, 8) / 40
        rows = [{"pixel_values": p, "labels": row["labels"]} for p, row in zip(pictures, rows, strict=True)]
    trained = []
    for checkpointing in ({}, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}):
        model = classifier(name=name)
        trainer(model, rows, tmp_path, save_strategy="no", max_steps=2, **checkpointing).train()
        trained.append(values(model))
    assert same(*trained)
    assert not same(trained[0], values(classifier(name=name)))


def test_unused_columns_are_removed(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [
            {"input_ids": r["input_ids"].tolist(), "labels": r["labels"], "text": "a", "base_layer": 1}
            for r in rows
        ]
    )
    run = trainer(classifier(), table, tmp_path, save_strategy="no", max_steps=1)
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "labels"}
    run.train()


def test_save_model_writes_what_can_be_loaded(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = classifier()
    extractor = tf.ViTImageProcessor()  # any processing class: it is saved beside the adapter
    run = trainer(model, rows, tmp_path, save_strategy="no", processing_class=extractor)
    run.train()
    run.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "preprocessor_config.json",
        "training_args.bin",
    }
    assert "model.safetensors" not in names
    loaded = inlay.PeftModel.from_pretrained(tiny("bert_classifier"), tmp_path / "final")
    x = torch.arange(3, 12).reshape(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6")  # PEFT asks by an old name
def test_pefts_own_models_are_trained_as_before(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    classifier()  # the Trainer knows Inlay's models now
    model = peft.get_peft_model(tiny("bert_classifier"), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    run = trainer(model, rows, tmp_path)
    assert run.label_names == ["labels"]
    run.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    resumed = peft.get_peft_model(tiny("bert_classifier"), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    trainer(resumed, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(values_of_peft(model), values_of_peft(resumed))


def values_of_peft(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(model)
    return found


def test_a_plain_model_is_saved_whole(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    classifier()
    trainer(tiny("bert_classifier"), rows, tmp_path).save_model(str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_an_unknown_trainer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    future = types.ModuleType("transformers.trainer")
    future.Trainer = type("Trainer", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.trainer", future)
    with pytest.warns(inlay.PeftWarning, match="this version of transformers is not known to Inlay"):
        inlay.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), inlay.LoraConfig(target_modules=["0"])
        )


@pytest.mark.slow
def test_with_and_without_peft_in_any_order_of_imports(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("trainer_imports.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
