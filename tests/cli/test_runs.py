"""A run as a whole: the same seed gives the same numbers, also across an interruption; options are kept; results are kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inlay.cli.runs import last_whole_checkpoint

Files = dict[str, Path]
Run = Callable[..., str]
CLOCK = {"seconds"}


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that a run measured but its time."""
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in values.items() if key not in CLOCK}


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def words(models: Files, data: Files) -> list[Any]:
    """A run of 24 steps, 12 to an epoch, with dropout, that evaluates in the middle of epochs."""
    what = ["--model", models["bert"], "--task", "text-classification", "--train-data", data["train"]]
    how = ["--epochs", 2, "--batch-size", 8, "--eval-steps", 5, "--learning-rate", 0.005]
    return ["train", *what, *how, "--eval-data", data["dev"], "--method.lora-dropout", 0.1]


def test_same_seed_same_run(words: list[Any], tmp_path: Path, inlay: Run) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        inlay(*words, "--output-dir", tmp_path / name, "--seed", seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


@pytest.mark.parametrize("stop", [7, 16])
def test_resumed_is_uninterrupted(
    words: list[Any],
    tmp_path: Path,
    inlay: Run,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from inlay.cli import progress
    from inlay.cli.main import main

    inlay(*words, "--output-dir", tmp_path / "whole")

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress.Progress, "on_step_end", interrupt)
        assert main([str(word) for word in [*words, "--output-dir", tmp_path / "cut"]]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "adapter").exists()
    inlay(*words, "--output-dir", tmp_path / "cut", "--resume")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_killed_is_uninterrupted(words: list[Any], tmp_path: Path, inlay: Run) -> None:
    longer = [*words, "--epochs", 6]
    inlay(*longer, "--output-dir", tmp_path / "whole")
    command = [sys.executable, "-m", "inlay.cli", *map(str, longer), "--output-dir", str(tmp_path / "cut")]
    package = Path(sys.modules["inlay.cli"].__path__[0]).parent.parent
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(package)}
    )
    deadline = time.monotonic() + 240
    while not list((tmp_path / "cut").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "metrics.json").exists()
    inlay(*longer, "--output-dir", tmp_path / "cut", "--resume")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("left", [None, "", '{"global_step": 1'])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, left: str | None) -> None:
    for step, state in ((9, "{}"), (10, left)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert last_whole_checkpoint(tmp_path) is None


def test_resume_refuses_other_options(words: list[Any], tmp_path: Path, inlay: Run, complaint: Run) -> None:
    inlay(*words, "--output-dir", tmp_path / "out")
    line = complaint(*words, "--output-dir", tmp_path / "out", "--resume", "--batch-size", 4)
    assert "batch-size was 8" in line and "now 4" in line


def test_config_as_run_runs_again(words: list[Any], tmp_path: Path, inlay: Run) -> None:
    inlay(
        *words, "--output-dir", tmp_path / "first", "--method", "dora", "--method.r", 4, "--separator", " \n"
    )
    inlay("train", "--config", tmp_path / "first" / "config.yaml", "--output-dir", tmp_path / "second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    kept = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert kept["method"]["name"] == "dora" and kept["method"]["r"] == 4 and kept["separator"] == " \n"


def test_early_stopping(words: list[Any], tmp_path: Path, inlay: Run) -> None:
    inlay(
        *words, "--output-dir", tmp_path / "out", "--patience", 1, "--learning-rate", 1e-9, "--eval-steps", 2
    )
    assert numbers(tmp_path / "out")["train"]["steps"] < 24


def test_trainer_arguments_reach_the_trainer(
    words: list[Any], tmp_path: Path, inlay: Run, complaint: Run
) -> None:
    assert "did you mean 'max_grad_norm'" in complaint(
        *words, "--output-dir", tmp_path / "x", "--trainer.max_grad_nrm", 1
    )
    inlay(*words, "--output-dir", tmp_path / "out", "--trainer.max-steps", 3)
    assert numbers(tmp_path / "out")["train"]["steps"] == 3


def test_results_are_not_overwritten_by_accident(
    words: list[Any], tmp_path: Path, inlay: Run, complaint: Run
) -> None:
    out = tmp_path / "out"
    inlay(*words, "--output-dir", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "already exists; use --overwrite or --resume" in complaint(*words, "--output-dir", out)
    assert "no such file" in complaint(
        *words, "--output-dir", out, "--overwrite", "--train-data", tmp_path / "none.jsonl"
    )
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    inlay(*words, "--output-dir", out, "--overwrite", "--seed", 9)
    assert weights(out) != before[out / "adapter" / "adapter_model.safetensors"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_disk_full_while_saving_leaves_the_old_result(
    words: list[Any], tmp_path: Path, inlay: Run, complaint: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.cli import train

    out = tmp_path / "out"
    inlay(*words, "--output-dir", out)
    before = weights(out)

    def full(model: Any, task: Any, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(train, "save_trained", full)
    assert "no space left" in complaint(*words, "--output-dir", out, "--overwrite", "--seed", 5)
    assert weights(out) == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_disk_full_in_a_checkpoint(
    words: list[Any], tmp_path: Path, complaint: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def full(self: Any, folder: str) -> None:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:869] . PytorchStreamWriter failed writing file data/3: file write failed"
        )

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    assert "no space left for checkpoints" in complaint(*words, "--output-dir", tmp_path / "out")
