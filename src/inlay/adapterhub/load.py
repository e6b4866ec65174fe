"""A folder of AdapterHub's as adapters of Inlay on a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import AdapterFileError
from ..walk import Place, places
from . import bottleneck, low_rank
from .folder import Entry, Folder

NOT_READ = {
    "refts": "ReFT",
    "prompt_tunings": "AdapterHub's prompt tuning",
    "invertible_adapters": "an invertible adapter",
    "prefix_gates": "a gated prefix",
}
HOLDERS = {
    "bottleneck": ("adapters", "shared_parameters"),
    "lora": ("loras",),
    "prefix_tuning": ("prefix_tunings",),
}


def parts_of(folder: Folder, model: nn.Module) -> dict[str, tuple[PeftConfig, dict[str, Tensor]]]:
    """Return the configuration and the tensors, by the keys of Inlay's files, of each part of a folder.

    Raises:
        ValueError: the folder holds what Inlay does not have.
        AdapterFileError: it is not an adapter of this model.
    """
    known = places(model)
    entries = list(folder.entries())
    for entry in entries:
        if entry.holder in NOT_READ:
            raise ValueError(f"{folder.origin} holds {NOT_READ[entry.holder]}, which Inlay does not have")
    parts: dict[str, tuple[PeftConfig, dict[str, Tensor]]] = {}
    for told in folder.configs:
        kind = str(told.get("architecture") or "bottleneck")
        if kind not in HOLDERS or kind in parts:
            raise ValueError(
                f"{folder.origin} holds {'a second' if kind in parts else 'the method'} {kind!r}; Inlay reads one each of "
                f"{', '.join(HOLDERS)}"
            )
        own = [entry for entry in entries if entry.holder in HOLDERS[kind]]
        if not own:
            raise AdapterFileError(f"{folder.origin} has no tensors of its {kind!r}")
        parts[kind] = _converted(kind, told, own, known)
    return parts


def _converted(
    kind: str, told: dict[str, Any], entries: list[Entry], known: dict[str, Place]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    if kind == "lora":
        return low_rank.convert(told, entries, known)
    config = bottleneck.config_of(told)
    return config, bottleneck.tensors_of(entries, config, known)
