"""What is counted and timed of the cases of one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from instruments import CLOCKS, flops_of, memory_of, one_round, operations_of, python_calls_of, saved_bytes

from .models import Case, Size

Builders = Mapping[str, Callable[[str, Size], Case]]
"""Makes the case of a name for a model of a name and a size. A name is a library and a method, or begins as ``FROZEN``."""
FROZEN = "frozen"
GENERATED = 16
TINY = Size(width=128, layers=1, batch=2, length=4)


class Bench:
    """The cases of one model in one process, asked for by plain values, so that another process can ask.

    Args:
        builders: the cases by name.
        model: name of the model.
        size: its size.
        methods: names of the methods to make; None for all.
    """

    def __init__(
        self, builders: Builders, model: str, size: Size, methods: Sequence[str] | None = None
    ) -> None:
        gc.unfreeze()
        self.tokens = size.tokens()
        chosen = _chosen(builders, methods)
        self.cases = {name: builders[name](model, size) for name in chosen}
        gc.collect()
        gc.freeze()  # or the collection before each measurement goes through all models

    def count(self) -> dict[str, dict[str, Any]]:
        """Return what a step of each case costs, in numbers that are the same at every run."""
        found: dict[str, dict[str, Any]] = {}
        for name, case in self.cases.items():
            case.model.train()
            step = partial(case.step, self.tokens)
            peak, total = memory_of(step)
            found[name] = {
                "trained": case.trained(),
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

    def time(self, what: str, methods: Sequence[str] | None, clock: str, backwards: bool) -> dict[str, float]:
        """Return the milliseconds of one round of "step", "forward" or "generate"."""
        calls: dict[str, Callable[[], None]] = {}
        for name in _chosen(self.cases, methods):
            case = self.cases[name]
            case.model.train(what == "step")
            more = (GENERATED,) if what == "generate" else ()
            calls[name] = partial(getattr(case, what), self.tokens, *more)
        return one_round(calls, backwards, CLOCKS[clock])


def _chosen(names: Mapping[str, Any], methods: Sequence[str] | None) -> list[str]:
    """Return the names of the frozen models, and of the methods that are asked for."""
    return [n for n in names if methods is None or FROZEN in n or n.partition(" ")[2] in methods]
