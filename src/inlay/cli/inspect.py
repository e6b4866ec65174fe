"""``inlay inspect``: what an adapter adapts, or what a model has to adapt. Reads headers only; no weights, no base model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import UserError, told_as
from .files import TASK_FILE, read_json, safetensors_header
from .options import Inspect
from .tables import table

NUMBER = re.compile(r"\.\d+(?=\.|$)")
PREFIX = "base_model.model."
SHOWN = ("r", "lora_alpha", "target_modules", "modules_to_save", "num_virtual_tokens")


@dataclass
class Part:
    """Tensors or layers of one name, shape and type in several layers."""

    where: str
    what: str
    shape: list[int]
    dtype: str
    layers: int = 0
    parameters: int = 0
    bytes: int = 0


def run(options: Inspect) -> None:
    """Print a table, or JSON.

    Raises:
        UserError: there is neither an adapter nor a model.
    """
    path = Path(options.path)
    if (path / "adapter_config.json").is_file():
        facts, parts = _adapter(path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither an adapter nor a model folder: no adapter_config.json, no config.json"
        )
    else:
        facts, parts = _model(options.path)
    total = {"parameters": sum(part.parameters for part in parts), "bytes": sum(part.bytes for part in parts)}
    if options.json:
        print(json.dumps(facts | total | {"parts": [asdict(part) for part in parts]}, indent=2))
        return
    width = max(map(len, facts))
    print("\n".join(f"{key.ljust(width)}  {value}" for key, value in facts.items()), end="\n\n")
    rows = [
        [p.where, p.what, " x ".join(map(str, p.shape)), p.dtype, p.layers, p.parameters, p.bytes]
        for p in parts
    ]
    rows.append(["total", "", "", "", sum(p.layers for p in parts), total["parameters"], total["bytes"]])
    print(table(["where", "what", "shape", "dtype", "tensors", "parameters", "bytes"], rows))


def _adapter(path: Path) -> tuple[dict[str, Any], list[Part]]:
    config = read_json(path / "adapter_config.json")
    facts = {
        "method": config.get("peft_type"),
        "base model": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
    }
    facts |= {key: config[key] for key in SHOWN if config.get(key) is not None}
    if (path / TASK_FILE).is_file():
        settings = read_json(path / TASK_FILE)
        facts["task"] = settings["task"]
        if settings["labels"]:
            facts["labels"] = ", ".join(map(str, settings["labels"]))
    return facts, _grouped(_adapter_tensors(path))


def _adapter_tensors(path: Path) -> Iterable[tuple[str, str, list[int], str, int]]:
    """Yield where, what, shape, dtype and bytes of each tensor in the file."""
    for key, entry in safetensors_header(path).items():
        where, _, what = (
            key.removeprefix(PREFIX).partition(".lora_")
            if ".lora_" in key
            else key.removeprefix(PREFIX).rpartition(".")
        )
        start, end = entry["data_offsets"]
        yield where, f"lora_{what}" if ".lora_" in key else what, entry["shape"], entry["dtype"], end - start


def _grouped(tensors: Iterable[tuple[str, str, list[int], str, int]]) -> list[Part]:
    parts: dict[Any, Part] = {}
    for where, what, shape, dtype, size in tensors:
        pattern = NUMBER.sub(".*", where)
        part = parts.setdefault((pattern, what, tuple(shape), dtype), Part(pattern, what, list(shape), dtype))
        part.layers, part.parameters, part.bytes = (
            part.layers + 1,
            part.parameters + prod(shape),
            part.bytes + size,
        )
    return list(parts.values())


def _model(name: str) -> tuple[dict[str, Any], list[Part]]:
    import torch
    import transformers

    from inlay.injection.targets import default_targets
    from inlay.kinds import kind_of

    from .adapt import fallback_targets
    from .models import load_config, model_place

    config = load_config(model_place(name), None)
    architecture = next(iter(config.architectures or []), "AutoModel")
    with told_as(f"cannot build {architecture}"), torch.device("meta"):
        kind = getattr(transformers, architecture)
        model = kind.from_config(config) if architecture == "AutoModel" else kind(config)
    usual = default_targets(model, required=False) or fallback_targets(model)
    named = (
        usual if isinstance(usual, str) else ", ".join(sorted({path.rpartition(".")[2] for path in usual}))
    )
    facts = {
        "model": name, "class": type(model).__name__, "type": config.model_type,
        "all parameters": f"{sum(p.numel() for p in model.parameters()):,}", "lora targets by default": named,
    }  # fmt: skip
    adaptable = [(path, module) for path, module in model.named_modules() if kind_of(module) is not None]
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    width = getattr(torch, dtype).itemsize
    return facts, _grouped(
        (path, type(module).__name__, list(module.weight.shape), dtype, module.weight.numel() * width)
        for path, module in adaptable
    )
