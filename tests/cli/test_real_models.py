"""The main job on real pretrained models and real data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., str]
Words = Callable[..., list[Any]]


@pytest.mark.slow
def test_a_model_that_sorts_learns_to_sort_the_other_way(
    with_tokenizer: Callable[[str], Path], tmp_path: Path, inlay: Run, training: Words
) -> None:
    model = with_tokenizer("gpt-nano-sort-gpt2")
    letters = ["".join(word) for word in itertools.product("ABC", repeat=5)]
    rows = [{"prompt": word, "response": "".join(sorted(word, reverse=True))} for word in letters]
    for name, part in (("dev", rows[::5]), ("train", [row for n, row in enumerate(rows) if n % 5])):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    how = [
        "--separator",
        "",
        "--method.target-modules",
        "all-linear",
        "--learning-rate",
        0.01,
        "--epochs",
        40,
    ]
    dev = tmp_path / "dev.jsonl"
    inlay(*training(model, "causal-lm", tmp_path / "train.jsonl", *how, dev=dev))
    evaluate = ["evaluate", "--data", dev, "--generate", "--max-new-tokens", 5]
    result = json.loads(inlay(*evaluate, "--adapter", tmp_path / "out" / "adapter"))
    assert result["exact_match"] > 0.95


@pytest.mark.slow
def test_the_pretrained_weights_are_used(
    shared: Path, with_tokenizer: Callable[[str], Path], tmp_path: Path, inlay: Run, training: Words
) -> None:
    import gzip

    model = with_tokenizer("stories260K-llama")
    source = shared / "data" / "gen" / "e2e_nlg"
    for name, count in (("train", 480), ("dev", 100)):
        lines = gzip.decompress((source / f"{name}.jsonl.gz").read_bytes()).split(b"\n")
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines[:count]) + b"\n")
    how = [
        "--max-steps",
        60,
        "--batch-size",
        8,
        "--learning-rate",
        0.005,
        "--method.target-modules",
        "all-linear",
    ]
    dev = tmp_path / "dev.jsonl"
    inlay(*training(model, "causal-lm", tmp_path / "train.jsonl", *how, dev=dev))
    loss = json.loads((tmp_path / "out" / "metrics.json").read_text())["eval"]["loss"]
    assert loss < 2.0, "3.98 untrained; no random base comes below 5 in so few steps"
