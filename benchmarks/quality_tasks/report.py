"""The report: what was measured, and whether the goal is met, computed from the runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .methods import METHODS, methods_of
from .task import Task

Record = dict[str, Any]
WITHIN = 0.01
"""A method may be worse than full fine-tuning by this part of its score."""
LARGEST_PART = 0.02
"""Part of the base model's parameters that a method may train."""


class Runs(Protocol):
    """What the report asks of a sweep."""

    seeds: list[int]
    shared: Path

    def find(self, task: Task, method: str, **wanted: float) -> list[Record]: ...
    def tried(self, task: Task, method: str) -> list[Record]: ...
    def best_rate(self, task: Task, method: str) -> float | None: ...


@dataclass(frozen=True)
class Result:
    """A method's runs on a task at the rate that was chosen, one for each seed."""

    method: str
    rate: float
    runs: list[Record]
    tried: list[Record]

    def mean(self, key: str) -> float:
        return statistics.fmean(run[key] for run in self.runs)

    def spread(self, key: str) -> str:
        values = [run[key] for run in self.runs]
        return f"{self.mean(key):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    @property
    def part(self) -> float:
        return float(self.runs[0]["trained"] / self.runs[0]["total"])

    @property
    def title(self) -> str:
        return METHODS[self.method].title


def render(sweep: Runs, tasks: list[Task], methods: list[str], date: str) -> str:
    """Return the report in Markdown."""
    found = [(task, results(sweep, task, methods)) for task in tasks]
    ran = [(task, part) for task, part in found if part]
    runs = [run for _, part in ran for r in part.values() for run in (*r.runs, *r.tried)]
    lines = [f"# What the methods learn, {date}", "", *setting(runs), "", "## Is the goal met?", ""]
    lines += [
        f"Goal: a test score within {WITHIN:.0%} of full fine-tuning's or better, with at most {LARGEST_PART:.0%} of the "
        "base model's parameters trained (a new head counts). Scores are means over the seeds.",
        "",
    ]
    for task, part in ran:
        lines += [
            f"- **{task.name}**: {' '.join(verdicts(task, part)) or 'not known: no adapter run has finished.'}"
        ]
    for task, part in ran:
        lines += ["", f"## {task.name}: {task.title}", "", *table(task, part), "", *rates(task, part)]
        lines += unfinished(sweep, task, methods, part)
    absent = [task for task, part in found if not part]
    lines += ["", "## Not run", ""] if absent else []
    lines += [f"- {task.name}: {task.missing(sweep.shared) or 'no finished run'}" for task in absent]
    return "\n".join(lines) + "\n"


def results(sweep: Runs, task: Task, methods: list[str]) -> dict[str, Result]:
    """Return what there is for each method at its chosen rate."""
    found = {}
    for method in methods_of(task, methods):
        rate = sweep.best_rate(task, method)
        runs = (
            []
            if rate is None
            else [r for s in sweep.seeds for r in sweep.find(task, method, rate=rate, seed=s)]
        )
        if rate is not None and runs:
            tried = [] if METHODS[method].rate_of else sweep.tried(task, method)
            found[method] = Result(method, rate, runs, tried)
    return found


