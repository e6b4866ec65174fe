"""The ways to train that are compared. A method is one entry of ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from inlay import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ReftConfig,
    ShiraConfig,
    calibrate_shira,
    get_peft_model,
)
from inlay.methods.bottleneck.presets import preset_fields

from .task import Batch, Task

Prepare = Callable[[Task, nn.Module, Sequence[Batch]], nn.Module]


@dataclass(frozen=True)
class Method:
    """How a base model is made ready for training.

    Args:
        title: its name in the report.
        prepare: returns the model whose parameters that require gradients are trained; it is told the first batches too.
        rates: which of the task's learning rates are tried; the fewer numbers a method has, the larger its steps may be.
        rate_of: the method whose chosen rate is used in place of trying any.
        pretrained: False for the control on random weights.
        dropout: probability in all dropout layers of the base model.
        r_drop: weight of R-Drop's divergence, for classifiers; every batch is then run twice.
    """

    title: str
    prepare: Prepare
    rates: str = "adapter"
    rate_of: str | None = None
    pretrained: bool = True
    dropout: float = 0.0
    r_drop: float | None = None


def everything(task: Task, model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    return model.requires_grad_(True)


def head_only(task: Task, model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in task.head:
            module.requires_grad_(True)
    return model


def adapter(config: type[PeftConfig], **options: Any) -> Prepare:
    """Return a method that sets in an adapter.

    Args:
        config: its configuration class.
        options: fields of the configuration; a function of the task gives a value that differs from task to task.
    """

    def prepare(task: Task, model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
        values = {key: value(task) if callable(value) else value for key, value in options.items()}
        targets = task.targets if isinstance(task.targets, str) else list(task.targets)
        heads = list(task.head) if task.new_head else None
        settings = {"task_type": task.task_type, "target_modules": targets, "modules_to_save": heads}
        known = {f.name for f in fields(config)}
        settled: Any = config(**({k: v for k, v in settings.items() if k in known} | values))
        if getattr(settled, "mask_type", None) in CALIBRATED:
            settled = calibrate_shira(model, settled, batches)
        return get_peft_model(model, settled)

    return prepare


def bottleneck(preset: str, **options: Any) -> Prepare:
    """Return a method that sets in bottleneck adapters by the name of a preset."""
    return adapter(BottleneckConfig, **(preset_fields(preset) | {"target_modules": None} | options))


def _rank(task: Task) -> int:
    return task.rank


def _shira_rank(task: Task) -> int:
    """Return r for r (in + out) entries of each matrix; the smallest convolution of MobileNet has 128 in all."""
    return min(task.rank, 4) if task.name == "cifar" else task.rank


# A third of the steps is left after the last rank has gone; the scale is alpha / init_r.
RANK_BUDGET = {
    "init_r": lambda task: task.rank * 3 // 2,
    "target_r": _rank,
    "lora_alpha": lambda task: task.alpha * 3 // 2,
    "total_step": lambda task: task.steps,
    "tinit": lambda task: task.steps // 10,
    "tfinal": lambda task: task.steps // 3,
    "deltaT": lambda task: max(1, task.steps // 60),
}
CALIBRATED = ("grad", "snip")
FOR_ENCODERS = (
    "houlsby",
    "pfeiffer",
    "parallel",
    "compacter",
    "reft",
    "prompt",
    "p-tuning",
    "p-tuning-v2",
    "shira-snip",
)
LOW_RANK = {"r": lambda task: task.rank, "lora_alpha": lambda task: task.alpha}

PROMPT = {"num_virtual_tokens": 16}

REFT = {
    "target_modules": None,
    "r": lambda task: min(task.rank, 4),
    "prefix_positions": 3,
    "suffix_positions": 3,
    "dropout": 0.0,
}

STATE = 3
"""Tensors beside each trained one: its gradient and Adam's two averages."""
METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", everything, rates="full"),
    "head": Method("frozen base, head only", head_only, rates="head"),
    "lora": Method("LoRA", adapter(LoraConfig, **LOW_RANK)),
    "dora": Method("DoRA", adapter(LoraConfig, use_dora=True, **LOW_RANK), rate_of="lora"),
    "adalora": Method("AdaLoRA", adapter(AdaLoraConfig, **RANK_BUDGET), rates="wide"),
    "shira": Method("SHiRA, random mask", adapter(ShiraConfig, r=_shira_rank, random_seed=0)),
    "shira-wm": Method(
        "SHiRA, largest weights", adapter(ShiraConfig, r=_shira_rank, mask_type="wm"), rate_of="shira"
    ),
    "ia3": Method("(IA)3", adapter(IA3Config, feedforward_modules=()), rates="wide"),
    "bitfit": Method("BitFit", adapter(BitFitConfig, target_modules=None), rates="wide"),
    "shira-snip": Method(
        "SHiRA, SNIP", adapter(ShiraConfig, r=_shira_rank, mask_type="snip"), rate_of="shira"
    ),
    "houlsby": Method("bottleneck, Houlsby", bottleneck("houlsby"), rates="wide"),
    "pfeiffer": Method("bottleneck, Pfeiffer", bottleneck("pfeiffer"), rate_of="houlsby"),
    "parallel": Method("bottleneck, parallel", bottleneck("parallel", reduction_factor=8), rates="wide"),
    "compacter": Method("Compacter", bottleneck("compacter", reduction_factor=32), rates="wide"),
    "reft": Method("LoReFT", adapter(ReftConfig, **REFT), rates="wide"),
    "prompt": Method("prompt tuning, 16 tokens", adapter(PromptTuningConfig, **PROMPT), rates="prompt"),
    "p-tuning": Method(
        "P-tuning, 16 tokens", adapter(PromptEncoderConfig, encoder_hidden_size=128, **PROMPT), rates="prompt"
    ),
    "p-tuning-v2": Method("P-Tuning v2, 16 tokens", adapter(PrefixTuningConfig, **PROMPT), rates="prompt"),
    "lora-dropout": Method("LoRA, dropout 0.1", adapter(LoraConfig, **LOW_RANK), rate_of="lora", dropout=0.1),
    "lora-r-drop": Method(
        "LoRA, R-Drop 4", adapter(LoraConfig, **LOW_RANK), rate_of="lora", dropout=0.1, r_drop=4.0
    ),
    "lora-random": Method(
        "LoRA on random weights", adapter(LoraConfig, **LOW_RANK), rate_of="lora", pretrained=False
    ),
}


