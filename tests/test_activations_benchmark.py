"""The benchmark of methods on activations and prompts runs in its quick form, and its counts hold what the kernels promise."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # in PEFT


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module("activations")
    torch.set_num_threads(threads)


def bench_of(*methods: str, model: str = "bert") -> Any:
    from activation_cost.inlay_and_peft import builders
    from activation_cost.measure import Bench
    from activation_cost.models import Size

    return Bench(builders(), model, Size(width=128, layers=2, batch=2, length=16), methods)


def test_quick_form(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["Pfeiffer", "prefix tuning"]
    report = tmp_path / "r.md"
    script.main(
        ["--quick", "--models", "gpt2", "--methods", *methods, "--rounds", "2", "--threads", "1", "--report", str(report)]
    )  # fmt: skip
    text = report.read_text()
    titles = (
        "a training step",
        "forward in eval mode",
        "generation of 16 tokens",
        "fixed cost of a forward pass",
    )
    assert all(f"## gpt2: {title}" in text for title in titles)
    assert text.count("| inlay Pfeiffer |") == 4 and text.count("| peft prefix tuning |") == 4
    assert "Houlsby |" not in text
    assert text.strip() == capsys.readouterr().out.strip()


def test_no_count_is_above_a_peer(script: Any) -> None:
    from activation_cost.report import worse_than_a_peer

    prompts = ("prompt tuning", "P-tuning", "prefix tuning")
    counts = bench_of(*prompts).count()
    assert worse_than_a_peer(counts) == ["", "More than a peer needs: nothing."]
    counts["inlay prompt tuning"]["saved"] *= 2
    assert "inlay prompt tuning saved +" in worse_than_a_peer(counts)[1]


def test_of_wide_tensors_each_adapter_keeps_one(script: Any) -> None:
    wide, narrow = 4 * 2 * 16 * 128, 4 * 2 * 16 * 8
    counts = bench_of("Houlsby", "Pfeiffer", "Average").count()
    saved = {
        name: counts[f"inlay {name}"]["saved"] - counts["frozen"]["saved"]
        for name in ("Houlsby", "Pfeiffer", "Average")
    }
    statistics = 2 * 2 * 16 * 4 * 2  # mean and deviation that the model's norm keeps
    assert saved["Houlsby"] == 4 * (wide + narrow)
    assert abs(saved["Pfeiffer"] - 2 * (wide + narrow)) <= statistics
    assert abs(saved["Average"] - 2 * (wide + 2 * narrow)) <= statistics, "two members share what they read"


def test_a_side_that_ends_is_reported(script: Any, tmp_path: Path) -> None:
    from activation_cost.sides import There

    side = There(Path(sys.executable), 1, None)
    with pytest.raises(RuntimeError, match="ended with status"):
        side.versions()
    side.close()
