"""What the methods learn: full fine-tuning, a head alone, LoRA and DoRA on real data with real pretrained models.

    python benchmarks/quality.py                                  # all tasks, methods and seeds; writes a report
    python benchmarks/quality.py --tasks sort e2e --seeds 0       # a part of it
    python benchmarks/quality.py --report                         # the report from what has been run so far

For each task and method the learning rate is chosen by its score on dev, with the first seed and a third of the steps;
with that rate each seed is trained in full, and the report gives the scores on test. Every run is appended to a JSONL
file as it ends, and is not run again: an interrupted sweep goes on where it stopped. Data and models are looked for in
``$INLAY_SHARED`` or beside the repository in ``shared``; what is absent is skipped by name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when the libraries below are imported: all that is needed lies on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from quality_tasks import TASKS
from quality_tasks.methods import METHODS, methods_of
from quality_tasks.report import render
from quality_tasks.task import SPLITS, Task
from quality_tasks.training import run

BENCHMARKS = Path(__file__).resolve().parent
Record = dict[str, Any]


def quick(task: Task) -> Task:
    """Return the task cut down to seconds: it shows that all works, not how well."""
    rates = {family: tuple(rates)[:1] for family, rates in task.rates.items()}
    return replace(task, steps=6, batch_size=8, rates=rates, most={"train": 64, "dev": 16, "test": 16})


class Sweep:
    """Runs of tasks and methods, kept in a JSONL file.

    Args:
        cache: the file; each line is one run.
        shared: folder with ``data`` and ``models``.
        seeds: the first is the one with which rates are chosen.
        rates: learning rates to try in place of the tasks' own.
    """

    def __init__(self, cache: Path, shared: Path, seeds: list[int], rates: list[float] | None = None) -> None:
        self.cache, self.shared, self.seeds, self.rates = cache, shared, seeds, rates
        self.records: list[Record] = []
        self.data: tuple[str, dict[str, list[Any]]] = ("", {})  # of the last task
        if cache.is_file():
            self.records = [json.loads(line) for line in cache.read_text().splitlines()]

    def fill(self, tasks: list[Task], methods: list[str]) -> None:
        """Run what has not been run yet, seed by seed, so that an interrupted sweep has something of every task."""
        for seed in self.seeds:
            for task in tasks:
                for method in methods_of(task, methods) if not task.missing(self.shared) else ():
                    self._fill(task, method, seed)

    def find(self, task: Task, method: str, **wanted: float) -> list[Record]:
        """Return the runs of a method on a task as it is set now, with the rate or the seed that is asked for."""
        key = {"task": task.name, "method": method, "settings": task.settings()} | wanted
        return [r for r in self.records if all(r[k] == v for k, v in key.items())]

    def tried(self, task: Task, method: str) -> list[Record]:
        """Return the short runs of a method, one for each rate that is tried."""
        wanted = self._wanted(task, method)
        found = (self.find(task.trial(), method, rate=rate, seed=self.seeds[0]) for rate in wanted)
        return [runs[0] for runs in found if runs]

    def best_rate(self, task: Task, method: str) -> float | None:
        """Return the rate with the best score on dev, or None before all have been tried."""
        method = METHODS[method].rate_of or method
        tried, wanted = self.tried(task, method), self._wanted(task, method)
        if len(wanted) == 1:
            return wanted[0]
        sign = 1 if task.lower_is_better else -1
        return min(tried, key=lambda r: sign * r["dev"])["rate"] if len(tried) == len(wanted) else None

    def _wanted(self, task: Task, method: str) -> list[float]:
        return list(self.rates or task.rates[METHODS[method].rates])

    def _fill(self, task: Task, method: str, seed: int) -> None:
        deciding = METHODS[method].rate_of or method
        rates = self._wanted(task, deciding)
        for rate in rates if len(rates) > 1 else []:
            if not self.find(task.trial(), deciding, rate=rate, seed=self.seeds[0]):
                self._run(task.trial(), deciding, rate, self.seeds[0], ("train", "dev"))
        chosen = self.best_rate(task, method)
        assert chosen is not None
        if not self.find(task, method, rate=chosen, seed=seed):
            self._run(task, method, chosen, seed, SPLITS)

    def _run(self, task: Task, method: str, rate: float, seed: int, splits: tuple[str, ...]) -> None:
        if self.data[0] != task.name:
            self.data = (task.name, task.examples(self.shared))
        examples = {split: self.data[1][split][: task.most.get(split)] for split in splits}
        start = time.perf_counter()
        found = run(task, METHODS[method], rate, seed, examples, self.shared)
        seconds = time.perf_counter() - start
        what = {"task": task.name, "method": method, "rate": rate, "seed": seed, "settings": task.settings()}
        self._keep(what | found | {"seconds": round(seconds, 1)} | machine())
        scores = "  ".join(f"{split} {found[split]:.4f}" for split in splits if split in found)
        print(
            f"{task.name:6} {method:12} seed {seed} rate {rate:<7g} {task.steps:4} steps  {scores}"
            f"  {found['milliseconds']:.0f} ms/step  {seconds:.0f} s",
            flush=True,
        )

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a") as file:  # one write, so that two processes can share the file
            file.write(json.dumps(record) + "\n")


def machine() -> Record:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "transformers")},
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=" ".join(TASKS)
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=" ".join(METHODS),
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="rates are chosen with the first"
    )
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates in place of the tasks' own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quick", action="store_true", help="a few steps: shows that all works, not how well"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the report from the runs so far"
    )
    parser.add_argument("--cache", type=Path, help="default runs/quality/results.jsonl, or quick.jsonl")
    parser.add_argument(
        "--output", type=Path, help="the report; default benchmarks/reports/<date>-quality.md"
    )
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()  # it would warn of new heads
    transformers.utils.logging.disable_progress_bar()
    runs = BENCHMARKS.parent / "runs" / "quality"
    cache = options.cache or runs / ("quick.jsonl" if options.quick else "results.jsonl")
    output = options.output or (
        runs / "quick.md" if options.quick else BENCHMARKS / "reports" / f"{options.date}-quality.md"
    )
    shared = Path(os.environ.get("INLAY_SHARED", BENCHMARKS.parent.parent / "shared"))
    tasks = [quick(TASKS[name]) if options.quick else TASKS[name] for name in options.tasks]
    sweep = Sweep(cache, shared, options.seeds, options.rates)
    if not options.report:
        sweep.fill(tasks, options.methods)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(sweep, tasks, options.methods, options.date))
    print(f"\n{output.read_text()}\nwritten to {output}")


if __name__ == "__main__":
    main()
