"""``inlay convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from inlay import PeftConfig, load_peft_weights
from inlay.adapterhub import parts_of, write_adapterhub
from inlay.adapterhub.folder import describe, read_folder
from inlay.files.folder import write_state, write_tensors

from .errors import UserError, told_as
from .files import check_new, new_folder
from .models import load_config, model_place
from .options import Convert
from .trained import base_of


def run(options: Convert) -> None:
    """Write the adapter in the other format.

    Raises:
        UserError: the adapter does not fit its base, or the other format has no word for it.
    """
    target, adapter = check_new(options.output_dir, overwrite=options.overwrite), Path(options.adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is not an adapter folder: it has no adapter_config.json")
    description = describe(adapter)
    with told_as(f"cannot convert {adapter}"), new_folder(target) as folder:
        if description is None:
            base = base_of(adapter, options.model)
            config = PeftConfig.from_pretrained(adapter)
            revision = config.revision if options.model is None else None
            trained_on = (config.auto_mapping or {}).get("base_model_class")
            model = structure_of(base, revision, trained_on)
            write_adapterhub(folder, model, config, load_peft_weights(adapter), options.name)
            written = ["."]
        else:
            written = _from_adapterhub(adapter, description, options.model, folder)
    print("\n".join(str(target if name == "." else target / name) for name in written))


def _from_adapterhub(
    adapter: Path, description: dict[str, Any], model: str | None, target: Path
) -> list[str]:
    """Write each part of an AdapterHub folder; return their folders: the target itself, or one for each part of a union."""
    recorded = model or description.get("model_name")
    if not recorded:
        raise UserError(f"{adapter} does not record its base model: give --model")
    base = model_place(recorded)
    found, wanted = load_config(base, None).model_type, description.get("model_type")
    if wanted and found != wanted:
        raise UserError(f"{adapter} is for a model of type {wanted!r}, and {base} is of type {found!r}")
    parts = parts_of(read_folder(adapter, description), structure_of(base, None, description["model_class"]))
    names = {kind: "." if len(parts) == 1 else kind for kind in parts}
    for kind, part in parts.items():
        folder = target / names[kind]
        folder.mkdir(exist_ok=True)
        part.config.base_model_name_or_path = base
        part.config.save_pretrained(folder)
        write_tensors(folder, part.tensors)
        write_state(folder, part.state or {})
    return list(names.values())


def structure_of(place: str, revision: str | None, class_name: str | None = None) -> nn.Module:
    """Return a model without weights, in the class of that name or in the one that its configuration names."""
    config = load_config(place, revision)
    named = class_name or next(iter(config.architectures or ()), "")
    cls = getattr(transformers, named, None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return model
