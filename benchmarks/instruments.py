"""What the scripts beside this file measure with, and how they write their reports."""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

REPORTS = Path(__file__).parent / "reports"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    calls: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of each call in each round, every other one in reverse order, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, milliseconds in one_round(calls, turn % 2 == 0, clock).items():
            taken[name].append(milliseconds)
    return {name: values[1:] for name, values in taken.items()}


def one_round(
    calls: dict[str, Callable[[], None]], backwards: bool, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the milliseconds of each call, made once, from the first to the last or the other way round."""
    taken: dict[str, float] = {}
    for name in list(calls)[:: -1 if backwards else 1]:
        gc.collect()
        start = clock()
        calls[name]()
        taken[name] = (clock() - start) * 1e3
    return {name: taken[name] for name in calls}


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


def flops_of(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_THE_COUNTER) as counter:
        call()
    return counter.get_total_flops()


def _in_place_addmm(into: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_UNKNOWN_TO_THE_COUNTER = {
    torch.ops.aten.addmm_: _in_place_addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def memory_of(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the largest sum of what is allocated at a time during a call, beyond what was there before, and the sum of all
    that is allocated in its course; both are exact, and the same at every call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak, total = max(peak, held), total + max(event.nbytes(), 0)
    return peak, total


def operations_of(call: Callable[[], Any]) -> int:
    """Return how many operations PyTorch dispatches in a call, views included."""
    with _Operations() as operations:
        call()
    return operations.count


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def python_calls_of(call: Callable[[], Any]) -> int:
    """Return how many functions Python calls in a call, built-in ones included, the second time it is made."""
    call()
    with _python_calls() as count:
        call()
    return count[0]


@contextmanager
def _python_calls() -> Iterator[list[int]]:
    count = [0]

    def see(frame: Any, event: str, _: Any) -> None:
        count[0] += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        yield count
    finally:
        sys.setprofile(None)


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
