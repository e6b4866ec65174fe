"""An adapter of Inlay as a folder that AdapterHub's ``load_adapter`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ..config import CONFIG_NAME, PeftConfig
from ..files.folder import check_folder, write_atomically
from ..injection.targets import base_name, model_config
from ..injection.walk import places
from ..methods.bottleneck.config import BottleneckConfig
from ..methods.ia3 import IA3Config
from ..methods.lora import LoraConfig
from ..methods.reft.config import ReftConfig
from . import bottleneck, low_rank, reft
from .folder import SAFETENSORS

VERSION = "adapters.1.3.0"
"""The version of ``adapters`` whose files these are."""


def write_adapterhub(
    folder: str | os.PathLike[str],
    model: nn.Module,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    name: str,
) -> None:
    """Write an adapter to a folder in AdapterHub's format. Heads are not written.

    Args:
        folder: where to.
        model: the bare base model, in the class that AdapterHub will load the adapter into.
        config: the adapter's configuration.
        tensors: by the keys of Inlay's files.
        name: what AdapterHub is to call it.

    Raises:
        ValueError: AdapterHub has no word for the method, one of its settings, or one of its places. Nothing is written then.
    """
    target = check_folder(folder)
    width = int(getattr(model.config, "hidden_size", 0))  # GPT-2 and T5 know it by this name too
    heads = tuple(f"base_model.model.{module}." for module in getattr(config, "modules_to_save", None) or ())
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)} if heads else tensors
    if isinstance(config, BottleneckConfig):
        known = places(model)
        behind = bottleneck.behind_embeddings(config, model, known)
        fields = bottleneck.fields_for(config, width)
        renamed = bottleneck.keys_for(own, config, name, known, _top(model), behind)
    elif isinstance(config, (LoraConfig, IA3Config)):
        fields, renamed = low_rank.fields_and_keys(config, own, name)
    elif isinstance(config, ReftConfig):
        fields, renamed = reft.fields_for(config), reft.keys_for(own, config, name)
    else:
        raise ValueError(
            f"{type(config).__name__} cannot be written for AdapterHub; bottleneck adapters, LoRA, (IA)3 and ReFT can"
        )
    description = {
        "config": fields, "hidden_size": width, "model_class": type(model).__name__, "model_name": base_name(model) or "",
        "model_type": model_config(model).get("model_type"), "name": name, "version": VERSION,
    }  # fmt: skip
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in sorted(renamed.items())}
    content, text = save(plain, metadata={"format": "pt"}), json.dumps(description, indent=2, sort_keys=True)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / SAFETENSORS, lambda path: path.write_bytes(content))
    write_atomically(target / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _top(model: nn.Module) -> str:
    """Return the beginning of the paths of a model without its head: "bert.", "transformer.", ..."""
    prefix: Any = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""
