"""What a training step costs with an adapter, against the frozen model and against PEFT, in one process.

    python benchmarks/step.py                                       # prints the tables, writes a report
    python benchmarks/step.py --threads 1 --clock cpu               # on a machine that others use as well

A step is forward and backward of a small Llama down to its input embeddings, without an optimizer. "Frozen" is the same
step of the bare model; two copies of it bound the noise. Rounds are interleaved, every other one in reverse order, and
a ratio is the median over rounds of the ratio within the round.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import torch
from instruments import (
    CLOCKS,
    arguments_of_timing,
    flops_of,
    interleaved,
    processor,
    ratios,
    saved_bytes,
    spread,
    write_report,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, VOCABULARY = 8, 128, 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


def adaptive(library: str, dtype: torch.dtype, layers: int, pruned: bool) -> nn.Module:
    """Return a model with AdaLoRA: rank 12 to begin with, or 8 on average after the last ranks have gone."""
    peft = importlib.import_module(library)
    config = peft.AdaLoraConfig(
        init_r=12,
        target_r=8,
        lora_alpha=16,
        target_modules="all-linear",
        tinit=1,
        tfinal=1,
        total_step=4,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(llama(dtype, layers), config).train()
    tokens = some_tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for turn in range(4 if pruned else 1):
        loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if pruned:
            model.base_model.update_and_allocate(turn)
        optimizer.zero_grad()
    return cast("nn.Module", model)


def some_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


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
        for pruned in (False, True):
            name = f"{library} AdaLoRA" + (", pruned" if pruned else "")
            models[name] = adaptive(library, dtype, layers, pruned)
    if dtype == torch.bfloat16:
        models["peft LoRA, adapters in bf16"] = adapted("peft", dtype, layers, narrow_adapters=True)
    return {name: Variant(model, []) for name, model in models.items()}


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Return the loss, with gradients asked for down to the input embeddings."""
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    loss: Tensor = model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss
    return loss


def step(model: Any, tokens: Tensor) -> None:
    loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


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
    taken = interleaved(calls, 2 * arguments.rounds, CLOCKS[arguments.clock])
    lines = ["| forward in eval mode | ms, median | / frozen (quartiles) | DoRA / LoRA |", "|--|--|--|--|"]
    for name, values in taken.items():
        base = taken.get(name.replace("DoRA", "LoRA")) if "DoRA" in name else None
        against = spread(ratios(values, base)) if base else ""
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.1f} | {spread(ratios(values, taken[FROZEN]))} | {against} |")
    return lines


def setting(arguments: argparse.Namespace) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"- {processor()}; {torch.get_num_threads()} threads; {arguments.clock} clock",
        f"- Python {platform.python_version()}, {packages}",
        f"- Llama, {arguments.layers} layers, d 512, MLP 1376; {BATCH} x {LENGTH} tokens; r 8 on all seven linear layers; "
        f"{arguments.rounds} interleaved rounds",
        "- a step is forward and backward down to the input embeddings; no optimizer",
        "- AdaLoRA: rank 12 before pruning, 8 on average after, with its penalty; PEFT keeps pruned ranks, as zeros",
    ]


def sections(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The report, each part as soon as it is measured."""
    clock = CLOCKS[arguments.clock]
    tokens = some_tokens()
    yield [f"# Cost of a step, {arguments.date}", "", *setting(arguments)]
    for label in arguments.dtypes:
        found = variants(DTYPES[label], arguments.layers)
        taken = interleaved(
            {name: (lambda model=v.model: step(model, tokens)) for name, v in found.items()},
            arguments.rounds,
            clock,
        )
        for name, variant in found.items():
            variant.milliseconds = taken[name]
            variant.flops = flops_of(partial(step, variant.model, tokens))
            variant.saved = saved_bytes(variant.model, partial(loss_of, variant.model, tokens))
        yield ["", f"## {label}", "", *step_table(found), "", *inference_table(found, tokens, arguments)]
    yield ["", "## Import", "", *import_table(arguments.clock)]


def main() -> None:
    parser = arguments_of_timing(__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_report(arguments, "step", sections(arguments))


if __name__ == "__main__":
    main()
