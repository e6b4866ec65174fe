"""What is counted and timed of the cases of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from instruments import CLOCKS, flops_of, memory_of, one_round, operations_of, python_calls_of, saved_bytes

from .models import Case, Size

Builders = Mapping[str, Callable[[str, Size], Case]]
"""Makes the case of a name for a model of a name and a size."""
GENERATED = 16
TINY = Size(width=32, layers=1, batch=1, length=4)


class Bench:
    """The cases of one model in one process, asked for by plain values, so that another process can ask.

    Args:
        builders: the cases by name.
        model: name of the model.
        size: its size.
    """

    def __init__(self, builders: Builders, model: str, size: Size) -> None:
        self.tokens = size.tokens()
        self.cases = {name: make(model, size) for name, make in builders.items()}

    def count(self) -> dict[str, dict[str, Any]]:
        """Return what a step of each case costs, in numbers that are the same at every run; in bytes where not named."""
        found: dict[str, dict[str, Any]] = {}
        for name, case in self.cases.items():
            case.model.train()
            step = partial(case.step, self.tokens)
            peak, total = memory_of(step)
            found[name] = {
                "trained": case.trained(),
                "copies": case.copies,
                "flops": flops_of(step),
                "saved": saved_bytes(case.model, partial(case.loss, self.tokens)),
                "peak": peak,
                "allocated": total,
            }
        return found

    def count_forward(self) -> dict[str, dict[str, Any]]:
        """Return the operations and Python calls of a forward pass in eval mode."""
        found: dict[str, dict[str, Any]] = {}
        for name, case in self.cases.items():
            case.model.eval()
            forward = partial(case.forward, self.tokens)
            found[name] = {"operations": operations_of(forward), "calls": python_calls_of(forward)}
        return found

    def time(self, what: str, names: list[str] | None, clock: str, backwards: bool) -> dict[str, float]:
        """Return the milliseconds of one round of "step", "forward" or "generate"."""
        calls: dict[str, Callable[[], None]] = {}
        for name in self.cases if names is None else [n for n in names if n in self.cases]:
            case = self.cases[name]
            case.model.train(what == "step")
            more = (GENERATED,) if what == "generate" else ()
            calls[name] = partial(getattr(case, what), self.tokens, *more)
        return one_round(calls, backwards, CLOCKS[clock])
