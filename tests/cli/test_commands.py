"""Help, inspect and methods; and what must not be imported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Files = dict[str, Path]
Run = Callable[..., str]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["predict", "--help"], []])
def test_help_is_quick(words: list[str]) -> None:
    code = (
        "import sys; from inlay.cli.main import main\n"
        f"assert main({words!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    package = Path(__import__("inlay.cli").cli.__path__[0]).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package)},
    )
    assert result.returncode == 0, result.stderr
    assert "usage: inlay" in result.stdout


def test_help_teaches(inlay: Run) -> None:
    text = " ".join(inlay("train", "--help").split())
    assert "Example: inlay train --model bert-base-uncased" in text and "--columns.text" in text
    text = inlay("train", "--method", "lora", "--help")
    assert "--method.lora-alpha" in text and "--method.task-type" not in text


def test_methods(inlay: Run) -> None:
    listed = [line.split()[0] for line in inlay("methods").splitlines() if line]
    assert {"lora", "dora", "full", "head"} <= set(listed)
    assert "--method.lora-alpha  (default: 8)" in inlay("methods", "lora")
    assert "use-dora" not in inlay("methods", "dora")


def test_inspect_adapter(models: Files, data: Files, tmp_path: Path, inlay: Run) -> None:
    inlay(
        "train", "--model", models["bert"], "--task", "text-classification", "--train-data", data["train"], "--max-steps", 1,
        "--output-dir", tmp_path / "out", "--method.r", 4,
    )  # fmt: skip
    adapter = tmp_path / "out" / "adapter"
    shown = json.loads(inlay("inspect", adapter, "--json"))
    part = next(p for p in shown["parts"] if p["where"].endswith("query") and "lora_A" in p["what"])
    assert part["where"] == "bert.encoder.layer.*.attention.self.query"
    assert (part["shape"], part["layers"], part["parameters"], part["dtype"]) == ([4, 16], 2, 128, "F32")
    counted = json.loads((tmp_path / "out" / "metrics.json").read_text())["parameters"]
    assert shown["parameters"] == counted["trainable"]
    table = inlay("inspect", adapter)
    assert "down, up" in table and "classifier" in table and "total" in table


def test_inspect_model(models: Files, inlay: Run) -> None:
    text = inlay("inspect", models["gpt2"])
    assert "c_attn" in text and "Conv1D" in text and "lora targets by default  c_attn" in text
    assert "transformer.h.*.attn.c_attn" in text


def test_entities() -> None:
    from inlay.cli.tasks.entities import entities, entity_metrics

    assert entities(["B-x", "I-x", "O", "B-y", "B-y", "I-x"]) == {
        ("x", 0, 2),
        ("y", 3, 4),
        ("y", 4, 5),
        ("x", 5, 6),
    }
    scores = entity_metrics([(["B-x", "I-x", "O"], ["B-x", "O", "B-y"]), (["B-z"], ["B-z"])])
    assert scores == {"f1": 0.4, "precision": 0.5, "recall": pytest.approx(1 / 3)}


def test_number_metrics() -> None:
    import numpy as np

    from inlay.cli.tasks.labels import class_metrics, number_metrics

    scores = number_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert scores["rmse"] == pytest.approx((1 / 3) ** 0.5) and scores["r2"] == pytest.approx(0.5)
    assert class_metrics(np.array([0, 1, 1]), np.array([0, 1, 2])) == {
        "accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(5 / 9),
    }
