"""The picture of a run: loss, and the metric that chose the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .engine import tidy


def draw_curves(history: list[dict[str, Any]], metric: str, target: Path) -> None:
    """Write a PNG of the log: training and evaluation loss at the left, the metric at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluations = [
        (entry["step"], tidy(entry)) for entry in history if any(key.startswith("eval_") for key in entry)
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([step for step, _ in train], [loss for _, loss in train], label="train")
    if evaluations:
        steps = [step for step, _ in evaluations]
        left.plot(steps, [values["loss"] for _, values in evaluations], "o-", label="eval")
        right.plot(steps, [values[metric] for _, values in evaluations], "o-", color="tab:green")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.set(xlabel="step", ylabel=metric)
    figure.savefig(target, dpi=120)
