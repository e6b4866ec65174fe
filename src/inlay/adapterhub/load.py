"""A folder of AdapterHub's as adapters of Inlay on a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import AdapterFileError
from ..injection.walk import Place, places
from . import bottleneck, fusion, low_rank, prefix, reft
from .folder import Entry, Folder, is_fusion_there

NOT_READ = {
    "prompt_tunings": "AdapterHub's prompt tuning",
}
HOLDERS_OF = {
    "bottleneck": ("adapters", "shared_parameters", "invertible_adapters"),
    "lora": ("loras",),
    "prefix_tuning": ("prefix_tunings", "prefix_gates"),
    "reft": ("refts",),
}
FUSION = "fusion"


@dataclass(frozen=True)
class Part:
    """One method of a folder: its configuration, its tensors by the keys of Inlay's files, and what it needs to be trained."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    state: dict[str, Tensor] | None = None


def parts_of(folder: Folder, model: nn.Module) -> dict[str, Part]:
    """Return the parts of a folder by what they are: "bottleneck", "lora", "prefix_tuning", "reft"; or its one "fusion".

    Raises:
        ValueError: the folder holds what Inlay does not have.
        AdapterFileError: it is not an adapter of this model.
    """
    known = places(model)
    entries = list(folder.entries())
    if is_fusion_there(folder.description):
        return {FUSION: Part(*fusion.convert(folder.description, entries, known))}
    for entry in entries:
        if entry.holder in NOT_READ:
            raise ValueError(f"{folder.origin} holds {NOT_READ[entry.holder]}, which Inlay does not have")
    parts: dict[str, Part] = {}
    for told in folder.configs:
        kind = str(told.get("architecture") or "bottleneck")
        if kind not in HOLDERS_OF or kind in parts:
            raise ValueError(
                f"{folder.origin} holds {'a second' if kind in parts else 'the method'} {kind!r}; Inlay reads one each of "
                f"{', '.join(HOLDERS_OF)}"
            )
        own = [entry for entry in entries if entry.holder in HOLDERS_OF[kind]]
        if not own:
            raise AdapterFileError(f"{folder.origin} has no tensors of its {kind!r}")
        parts[kind] = _converted(kind, told, own, known, model)
    return parts


def _converted(
    kind: str, told: dict[str, Any], entries: list[Entry], known: dict[str, Place], model: nn.Module
) -> Part:
    if kind == "lora":
        return Part(*low_rank.convert(told, entries, known))
    if kind == "prefix_tuning":
        return Part(*prefix.convert(told, entries, known, model))
    if kind == "reft":
        return Part(*reft.convert(told, entries, known))
    config = bottleneck.config_of(told)
    return Part(
        config,
        bottleneck.tensors_of(entries, config, known, bottleneck.behind_embeddings(config, model, known)),
    )
