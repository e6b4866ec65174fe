"""The benchmark of what methods learn: it runs, resumes, chooses rates on dev, and its report says what the numbers say."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

FULL, LORA = {"trained": 1000, "beside_head": 1000}, {"trained": 15, "beside_head": 10}


@pytest.fixture
def quality(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module("quality")
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = (
            nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64)),
            nn.Linear(64, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x))
        return logits


def sides_task() -> Any:
    """Return a task without any files: on which side of a plane a point lies."""
    from quality_tasks.task import Batch, Task

    @dataclass(frozen=True, kw_only=True)
    class Sides(Task):
        def examples(self, shared: Path) -> dict[str, list[Any]]:
            source = random.Random(0)
            points = [[source.gauss(0, 1) for _ in range(16)] for _ in range(400)]
            pairs = [(point, int(sum(point[:4]) > 0)) for point in points]
            return {"train": pairs[:256], "dev": pairs[256:328], "test": pairs[328:]}

        def model(self, shared: Path, pretrained: bool) -> nn.Module:
            return Net()

        def batch(self, examples: Sequence[Any]) -> Batch:
            return {
                "x": torch.tensor([p for p, _ in examples]),
                "labels": torch.tensor([y for _, y in examples]),
            }

        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return cross_entropy(model(batch["x"]), batch["labels"])

        def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
            right = torch.cat([model(b["x"]).argmax(-1) == b["labels"] for b in batches])
            return right.double().mean().item()

    rates = {"full": (1e-6, 1e-2), "head": (1e-2,), "adapter": (1e-6, 1e-2)}
    return Sides(
        name="sides", title="sides of a plane", metric="accuracy", steps=30, batch_size=16, rank=2,
        targets=("0", "2"), rates=rates,
    )  # fmt: skip


def test_a_sweep_chooses_rates_on_dev_and_resumes(quality: Any, tmp_path: Path) -> None:
    task, cache = sides_task(), tmp_path / "results.jsonl"
    quality.Sweep(cache, tmp_path, [0]).fill([task], ["full", "lora"])
    assert len(cache.read_text().splitlines()) == 2 * (2 + 1)
    sweep = quality.Sweep(cache, tmp_path, [0, 1])
    sweep.fill([task], ["full", "head", "lora", "dora"])
    runs = [json.loads(line) for line in cache.read_text().splitlines()]
    keys = {(r["method"], r["rate"], r["seed"], r["settings"]["steps"]) for r in runs}
    assert len(keys) == len(runs) == 2 * 2 + 4 * 2, "a finished run is not run again"
    assert (
        sweep.best_rate(task, "lora")
        == sweep.best_rate(task, "dora")
        == sweep.best_rate(task, "full")
        == 1e-2
    )
    assert all("test" not in r for r in runs if r["settings"]["steps"] == 10), (
        "rates are chosen without the test split"
    )
    assert max(r["test"] for r in runs if r["method"] == "lora" and "test" in r) > 0.85
    text = quality.render(sweep, [task], ["full", "head", "lora", "dora"], "2026-01-01")
    assert "| LoRA |" in text and "| DoRA |" in text and "chosen at the end of the range" in text
    assert "Not finished" not in text
    sweep.seeds.append(2)
    text = quality.render(sweep, [task], ["full", "head", "lora", "dora"], "2026-01-01")
    assert "Not finished: full fine-tuning (seed 2); " in text


def test_every_method_sees_the_same_batches(quality: Any, tmp_path: Path) -> None:
    from quality_tasks.training import batches

    task = sides_task()
    points = task.examples(tmp_path)["train"]
    first, again, other = (batches(task, points, seed) for seed in (0, 0, 1))
    seen = [next(first)["x"] for _ in range(20)]
    assert all(torch.equal(x, next(again)["x"]) for x in seen)
    assert not all(torch.equal(x, next(other)["x"]) for x in seen)
    assert torch.cat(seen[:16]).unique(dim=0).shape[0] == 256, "one pass holds every example once"


def test_changed_settings_are_run_anew(quality: Any, tmp_path: Path) -> None:
    task, cache = replace(sides_task(), rates={"adapter": (1e-2,)}, steps=3), tmp_path / "results.jsonl"
    quality.Sweep(cache, tmp_path, [0]).fill([task], ["lora"])
    quality.Sweep(cache, tmp_path, [0]).fill([replace(task, rank=4)], ["lora"])
    assert [json.loads(line)["settings"]["rank"] for line in cache.read_text().splitlines()] == [2, 4]


@pytest.mark.parametrize(
    ("lora", "lower", "expected"),
    [
        (
            {"test": 0.892},
            False,
            "goal met: accuracy 0.8920 against 0.9000, -0.9%, with 1.50% of the parameters",
        ),
        ({"test": 0.890}, False, "goal not met (the score is more than 1% worse)"),
        ({"test": 0.890}, True, "goal met"),
        ({"test": 0.910}, True, "goal not met (the score is more than 1% worse)"),
        ({"test": 0.910, "trained": 150}, False, "goal not met (15.0% of a base of 1,000 is trained)"),
    ],
)
def test_the_verdict_is_computed_from_the_numbers(
    quality: Any, lora: dict[str, float], lower: bool, expected: str
) -> None:
    from quality_tasks.report import Result, verdicts

    task = replace(sides_task(), lower_is_better=lower)
    common = {"total": 1000, "dev": 0.9, "bytes": 60, "milliseconds": 1.0}
    found = {
        "full": Result("full", 1e-3, [common | FULL | {"test": 0.9}], []),
        "lora": Result("lora", 1e-3, [common | LORA | lora], []),
    }
    assert expected in " ".join(verdicts(task, found))


def test_quick_mode_on_a_real_model(
    quality: Any,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("INLAY_SHARED", str(shared))
    paths = ["--cache", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r.md"), "--threads", "1"]
    quality.main(["--quick", "--tasks", "sort", "--seeds", "0", *paths])
    assert {json.loads(line)["method"] for line in (tmp_path / "c.jsonl").read_text().splitlines()} == {
        "full", "head", "lora", "dora", "adalora", "shira", "shira-wm", "ia3", "bitfit",
    }  # fmt: skip
    assert "## sort" in (tmp_path / "r.md").read_text()
    assert str(tmp_path / "r.md") in capsys.readouterr().out


def test_absent_data_is_named(quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_SHARED", str(tmp_path))
    output = tmp_path / "r.md"
    quality.main(
        ["--tasks", "esol", "--cache", str(tmp_path / "c.jsonl"), "--output", str(output), "--threads", "1"]
    )
    assert f"- esol: {tmp_path / 'data/chem/esol'} is not there" in output.read_text()
