"""``inlay convert``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from inlay import PeftConfig, PeftModel, TaskType, load_peft_weights
from inlay.adapterhub import Part, parts_of, write_adapterhub, write_union
from inlay.adapterhub.folder import describe, read_folder
from inlay.adapterhub.fusion import where_members_sit
from inlay.adapterhub.load import FUSION
from inlay.adapterhub.setup import SETUP_NAME, read_setup, write_setup
from inlay.auto import AUTO_CLASS_OF
from inlay.composition import names_in
from inlay.composition.choice import is_fusion
from inlay.files.folder import read_state, write_state, write_tensors

from .errors import UserError, told_as
from .files import check_new, new_folder
from .models import load_config, model_place
from .options import Convert
from .trained import base_of

UNION = ("prefix_tuning", "bottleneck", "lora")
"""The parts of an adapter that is several in one, in the order that AdapterHub gives them."""


def run(options: Convert) -> None:
    """Write the adapter, or the adapters of a setup, in the other format.

    Raises:
        UserError: an adapter does not fit its base, or the other format has no word for it.
    """
    target, source = check_new(options.output_dir, overwrite=options.overwrite), Path(options.adapter)
    with told_as(f"cannot convert {source}"), new_folder(target) as folder:
        if (source / SETUP_NAME).is_file():
            written = _setup(source, options, folder)
        else:
            written = _converted(source, options.model, options.name, folder)
    print("\n".join(str(target if name == "." else target / name) for name in written))


def _setup(source: Path, options: Convert, target: Path) -> list[str]:
    """Write each adapter of a setup by its own name, and the composition; return their folders."""
    if options.name is not None:
        raise UserError(f"{source} holds several adapters, which keep their names; leave out --name")
    tree = read_setup(source)
    assert tree is not None
    names = list(dict.fromkeys(names_in(tree)))
    for name in names:
        (target / name).mkdir()
        if _converted(source / name, options.model, name, target / name) != ["."]:
            raise UserError(
                f"{source / name} is several adapters in one; convert it alone, and name its parts in a Stack"
            )
    write_setup(target, tree)
    return names


def _converted(adapter: Path, model: str | None, name: str | None, target: Path) -> list[str]:
    """Write one adapter or fusion; return the folders in the target."""
    description = describe(adapter)
    if description is not None:
        return _from_adapterhub(adapter, description, model, target)
    if (adapter / "adapter_config.json").is_file():
        part = _part(adapter)
        config: Any = part.config
        usual = ",".join(config.members) if is_fusion(config) else "default"
        write_adapterhub(
            target, _structure_for(adapter, config, model), config, part.tensors, name or usual, part.state
        )
        return ["."]
    folders = [adapter / kind for kind in UNION if (adapter / kind / "adapter_config.json").is_file()]
    if not folders:
        raise UserError(f"{adapter} is not an adapter folder: it has no adapter_config.json")
    parts = [_part(folder) for folder in folders]
    write_union(target, _structure_for(folders[0], parts[0].config, model), parts, name or "default")
    return ["."]


def _part(adapter: Path) -> Part:
    return Part(PeftConfig.from_pretrained(adapter), load_peft_weights(adapter), read_state(adapter))


def _structure_for(adapter: Path, config: PeftConfig, model: str | None) -> nn.Module:
    """Return an adapter's base model without weights, in the class that it was trained in."""
    trained_on = (config.auto_mapping or {}).get("base_model_class")
    place, revision = base_of(adapter, model), config.revision if model is None else None
    if trained_on is None and config.task_type is not None:
        trained_on = _class_for_task(load_config(place, revision), config.task_type)
    return structure_of(place, revision, trained_on)


def _class_for_task(config: Any, task: str) -> str | None:
    """Return the name of a model's class with the head of a task, which is what an adapter for this task was trained in."""
    auto = AUTO_CLASS_OF.get(PeftModel.for_task[TaskType(task)])
    known = getattr(getattr(transformers, auto or "", None), "_model_mapping", {})
    return known[type(config)].__name__ if type(config) in known else None


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
    structure = structure_of(base, None, description["model_class"])
    parts = parts_of(read_folder(adapter, description), structure)
    if FUSION in parts:
        parts[FUSION] = _on_its_members(adapter, parts[FUSION], structure)
    names = {kind: "." if len(parts) == 1 else kind for kind in parts}
    for kind, part in parts.items():
        folder = target / names[kind]
        folder.mkdir(exist_ok=True)
        part.config.base_model_name_or_path = base
        part.config.save_pretrained(folder)
        write_tensors(folder, part.tensors)
        write_state(folder, part.state or {})
    return list(names.values())


def _on_its_members(fusion: Path, part: Part, structure: nn.Module) -> Part:
    """Leave out what a fusion holds of layers without members, if they are beside it, in folders of their names."""
    members: list[str] = part.config.members  # type: ignore[attr-defined]
    found = {member: fusion.resolve().parent / member for member in members}
    described = {member: told for member, folder in found.items() if (told := describe(folder)) is not None}
    if described.keys() != found.keys():
        return part
    own = {
        member: parts_of(read_folder(found[member], told), structure) for member, told in described.items()
    }
    if any(parts.keys() != {"bottleneck"} for parts in own.values()):
        raise UserError(
            f"{fusion} has members {members} that are no bottleneck adapters; Inlay cannot read such a fusion"
        )
    configs = {member: parts["bottleneck"].config for member, parts in own.items()}
    paths = {
        member: {
            key.removeprefix("base_model.model.").partition(".adapter_")[0]
            for key in parts["bottleneck"].tensors
        }
        for member, parts in own.items()
    }
    return replace(part, tensors=where_members_sit(str(fusion), part.tensors, configs, paths))


def structure_of(place: str, revision: str | None, class_name: str | None = None) -> nn.Module:
    """Return a model without weights, in the class of that name or in the one that its configuration names."""
    config = load_config(place, revision)
    named = class_name or next(iter(config.architectures or ()), "")
    cls = getattr(transformers, named, None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return model
