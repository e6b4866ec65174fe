"""What the scripts beside this file measure with, and how they write their reports."""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

REPORTS = Path(__file__).parent / "reports"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    calls: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of each call in each round, every other one in reverse order, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            gc.collect()
            start = clock()
            calls[name]()
            taken[name].append((clock() - start) * 1e3)
    return {name: values[1:] for name, values in taken.items()}


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return the ratio within each round."""
    return [n / d for n, d in zip(numerator, denominator, strict=True)]


def spread(values: list[float]) -> str:
    """Return the median and, in brackets, the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def saved_bytes(model: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """Return the bytes of distinct memory that ``loss_of`` keeps for its backward pass, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    del loss
    return total


def processor() -> str:
    """Return the processor's name and those of its units that matter here."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = text.replace("\n", " ")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {unit} " in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


def arguments_of_timing(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every script that takes times is told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu is meaningful with one thread only"
    )
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument(
        "--report", type=Path, help="file to write; default benchmarks/reports/<date>-<script>.md"
    )
    return parser


def write_report(arguments: argparse.Namespace, name: str, parts: Iterable[list[str]]) -> None:
    """Write and print a report, each part as soon as it is measured."""
    path = arguments.report or REPORTS / f"{arguments.date}-{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for lines in parts:
            for target in (file, sys.stdout):
                print("\n".join(lines), file=target, flush=True)