def setting(runs: list[Record]) -> list[str]:
    """Return where, with what and how the runs were made."""
    machines = {f"{run['processor']}, {run['cores']} cores, {run['threads']} thread(s) a run" for run in runs}
    versions = {", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs}
    seconds = sum(run["milliseconds"] * run["settings"]["steps"] for run in runs) / 1e3
    return [
        *(f"- {machine}" for machine in sorted(machines)),
        *(f"- {version}" for version in sorted(versions)),
        f"- {len(runs)} trainings, {seconds / 60:.0f} minutes of processor time in their steps",
        "- One loop for all: AdamW, weight decay 0.01, gradient norm at most 1, linear warm-up over a tenth of the steps and "
        "linear decay to zero; no dropout where a row does not say so, no early stopping; float32. The same steps and the same batches for every method.",
        "- A learning rate is chosen by the score on dev after a third of the steps with the first seed; DoRA and the control "
        "on random weights take LoRA's. The test split is scored once a run and decides nothing.",
        "- ms/step is processor time, mean over the steps, not wall time. Stored is what has to be kept for each task: the "
        "adapter's file, or the trained weights. Static memory: weights, gradients and Adam's averages; dynamic: what the "
        "first step keeps for its backward pass.",
    ]


def table(task: Task, found: dict[str, Result]) -> list[str]:
    settings = f"{task.steps} steps of {task.batch_size}; rank {task.rank}, alpha {task.alpha}"
    lines = [
        f"{settings}; {task.metric}{', lower is better' if task.lower_is_better else ''}.",
        "",
        "| method | test | dev | seeds | trained | of the base | beside the head | stored, kB | static, MB | dynamic, MB "
        "| ms/step | rate |",
        "|--|--|--|--|--|--|--|--|--|--|--|--|",
    ]
    for result in found.values():
        run = result.runs[0]
        lines.append(
            f"| {result.title} | {result.spread('test')} | {result.spread('dev')} | {len(result.runs)} "
            f"| {run['trained']:,} | {result.part:.2%} | {run['beside_head'] / run['total']:.2%} "
            f"| {run['bytes'] / 1e3:,.0f} | {megabytes(run, 'static')} | {megabytes(run, 'dynamic')} "
            f"| {result.mean('milliseconds'):.0f} | {result.rate:g} |"
        )
    return lines


def megabytes(run: Record, key: str) -> str:
    return f"{run[key] / 1e6:.1f}" if key in run else "-"  # runs of an older script did not measure it


def rates(task: Task, found: dict[str, Result]) -> list[str]:
    """Return the dev scores by which the rates were chosen, and which choice lies at the end of what was tried."""
    lines = ["Rates tried, with their score on dev:", ""]
    for result in found.values():
        if len(result.tried) > 1:
            tried = sorted(result.tried, key=lambda run: float(run["rate"]))
            at_end = result.rate in (tried[0]["rate"], tried[-1]["rate"])
            scores = ", ".join(f"{run['rate']:g}: {run['dev']:.4f}" for run in tried)
            note = " (chosen at the end of the range: a better one may lie beyond)" if at_end else ""
            lines.append(f"- {result.title}: {scores}{note}")
    return lines


def unfinished(sweep: Runs, task: Task, methods: list[str], found: dict[str, Result]) -> list[str]:
    """Return a line that names the methods and seeds that are missing, so that no table passes for a whole one."""
    gaps = [f"{METHODS[m].title} (all)" for m in methods_of(task, methods) if m not in found]
    for method, result in found.items():
        seeds = sorted(set(sweep.seeds) - {run["seed"] for run in result.runs})
        gaps += [f"{METHODS[method].title} (seed {', '.join(map(str, seeds))})"] if seeds else []
    return ["", f"Not finished: {'; '.join(gaps)}."] if gaps else []


def verdicts(task: Task, found: dict[str, Result]) -> Iterable[str]:
    """Yield one sentence for each low-rank method, the bound and the control."""
    full = found.get("full")
    for method, result in found.items():
        if METHODS[method].rates in ("adapter", "wide") and METHODS[method].pretrained:
            if full:
                yield against_full(task, result, full)
            if task.bound:
                yield against_bound(task, result)
    lora, control = found.get("lora"), found.get("lora-random")
    if lora and control:
        start = control.runs[0]["before"]
        yield (
            f"Control: on random weights the same LoRA goes from {start:.2f} to {control.mean('dev'):.2f} on dev, on the "
            f"pretrained ones from {lora.runs[0]['before']:.2f} to {lora.mean('dev'):.2f}."
        )


def against_full(task: Task, result: Result, full: Result) -> str:
    score, best = result.mean("test"), full.mean("test")
    worst = best + WITHIN * abs(best) * (1 if task.lower_is_better else -1)
    close, small = not task.better(worst, score), result.part <= LARGEST_PART
    reasons = [] if close else [f"the score is more than {WITHIN:.0%} worse"]
    reasons += [] if small else [f"{result.part:.1%} of a base of {result.runs[0]['total']:,} is trained"]
    difference = f", {score / best - 1:+.1%}" if best else ""
    verdict = "goal met" if not reasons else f"goal not met ({'; '.join(reasons)})"
    return (
        f"{result.title}: {verdict}: {task.metric} {score:.4f} against {best:.4f}{difference}, with "
        f"{result.part:.2%} of the parameters."
    )


def against_bound(task: Task, result: Result) -> str:
    assert task.bound is not None
    split, bound = task.bound
    score = result.mean(split)
    reached = "reached" if not task.better(bound, score) else "missed"
    return f"{result.title}: PEFT's {bound:g} on {split} {reached} with {score:.4f}."