def methods_of(task: Task, methods: list[str]) -> list[str]:
    """Return those that apply to a task: the control on random weights only where the task asks for it, what works on the
    classes' probabilities for classifiers, and what works on sequences for encoders."""
    return [name for name in methods if _applies(METHODS[name], name, task)]


def _applies(method: Method, name: str, task: Task) -> bool:
    if not method.pretrained:
        return task.control
    return task.encoder_classifies or (
        method.r_drop is None and not method.dropout and name not in FOR_ENCODERS
    )


def sizes(task: Task, base_total: int, model: nn.Module) -> dict[str, int]:
    """Return how many parameters the base has, how many are trained, how many of those are not the task's new head,
    the bytes of weights, gradients and optimizer, and the bytes that are stored after training."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_head = {name for name in trained if task.new_head and set(name.split(".")) & set(task.head)}
    in_head = {name for name in in_head if "lora_" not in name}
    count = sum(p.numel() for p in trained.values())
    return {
        "total": base_total,
        "trained": count,
        "beside_head": count - sum(trained[name].numel() for name in in_head),
        "static": sum(p.nbytes for p in model.parameters()) + STATE * sum(p.nbytes for p in trained.values()),
        "bytes": _stored(model, trained),
    }


def _stored(model: nn.Module, trained: dict[str, nn.Parameter]) -> int:
    if not hasattr(model, "peft_config"):
        return sum(p.numel() * p.element_size() for p in trained.values())
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
