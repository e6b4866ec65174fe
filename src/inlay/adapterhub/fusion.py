"""A fusion of bottleneck adapters in AdapterHub's files, both ways. Its members are in folders of their own.

Keys have a bias there, which adds the same to the scores of all members, so that no softmax sees it: it is left out when a file
is read, and is zero in one that is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..injection.walk import Place
from ..methods.bottleneck.sublayers import find_sublayers
from ..methods.fusion import FusionConfig
from .folder import Entry, other_than
from .paths import exit_of, holder_of

FIXED = {"query_before_ln": False, "residual_before": False, "temperature": False}
"""Fields with the only value that Inlay reads."""
PARTS = ("query", "key", "value")
REGULARIZATION = 0.01
"""The weight of AdapterHub's penalty, where it is on."""


def convert(
    description: Mapping[str, Any], entries: Sequence[Entry], known: Mapping[str, Place]
) -> tuple[FusionConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors by the keys of Inlay's files, of all layers on which members may sit.

    Raises:
        ValueError: a field has a value that Inlay does not know.
        AdapterFileError: a tensor is not known, or the model has no place for it.
    """
    told = description["config"]
    wrong = other_than(told, FIXED)
    if told.get("dropout_prob"):
        wrong["dropout_prob"] = told["dropout_prob"]
    if wrong:
        raise ValueError(f"a fusion of AdapterHub with {wrong} cannot be read by Inlay")
    found = find_sublayers(known)
    by_path: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        by_path.setdefault(exit_of(entry.at, found), {})[entry.rest] = entry.tensor
    tensors: dict[str, Tensor] = {}
    for path, parts in by_path.items():
        for name, tensor in _ours(parts, told).items():
            tensors[f"base_model.model.{path}.fusion_{name}"] = tensor
    config = FusionConfig(
        members=members_of(description), regularization=REGULARIZATION if told.get("regularization") else 0.0
    )
    return config, tensors


def members_of(description: Mapping[str, Any]) -> list[str]:
    """Return the names of a fusion's members; early files have them in the fusion's name only."""
    return list(description.get("adapter_names") or str(description["name"]).split(","))


def where_members_sit(
    origin: str, tensors: Mapping[str, Tensor], configs: Mapping[str, Any], paths: Mapping[str, set[str]]
) -> dict[str, Tensor]:
    """Leave out what a fusion of AdapterHub's holds of layers on which no member sits.

    Args:
        origin: where it was found, for messages.
        tensors: by the keys of Inlay's files.
        configs: the configuration of each member.
        paths: the modules on which each member sits.

    Raises:
        ValueError: AdapterHub's fusion does with these members what Inlay's does not.
    """
    if parallel := [member for member, config in configs.items() if getattr(config, "parallel", False)]:
        raise ValueError(
            f"the fusion at {origin} has the parallel adapters {parallel} as members: AdapterHub's fusion adds the residual a "
            "second time then, Inlay's does not"
        )
    path_of = {key: key.removeprefix("base_model.model.").partition(".fusion_")[0] for key in tensors}
    sitting = Counter(path for own in paths.values() for path in own)
    if alone := [path for path in path_of.values() if sitting[path] == 1]:
        raise ValueError(
            f"{origin} multiplies what a single one of its members {list(configs)} does at {alone[0]}, where the others do not "
            "sit; Inlay's fusion leaves it as it is"
        )
    return {key: tensor for key, tensor in tensors.items() if sitting[path_of[key]]}


def _ours(parts: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a layer's tensors by Inlay's names. What the fusion goes without is the identity."""
    ours = {name: tensor for name, tensor in parts.items() if name != "key.bias"}
    if unknown := sorted(ours.keys() - {"query.bias", *(f"{part}.weight" for part in PARTS)}):
        raise AdapterFileError(f"{unknown} are no tensors of a fusion")
    like = next(iter(parts.values()))
    for part in PARTS:
        if not told.get(part, True):
            ours[f"{part}.weight"] = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    if not told.get("query", True):
        ours["query.bias"] = like.new_zeros(like.shape[-1])
    return ours


# ---------------------------------------------------------------------- writing


def fields_for(config: FusionConfig) -> dict[str, Any]:
    """Return AdapterHub's fields of a configuration.

    Raises:
        ValueError: AdapterHub cannot say it.
    """
    if config.temperature != 1.0:
        raise ValueError(
            f"AdapterHub's fusion cannot have temperature={config.temperature} and keep it; multiply the weight and the bias of "
            "fusion_query by its inverse, and set it to 1.0"
        )
    if config.regularization not in (0.0, REGULARIZATION):
        raise ValueError(
            f"AdapterHub's fusion has regularization {REGULARIZATION} or none, not {config.regularization}"
        )
    return FIXED | {
        "dropout_prob": None, "key": True, "query": True, "regularization": bool(config.regularization), "value": True,
        "value_before_softmax": True, "value_initialized": True,
    }  # fmt: skip


def keys_for(tensors: Mapping[str, Tensor], name: str, known: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the tensors by AdapterHub's keys.

    Args:
        tensors: by the keys of Inlay's files.
        name: the fusion's name, which is part of the keys.
        known: every module of the bare model by its path.

    Raises:
        ValueError: the fusion sits on a layer on which AdapterHub has none.
    """
    found = {f.exit.path: f for f in find_sublayers(known)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, _, rest = key.removeprefix("base_model.model.").partition(".fusion_")
        if path not in found:
            raise ValueError(f"AdapterHub fuses bottleneck adapters only, and {path} holds none")
        at = f"{holder_of(found[path])}.adapter_fusion_layer.{name}"
        renamed[f"{at}.{rest}"] = tensor
        if rest == "key.weight":
            renamed[f"{at}.key.bias"] = tensor.new_zeros(len(tensor))
    return renamed
