"""What SHiRA costs: a training step, its memory, switching adapters, and files; against LoRA, PEFT and the frozen model.

    python benchmarks/shira.py                                      # prints the tables, writes a report
    python benchmarks/shira.py --threads 1 --clock cpu              # on a machine that others use as well

Steps are those of ``step.py``: forward and backward of a small Llama down to its input embeddings, rounds interleaved, a
ratio is the median of ratios within rounds. Here a step ends with AdamW on what is trained, so that SHiRA's values are
written into the weights anew each time. Peak memory is the largest sum of allocations during such a step, beyond what
the model and its optimizer hold; it is exact and the same in every run. A switch brings in one of two resident adapters in
place of the other; with LoRA it is merged after the other is unmerged.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from instruments import (
    CLOCKS,
    arguments_of_timing,
    interleaved,
    memory_of,
    processor,
    ratios,
    spread,
    write_report,
)
from step import FROZEN, VOCABULARY, loss_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA, SHIRA = "inlay LoRA", "inlay SHiRA"


@dataclass
class Trained:
    """A model and the optimizer of what is trained of it."""

    model: Any
    optimizer: torch.optim.Optimizer | None

    def step(self, tokens: Tensor) -> None:
        """Run forward, backward and the optimizer's step."""
        loss_of(self.model, tokens).backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def config_of(library: str, name: str, r: int, **settings: Any) -> Any:
    return getattr(importlib.import_module(library), name)(r=r, target_modules=TARGETS, **settings)


def adapted(library: str, config: Any, width: int, layers: int) -> Trained:
    model = importlib.import_module(library).get_peft_model(llama(width, layers), config).train()
    return Trained(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))


def variants(width: int, layers: int, r: int) -> dict[str, Trained]:
    models = {FROZEN: Trained(llama(width, layers).requires_grad_(False), None)}
    for library in ("inlay", "peft"):
        for method, name in (("LoRA", "LoraConfig"), ("SHiRA", "ShiraConfig")):
            models[f"{library} {method}"] = adapted(library, config_of(library, name, r), width, layers)
    dropped = config_of("peft", "LoraConfig", r, lora_dropout=0.05)  # as in the paper's measurements
    models["peft LoRA, dropout 0.05"] = adapted("peft", dropped, width, layers)
    return models


def step_section(arguments: argparse.Namespace, width: int, layers: int) -> list[str]:
    tokens = torch.randint(VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(0))
    found = variants(width, layers, arguments.r)
    calls = {name: (lambda v=v: v.step(tokens)) for name, v in found.items()}
    taken = interleaved(calls, arguments.rounds, CLOCKS[arguments.clock])
    peaks = {name: memory_of(partial(v.step, tokens))[0] for name, v in found.items()}
    parameters = [p for name, p in found[FROZEN].model.named_parameters() if any(t in name for t in TARGETS)]
    trained = sum(p.numel() for p in found[SHIRA].model.parameters() if p.requires_grad)
    lines = [
        f"Llama, {layers} layers, d {width}; 8 x 128 tokens; r {arguments.r}: SHiRA trains "
        f"{trained / sum(p.numel() for p in parameters):.2%} of the adapted weights.",
        "",
        "| variant | ms, median | ms, least | / frozen (quartiles) | / inlay LoRA | peak, MB | / peft LoRA's |",
        "|--|--|--|--|--|--|--|",
    ]
    for name, values in taken.items():
        lines.append(
            f"| {name} | {median(values):.1f} | {min(values):.1f} | {spread(ratios(values, taken[FROZEN]))} "
            f"| {median(ratios(values, taken[LORA])):.3f} | {peaks[name] / 1e6:.1f} | {peaks[name] / peaks['peft LoRA']:.3f} |"
        )
    return lines


def switch_section(arguments: argparse.Namespace, d: int) -> list[str]:
    calls: dict[str, Callable[[], None]] = {}
    for library in ("inlay", "peft"):
        for method, name in (("LoRA", "LoraConfig"), ("SHiRA", "ShiraConfig")):
            config = getattr(importlib.import_module(library), name)(r=arguments.r, target_modules=["0"])
            base = nn.Sequential(nn.Linear(d, d, bias=False))
            model = importlib.import_module(library).get_peft_model(base, config, adapter_name="first")
            model.add_adapter("second", config)
            switch = write_values if f"{library} {method}" == SHIRA else fuse
            calls[f"{library} {method}"] = partial(switch, model.eval())
    with torch.no_grad():
        taken = interleaved(calls, 3 * arguments.rounds, CLOCKS[arguments.clock])
    lines = [f"| Linear({d}, {d}) | ms a switch, median | ms, least | / inlay SHiRA |", "|--|--|--|--|"]
    for name, values in taken.items():
        against = median(ratios(values, taken[SHIRA]))
        lines.append(f"| {name} | {median(values) / 2:.2f} | {min(values) / 2:.2f} | {against:.1f} |")
    return lines


def fuse(model: Any) -> None:
    """Switch twice, each time unmerging one adapter and merging the other."""
    for name in ("first", "second"):
        model.unmerge_adapter()
        model.set_adapter(name)
        model.merge_adapter()


def write_values(model: Any) -> None:
    """Switch twice, each time doing at once what the next forward pass would do first."""
    for name in ("first", "second"):
        model.set_adapter(name)
        for layer in model.base_model.layers():
            layer.inside.settle(layer.live_slots(layer.setting()))


def file_section(arguments: argparse.Namespace) -> list[str]:
    lines = ["| variant | adapter_model.safetensors, bytes | / LoRA's |", "|--|--|--|"]
    sizes: dict[str, int] = {}
    for library, name in (("inlay", "LoraConfig"), ("inlay", "ShiraConfig"), ("peft", "ShiraConfig")):
        model = adapted(library, config_of(library, name, arguments.r), 512, 1).model
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            sizes[f"{library} {name}"] = (Path(folder) / "adapter_model.safetensors").stat().st_size
    first = sizes["inlay LoraConfig"]
    return lines + [f"| {name} | {size:,d} | {size / first:.2f} |" for name, size in sizes.items()]


def sections(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The report, each part as soon as it is measured."""
    yield [
        f"# Cost of SHiRA, {arguments.date}",
        "",
        f"- {processor()}; {torch.get_num_threads()} threads; {arguments.clock} clock; {arguments.rounds} interleaved rounds",
        "- a step is forward and backward down to the input embeddings, and AdamW",
    ]
    for size in arguments.sizes:
        width, layers = (int(n) for n in size.split("x"))
        yield ["", f"## Step, d {width}", "", *step_section(arguments, width, layers)]
    yield ["", "## Switch"]
    for d in (2048, 4096):
        yield ["", *switch_section(arguments, d)]
    yield ["", "## Files", "", *file_section(arguments)]


def main() -> None:
    parser = arguments_of_timing(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["512x3", "1024x1"], help="width x layers of the model")
    parser.add_argument("--r", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "Sparse invariant checks")  # in PEFT's SHiRA
    warnings.filterwarnings("ignore", "Already unmerged")  # before PEFT's first switch
    write_report(arguments, "shira", sections(arguments))


if __name__ == "__main__":
    main()
