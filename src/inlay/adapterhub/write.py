"""An adapter of Inlay, or several that act together, as a folder that AdapterHub's ``load_adapter`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ..config import CONFIG_NAME, PeftConfig
from ..files.folder import check_folder, write_atomically
from ..injection.targets import base_name, model_config
from ..injection.walk import places
from ..methods.bottleneck.config import BottleneckConfig
from ..methods.fusion import FusionConfig
from ..methods.ia3 import IA3Config
from ..methods.lora import LoraConfig
from ..methods.prefix_tuning import PrefixTuningConfig
from ..methods.reft.config import ReftConfig
from . import bottleneck, fusion, low_rank, prefix, reft
from .folder import FUSION_CONFIG, FUSION_SAFETENSORS, SAFETENSORS
from .load import Part

VERSION = "adapters.1.3.0"
"""The version of ``adapters`` whose files these are."""


def write_adapterhub(
    folder: str | os.PathLike[str],
    model: nn.Module,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter, or a fusion without its members, to a folder in AdapterHub's format. Heads are not written.

    Args:
        folder: where to.
        model: the bare base model, in the class that AdapterHub will load the adapter into.
        config: the adapter's configuration.
        tensors: by the keys of Inlay's files.
        name: what AdapterHub is to call it. It finds a fusion by its members' names with commas between: "a,b".
        state: the network that computes a prefix; without it, the prefix is written as it was computed.

    Raises:
        ValueError: AdapterHub has no word for the method, one of its settings, or one of its places. Nothing is written then.
    """
    target = check_folder(folder)
    fields, renamed = _converted(model, Part(config, dict(tensors), dict(state or {})), name)
    if isinstance(config, FusionConfig):
        _write(
            target,
            (FUSION_CONFIG, FUSION_SAFETENSORS),
            model,
            fields,
            renamed,
            name,
            adapter_names=config.members,
        )
    else:
        _write(target, (CONFIG_NAME, SAFETENSORS), model, fields, renamed, name)


def write_union(folder: str | os.PathLike[str], model: nn.Module, parts: Sequence[Part], name: str) -> None:
    """Write adapters that act together as one in AdapterHub's format, such as MAM or UniPELT.

    Arguments and errors are those of ``write_adapterhub``, with the configuration, tensors and network of each part.

    Raises:
        ValueError: two parts are of one method there; or as ``write_adapterhub`` does. Nothing is written then.
    """
    target, converted = check_folder(folder), [_converted(model, part, name) for part in parts]
    methods = [str(fields.get("architecture") or "bottleneck") for fields, _ in converted]
    if len(set(methods)) < len(methods):
        raise ValueError(f"an adapter of AdapterHub can have each method once, not {', '.join(methods)}")
    union = {"architecture": "union", "configs": [fields for fields, _ in converted]}
    tensors = {key: tensor for _, renamed in converted for key, tensor in renamed.items()}
    _write(target, (CONFIG_NAME, SAFETENSORS), model, union, tensors, name)


def _converted(model: nn.Module, part: Part, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return AdapterHub's fields of an adapter, and its tensors by the keys there."""
    config, known = part.config, places(model)
    saved = getattr(config, "modules_to_save", None) or ()
    heads = tuple(f"base_model.{inner}{module}." for module in saved for inner in ("model.", ""))
    own = (
        {key: tensor for key, tensor in part.tensors.items() if not key.startswith(heads)}
        if heads
        else part.tensors
    )
    if isinstance(config, FusionConfig):
        return fusion.fields_for(config), fusion.keys_for(own, name, known)
    if isinstance(config, PrefixTuningConfig):
        return prefix.fields_and_keys(config, own, part.state or {}, name, known, model, _top(model))
    if isinstance(config, (LoraConfig, IA3Config)) or low_rank.is_gated(config):
        return low_rank.fields_and_keys(config, own, name)
    if isinstance(config, ReftConfig):
        return reft.fields_for(config), reft.keys_for(own, config, name)
    if isinstance(config, BottleneckConfig):
        behind = bottleneck.behind_embeddings(config, model, known)
        fields = bottleneck.fields_for(config, _width(model))
        return fields, bottleneck.keys_for(own, config, name, known, _top(model), behind)
    raise ValueError(
        f"{type(config).__name__} cannot be written for AdapterHub; bottleneck adapters, their fusions, LoRA, (IA)3, "
        "prefixes and ReFT can"
    )


def _write(
    target: Path,
    names: tuple[str, str],
    model: nn.Module,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    **more: Any,
) -> None:
    """Write the two files of a folder."""
    description = more | {
        "config": fields, "hidden_size": _width(model), "model_class": type(model).__name__,
        "model_name": base_name(model) or "", "model_type": model_config(model).get("model_type"), "name": name,
        "version": VERSION,
    }  # fmt: skip
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in sorted(tensors.items())}
    content, text = save(plain, metadata={"format": "pt"}), json.dumps(description, indent=2, sort_keys=True)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / names[1], lambda path: path.write_bytes(content))
    write_atomically(target / names[0], lambda path: path.write_text(text, encoding="utf-8"))


def _width(model: nn.Module) -> int:
    return int(getattr(model.config, "hidden_size", 0))  # GPT-2 and T5 know it by this name too


def _top(model: nn.Module) -> str:
    """Return the beginning of the paths of a model without its head: "bert.", "transformer.", ..."""
    inner: Any = getattr(model, "base_model_prefix", "")
    return f"{inner}." if inner and hasattr(model, inner) else ""
