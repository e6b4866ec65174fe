"""The cases of Inlay and of PEFT, which share a process."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import inlay
from inlay import BottleneckConfig

from .measure import FROZEN, Builders
from .models import Case, Size, build

CONTROL = "frozen, second copy"
GENERATING = ("prompt tuning", "P-tuning", "prefix tuning", "prefix tuning, projected", "Pfeiffer")
BOTTLENECKS = {
    "Houlsby": "double_seq_bn",
    "Pfeiffer": "seq_bn",
    "parallel": "par_bn",
    "Compacter": "compacter",
    "Compacter++": "compacterpp",
    "Pfeiffer, invertible": "seq_bn_inv",
}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "P-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 128}),
    "prefix tuning": ("PrefixTuningConfig", {}),
    "prefix tuning, projected": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 128},
    ),
}
TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM"}
VIRTUAL_TOKENS = 20


def builders() -> Builders:
    """Return the cases of both libraries, frozen models first."""
    found: dict[str, Callable[[str, Size], Case]] = {FROZEN: frozen, CONTROL: frozen}
    for name, preset in BOTTLENECKS.items():
        found[f"inlay {name}"] = _bottleneck(preset)
    for name, (config, settings) in PROMPTS.items():
        for library in ("inlay", "peft"):
            found[f"{library} {name}"] = _prompt(library, config, settings)
    for name in COMPOSITIONS:
        found[f"inlay {name}"] = _composed(name)
    found["inlay mixed batch"] = _mixed
    return found


def frozen(model: str, size: Size) -> Case:
    """Return the bare model."""
    return Case(build(model, size).requires_grad_(False))


def _bottleneck(preset: str) -> Callable[[str, Size], Case]:
    def make(model: str, size: Size) -> Case:
        return Case(inlay.get_peft_model(build(model, size), BottleneckConfig.preset(preset)))

    return make


def _prompt(library: str, config: str, settings: Mapping[str, Any]) -> Callable[[str, Size], Case]:
    def make(model: str, size: Size) -> Case:
        peft = importlib.import_module(library)
        told = getattr(peft, config)(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TASKS[model], **settings)
        return Case(peft.get_peft_model(build(model, size), told))

    return make


COMPOSITIONS: dict[str, Callable[[Any, int], Any]] = {
    "Stack": lambda model, batch: inlay.Stack("a", "b"),
    "Average": lambda model, batch: inlay.Average("a", "b"),
    "Fuse": lambda model, batch: _fusion(model),
    "Parallel": lambda model, batch: inlay.Parallel("a", "b"),
    "BatchSplit": lambda model, batch: inlay.BatchSplit("a", "b", batch_sizes=batch // 2),
}
"""Two Pfeiffer adapters, and how they act together."""


def _fusion(model: Any) -> str:
    model.add_adapter("both", inlay.FusionConfig(members=["a", "b"], regularization=0.0))
    return "both"


def _composed(name: str) -> Callable[[str, Size], Case]:
    def make(model: str, size: Size) -> Case:
        adapted: Any = inlay.get_peft_model(
            build(model, size), BottleneckConfig.preset("seq_bn"), adapter_name="a"
        )
        adapted.add_adapter("b", BottleneckConfig.preset("seq_bn"))
        adapted.set_adapter(COMPOSITIONS[name](adapted, size.batch))
        return Case(adapted)

    return make


def _mixed(model: str, size: Size) -> Case:
    adapted: Any = inlay.get_peft_model(
        build(model, size), BottleneckConfig.preset("seq_bn"), adapter_name="a"
    )
    adapted.add_adapter("b", BottleneckConfig.preset("seq_bn"))
    names = ["a", "b"] * size.batch
    return Case(adapted, {"adapter_names": names[: size.batch]})


def versions() -> dict[str, str]:
    """Return the versions of what is measured here."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
