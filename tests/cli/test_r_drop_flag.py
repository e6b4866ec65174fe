"""``--r-drop`` doubles each batch by itself, for every task with classes; evaluation stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay import RDropLoss
from inlay.cli.engine import TaskTrainer

Run = Callable[..., str]
Words = Callable[..., list[Any]]
Files = dict[str, Path]


def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return values


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, bool]]:
    """The logits and labels that R-Drop's loss is asked for, and whether it sums."""
    seen: list[tuple[Tensor, Tensor, bool]] = []
    forward = RDropLoss.forward

    def watched(self: RDropLoss, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits.detach(), labels, self.reduction == "sum"))
        return forward(self, logits, labels)

    monkeypatch.setattr(RDropLoss, "forward", watched)
    return seen


TASKS = {
    "text-classification": ("bert", "train", "dev"),
    "token-classification": ("bert", "tagged", "tagged"),
    "causal-lm": ("gpt2", "pairs", "pairs"),
    "image-classification": ("vit", "images", "images"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_row_passes_twice_in_training_only(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, losses: list[Any], task: str
) -> None:
    model, train, dev = TASKS[task]
    words = training(models[model], task, data[train], "--batch-size", 4, "--max-steps", 3, dev=data[dev])
    inlay(*words, "--r-drop", 4, "--method.lora-dropout", 0.3)
    assert len(losses) == 3
    for logits, labels, _ in losses:
        assert len(logits) == 8 and torch.equal(labels[0::2], labels[1::2])
    last = losses[-1][0]  # at first, LoRA adds nothing that its dropout could change
    assert not torch.equal(last[0::2], last[1::2])
    kept = json.loads((tmp_path / "out" / "metrics.json").read_text())
    adapter = ["evaluate", "--adapter", tmp_path / "out" / "adapter", "--data", data[dev]]
    assert json.loads(inlay(*adapter))["loss"] == pytest.approx(kept["eval"]["loss"], rel=1e-4)
    assert "r_drop: 4" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_causal_model_is_compared_with_the_next_token(
    models: Files, data: Files, inlay: Run, training: Words, losses: list[Any]
) -> None:
    inlay(
        *training(
            models["gpt2"], "causal-lm", data["pairs"], "--batch-size", 4, "--max-steps", 1, "--r-drop", 1
        )
    )
    ((logits, labels, _),) = losses
    assert logits.shape[:2] == labels.shape
    read = labels != -100  # the response's two words and its end, not the prompt
    assert (read.sum(-1) == 3).all() and read[:, -1].all()


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models without dropout pass, so that runs can be compared number by number."""
    from inlay.cli import train

    monkeypatch.setattr(train, "_check_dropout", lambda options, model: None)


@pytest.mark.usefixtures("without_dropout")
@pytest.mark.parametrize(
    ("task", "model", "rows"), [("causal-lm", "gpt2", "texts"), ("image-classification", "vit", "images")]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_dropout_it_is_ordinary_training(
    models: Files, data: Files, tmp_path: Path, inlay: Run, task: str, model: str, rows: str, accumulate: int,
) -> None:  # fmt: skip
    place = models[model]
    if model == "gpt2":
        import shutil

        place = Path(shutil.copytree(place, tmp_path / "gpt2"))
        config = json.loads((place / "config.json").read_text())
        config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        (place / "config.json").write_text(json.dumps(config))
    words = ["train", "--model", place, "--task", task, "--train-data", data[rows], "--max-steps", 4]
    words += ["--batch-size", 4, "--accumulate", accumulate, "--learning-rate", 0.01]
    inlay(*words, "--output-dir", tmp_path / "plain")
    inlay(*words, "--output-dir", tmp_path / "doubled", "--r-drop", 4)
    plain, doubled = weights(tmp_path / "plain"), weights(tmp_path / "doubled")
    assert plain.keys() == doubled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(doubled[key], value, atol=2e-4, rtol=1e-3)
    losses = [report(tmp_path / name)["train"]["loss"] for name in ("plain", "doubled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_predictions_are_drawn_together(
    models: Files, data: Files, tmp_path: Path, inlay: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[float] = []
    compute = TaskTrainer.compute_loss

    def watched(self: TaskTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            once = {key: value for key, value in inputs.items() if key != "labels"}
            first, second = (model(**once)["logits"].softmax(-1) for _ in range(2))
            apart.append(float((first - second).abs().mean()))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", watched)
    words = [
        "train",
        "--model",
        models["bert"],
        "--task",
        "text-classification",
        "--train-data",
        data["train"],
    ]
    words += ["--max-steps", 60, "--batch-size", 16, "--learning-rate", 0.01, "--method.lora-dropout", 0.3]
    means = []
    for name, more in (("plain", []), ("r_drop", ["--r-drop", 20])):
        apart.clear()
        inlay(*words, "--output-dir", tmp_path / name, *more)
        means.append(sum(apart[-20:]) / 20)
    assert means[1] < 0.7 * means[0]


@pytest.mark.parametrize(
    ("task", "model", "rows", "words", "told"),
    [
        ("text-classification", "bert", "scores", [], "is not for regression; leave it out"),
        ("seq2seq", "t5", "pairs", [], "is not for seq2seq; leave it out"),
        ("image-classification", "vit", "images", [], "this model has none; set the method's own, as --method.lora-dropout 0.1"),
        ("text-classification", "bert", "train", ["--trainer.label_smoothing_factor", 0.1], "leave out --trainer.label_smoothing_factor"),
        ("text-classification", "bert", "train", ["--r-drop", 0], "--r-drop: '0' is not a number above 0"),
    ],
)  # fmt: skip
def test_what_it_is_not_for(
    models: Files, data: Files, tmp_path: Path, complaint: Run, training: Words,
    task: str, model: str, rows: str, words: list[Any], told: str,
) -> None:  # fmt: skip
    assert told in complaint(
        *training(models[model], task, data[rows], "--max-steps", 1, "--r-drop", 4, *words)
    )
    assert not (tmp_path / "out").exists()
