"""What methods of activation and prompt space cost, against the frozen model, PEFT and AdapterHub.

    python benchmarks/activations.py                                       # Inlay and PEFT; writes a report
    python benchmarks/activations.py --adapterhub-python hub/bin/python    # and AdapterHub, in a process of its own
    python benchmarks/activations.py --threads 1 --clock cpu               # on a machine that others use as well

AdapterHub's ``adapters`` pins transformers 4, so it runs in an environment of its own, for example::

    python -m venv hub && hub/bin/pip install torch==2.13.0 && hub/bin/pip install adapters==1.3.0 transformers==4.57.6

The two processes take turns, round by round; each case is compared with the frozen model of its own process. A step is forward
and backward down to the input embeddings, without an optimizer. Counts (operations, bytes) are exact and the same in every
run. Rounds are interleaved, every other one in reverse order, and a ratio is the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Read when the libraries below are imported: all that is needed lies on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from activation_cost import inlay_and_peft, report
from activation_cost.measure import GENERATED, TINY
from activation_cost.models import MODELS, Size
from activation_cost.sides import Here, There, Together
from instruments import arguments_of_timing, processor, write_report

QUICK = Size(width=128, layers=1, batch=2, length=8)


def setting(arguments: argparse.Namespace, sides: list[Here | There], size: Size) -> list[str]:
    """Return what a reader has to know of the run."""
    lines = [
        f"- {processor()}; {arguments.threads} threads; {arguments.clock} clock; load before the run "
        f"{' '.join(f'{n:.1f}' for n in os.getloadavg())} on {os.cpu_count()} cores",
        f"- Python {platform.python_version()}",
    ]
    for side in sides:
        lines.append(f"- {side.where}: {', '.join(f'{n} {v}' for n, v in side.versions().items())}")
    return [
        *lines,
        f"- BERT (post-norm) and GPT-2 (pre-norm): {size.layers} layers, d {size.width}, MLP {4 * size.width}, no dropout; "
        f"{size.batch} x {size.length} tokens, no padding; {arguments.rounds} interleaved rounds",
        "- Houlsby: both sub-layers, bottleneck d/16, swish; Pfeiffer: feed-forward, d/16, reads norm(y + r); parallel: feed-forward, "
        "d/2; Compacter: d/32, n 4, rank 1. Compositions are of two Pfeiffer adapters, both trained; Fuse trains the fusion alone",
        f"- {inlay_and_peft.VIRTUAL_TOKENS} virtual tokens; networks of P-tuning and projected prefixes are 128 wide",
    ]


def sections(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The report, each part as soon as it is measured."""
    size = QUICK if arguments.quick else Size(arguments.width, arguments.layers, 8, arguments.length)
    sides: list[Here | There] = [Here(arguments.methods)]
    if arguments.adapterhub_python is not None:
        sides.append(There(arguments.adapterhub_python, arguments.threads, arguments.methods))
    together = Together(sides, arguments.rounds, arguments.clock)
    yield [
        f"# Cost of methods on activations and prompts, {arguments.date}",
        "",
        *setting(arguments, sides, size),
    ]
    for model in arguments.models:
        together.load(model, size)
        counts, taken = together.ask("count"), together.time("step")
        yield ["", f"## {model}: a training step", "", *report.step_table(counts, taken)]
        taken = together.time("forward")
        yield ["", f"## {model}: forward in eval mode", "", *report.forward_table(taken)]
        if model == "gpt2":
            taken = together.time("generate", inlay_and_peft.GENERATING)
            yield ["", f"## {model}: generation of {GENERATED} tokens", "", *report.generation_table(taken)]
        together.load(model, TINY)
        counts, taken = together.ask("count_forward"), together.time("forward", times=8)
        yield [
            "",
            f"## {model}: fixed cost of a forward pass",
            "",
            *report.overhead_table(counts, taken, TINY),
        ]
    yield ["", "## How to read this", "", *report.NOTES]
    for side in sides:
        side.close()


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the report."""
    parser = arguments_of_timing(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", help="names of methods, such as Houlsby; all by default")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of each of the 8 samples")
    parser.add_argument("--adapterhub-python", type=Path, help="Python of an environment that has adapters")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: shows that all works, not how well"
    )
    told = parser.parse_args(arguments)
    torch.set_num_threads(told.threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # in PEFT's prompts
    write_report(told, "activations", sections(told))


if __name__ == "__main__":
    sys.exit(main())
