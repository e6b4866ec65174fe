"""What a training step costs with an adapter, against the frozen model and against PEFT, in one process.

    python benchmarks/step.py                                       # prints the tables, writes a report
    python benchmarks/step.py --threads 1 --clock cpu               # on a machine that others use as well

A step is forward and backward of a small Llama down to its input embeddings, without an optimizer. "Frozen" is the same
step of the bare model; two copies of it bound the noise. Rounds are interleaved, every other one in reverse order, and
a ratio is the median over rounds of the ratio within the round.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, VOCABULARY = 8, 128, 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FROZEN, CONTROL = "frozen", "frozen, second copy"


@dataclass
class Variant:
    """A model and what its step costs."""

    model: nn.Module
    milliseconds: list[float]
    flops: int = 0
    saved: int = 0


def llama(dtype: torch.dtype, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(library: str, dtype: torch.dtype, layers: int, **settings: Any) -> nn.Module:
    peft = importlib.import_module(library)
    options = {"autocast_adapter_dtype": False} if settings.pop("narrow_adapters", False) else {}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **settings)
    model: nn.Module = peft.get_peft_model(llama(dtype, layers), config, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an adapter that has learnt something, not the zeros it starts from
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def variants(dtype: torch.dtype, layers: int) -> dict[str, Variant]:
    models: dict[str, nn.Module] = {
        name: llama(dtype, layers).requires_grad_(False) for name in (FROZEN, CONTROL)
    }
    models["full fine-tuning"] = llama(dtype, layers)
    for library in ("peft", "inlay"):
        for method, use_dora in (("LoRA", False), ("DoRA", True)):
            for p in (0.0, 0.1):
                name = f"{library} {method}" + (f", dropout {p}" if p else "")
                models[name] = adapted(library, dtype, layers, lora_dropout=p, use_dora=use_dora)
    if dtype == torch.bfloat16:
        models["peft LoRA, adapters in bf16"] = adapted("peft", dtype, layers, narrow_adapters=True)
    return {name: Variant(model, []) for name, model in models.items()}


def step(model: Any, tokens: Tensor) -> None:
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(
    calls: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            gc.collect()
            start = clock()
            calls[name]()
            taken[name].append((clock() - start) * 1e3)
    return {name: values[1:] for name, values in taken.items()}


def in_place_addmm_flops(into: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def flops(model: nn.Module, tokens: Tensor) -> int:
    # By itself the counter knows out-of-place products only.
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm_flops}
    ) as counter:
        step(model, tokens)
    return counter.get_total_flops()


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of distinct memory kept for backward, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()  # type: ignore[operator]
        loss = model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    del loss
    return total


def import_table(clock: str, times: int = 5) -> list[str]:
    """The least of some interleaved runs of each import, in processes of their own."""
    statements = ("import torch", "import inlay", "from inlay import get_peft_model", "import peft")
    timer = CLOCKS[clock].__name__
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(times):
        for statement, values in seconds.items():
            script = f"import time; t = time.{timer}(); {statement}; print(time.{timer}() - t)"
            run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
            values.append(float(run.stdout.split()[-1]))
    base = min(seconds["import torch"])
    lines = ["| statement | seconds, least | beyond torch |", "|--|--|--|"]
    return lines + [f"| `{s}` | {min(v):.2f} | {min(v) - base:+.2f} |" for s, v in seconds.items()]


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    return [n / d for n, d in zip(numerator, denominator, strict=True)]


def step_table(found: dict[str, Variant]) -> list[str]:
    frozen = found[FROZEN]
    lines = [
        "| variant | ms, median | ms, least | / frozen (quartiles) | / PEFT | GFLOP | / frozen | saved, MB |"
    ]
    lines.append("|--|--|--|--|--|--|--|--|")
    for name, variant in found.items():
        peer = found.get(name.replace("inlay", "peft")) if name.startswith("inlay") else None
        against = spread(ratios(variant.milliseconds, peer.milliseconds)) if peer else ""
        lines.append(
            f"| {name} | {statistics.median(variant.milliseconds):.1f} | {min(variant.milliseconds):.1f} "
            f"| {spread(ratios(variant.milliseconds, frozen.milliseconds))} | {against} "
            f"| {variant.flops / 1e9:.2f} | {variant.flops / frozen.flops:.3f} | {variant.saved / 1e6:.1f} |"
        )
    return lines


def inference_table(found: dict[str, Variant], tokens: Tensor, arguments: argparse.Namespace) -> list[str]:
    models = {
        name: found[name].model.eval()
        for name in (FROZEN, "inlay LoRA", "inlay DoRA", "peft LoRA", "peft DoRA")
    }

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)

    calls = {name: (lambda model=model: run(model)) for name, model in models.items()}
    taken = measure(calls, 2 * arguments.rounds, CLOCKS[arguments.clock])
    lines = ["| forward in eval mode | ms, median | / frozen (quartiles) | DoRA / LoRA |", "|--|--|--|--|"]
    for name, values in taken.items():
        base = taken.get(name.replace("DoRA", "LoRA")) if "DoRA" in name else None
        against = spread(ratios(values, base)) if base else ""
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.1f} | {spread(ratios(values, taken[FROZEN]))} | {against} |")
    return lines


def processor() -> str:
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    units = [
        unit
        for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if f" {unit} " in text.replace("\n", " ")
    ]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


def setting(arguments: argparse.Namespace) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"- {processor()}; {torch.get_num_threads()} threads; {arguments.clock} clock",
        f"- Python {platform.python_version()}, {packages}",
        f"- Llama, {arguments.layers} layers, d 512, MLP 1376; {BATCH} x {LENGTH} tokens; r 8 on all seven linear layers; "
        f"{arguments.rounds} interleaved rounds",
        "- a step is forward and backward down to the input embeddings; no optimizer",
    ]


def sections(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The report, each part as soon as it is measured."""
    clock = CLOCKS[arguments.clock]
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    yield [f"# Cost of a step, {arguments.date}", "", *setting(arguments)]
    for label in arguments.dtypes:
        found = variants(DTYPES[label], arguments.layers)
        taken = measure(
            {name: (lambda model=v.model: step(model, tokens)) for name, v in found.items()},
            arguments.rounds,
            clock,
        )
        for name, variant in found.items():
            variant.milliseconds = taken[name]
            variant.flops, variant.saved = flops(variant.model, tokens), saved_bytes(variant.model, tokens)
        yield ["", f"## {label}", "", *step_table(found), "", *inference_table(found, tokens, arguments)]
    yield ["", "## Import", "", *import_table(arguments.clock)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds, at least 2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu is meaningful with one thread only"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument(
        "--report", type=Path, help="file to write; default benchmarks/reports/<date>-step.md"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.report or Path(__file__).parent / "reports" / f"{arguments.date}-step.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for lines in sections(arguments):
            for target in (file, sys.stdout):
                print("\n".join(lines), file=target, flush=True)


if __name__ == "__main__":
    main()
