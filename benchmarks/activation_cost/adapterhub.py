"""The cases of AdapterHub's ``adapters``, which needs transformers 4 and so a process of its own.

    python -m activation_cost.adapterhub        # from the folder above, in an environment that has adapters

Each line of its input asks for something of a ``Bench`` in JSON, each line of its output answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

import adapters
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Stack

from .measure import Bench, Builders
from .models import Case, Size, build

FROZEN = "adapters frozen"
VIRTUAL_TOKENS = 20
METHODS: dict[str, Callable[[], Any]] = {
    "Houlsby": lambda: "double_seq_bn",
    "Pfeiffer": lambda: "seq_bn",
    "parallel": lambda: "par_bn",
    "Compacter": lambda: "compacter",
    "Compacter++": lambda: "compacter++",
    "Pfeiffer, invertible": lambda: "seq_bn_inv",
    "prefix tuning": lambda: adapters.PrefixTuningConfig(flat=True, prefix_length=VIRTUAL_TOKENS),
    "prefix tuning, projected": lambda: adapters.PrefixTuningConfig(
        prefix_length=VIRTUAL_TOKENS, bottleneck_size=128, dropout=0.0
    ),
}
COMPOSITIONS: dict[str, Callable[[int], Any]] = {
    "Stack": lambda batch: Stack("a", "b"),
    "Average": lambda batch: Average("a", "b"),
    "Fuse": lambda batch: Fuse("a", "b"),
    "Parallel": lambda batch: Parallel("a", "b"),
    "BatchSplit": lambda batch: BatchSplit("a", "b", batch_sizes=[batch // 2, batch // 2]),
}


def builders() -> Builders:
    """Return the cases, the frozen model first."""
    found: dict[str, Callable[[str, Size], Case]] = {FROZEN: _frozen}
    found |= {f"adapters {name}": _single(make) for name, make in METHODS.items()}
    found |= {f"adapters {name}": _composed(name) for name in COMPOSITIONS}
    return found


def _frozen(model: str, size: Size) -> Case:
    return Case(build(model, size).requires_grad_(False))


def _single(config: Callable[[], Any]) -> Callable[[str, Size], Case]:
    def make(model: str, size: Size) -> Case:
        adapted: Any = build(model, size)
        adapters.init(adapted)
        adapted.add_adapter("a", config=config())
        adapted.train_adapter("a")
        return Case(adapted)

    return make


def _composed(name: str) -> Callable[[str, Size], Case]:
    def make(model: str, size: Size) -> Case:
        adapted: Any = build(model, size)
        adapters.init(adapted)
        for adapter in ("a", "b"):
            adapted.add_adapter(adapter, config="seq_bn")
        block = COMPOSITIONS[name](size.batch)
        if name == "Fuse":
            adapted.add_adapter_fusion(block)
            adapted.train_adapter_fusion(block)
        else:
            adapted.train_adapter(block)
        return Case(adapted)

    return make


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    torch.set_num_threads(int(sys.argv[1]))
    bench: Bench | None = None
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            what, given = json.loads(line)
            if what == "versions":
                answer: Any = {name: version(name) for name in ("torch", "transformers", "adapters")}
            elif what == "load":
                bench = None  # before the new one takes memory
                bench = Bench(builders(), **given | {"size": Size(**given["size"])})
                answer = {}
            else:
                answer = getattr(bench, what)(**given)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
