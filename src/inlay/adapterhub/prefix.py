"""Prefix tuning in AdapterHub's files. Positions are not counted on from the prefix there, unlike in PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import AdapterFileError
from ..injection.walk import Place
from ..methods.prefix_tuning import PrefixTuningConfig
from ..prompts.attention import self_attentions
from .folder import Entry
from .paths import own_path

FIXED = {"leave_out": [], "non_linearity": "tanh", "dropout": 0.0}
"""Fields with the only value that Inlay reads."""
NETWORK = {
    "wte.weight": "embedding.weight",
    "control_trans.0.weight": "transform.0.weight",
    "control_trans.0.bias": "transform.0.bias",
    "control_trans.2.weight": "transform.2.weight",
    "control_trans.2.bias": "transform.2.bias",
}
PREFIX = "self_prefix."


def convert(
    told: Mapping[str, Any], entries: Sequence[Entry], known: Mapping[str, Place], model: nn.Module
) -> tuple[PrefixTuningConfig, dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the configuration, the prefix and its gates by their keys in files, and what is computed by a network with them.

    Raises:
        ValueError: a field has a value that Inlay does not know, or there are prefixes beside the one of self-attention.
        AdapterFileError: the model has no place for a gate.
    """
    if wrong := {name: told[name] for name, only in FIXED.items() if told.get(name, only) != only}:
        raise ValueError(f"a prefix of AdapterHub with {wrong} cannot be read by Inlay")
    # Each layer repeats the tensors of the whole model's pool.
    found = {entry.rest: entry.tensor for entry in entries if entry.holder == "prefix_tunings"}
    gates = _gates([entry for entry in entries if entry.holder == "prefix_gates"], known, model)
    if beyond := sorted({name.partition(".")[0] for name in found} - {PREFIX.rstrip(".")}):
        raise ValueError(
            f"a prefix of AdapterHub with {beyond} cannot be read by Inlay: it has self-attention's only"
        )
    own = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    length = int(told["prefix_length"])
    if told.get("flat"):
        prompt = own["control_trans"].reshape(length, -1)
        return _config(told, None), _keyed(prompt, gates), None
    network = {ours: own[theirs] for theirs, ours in NETWORK.items()}
    hidden = torch.tanh(
        linear(network["embedding.weight"], network["transform.0.weight"], network["transform.0.bias"])
    )
    prompt = linear(hidden, network["transform.2.weight"], network["transform.2.bias"])
    return (
        _config(told, int(told["bottleneck_size"])),
        _keyed(prompt, gates),
        network | {f"gates.{key}": gate for key, gate in gates.items()},
    )


def _config(told: Mapping[str, Any], hidden: int | None) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        num_virtual_tokens=int(told["prefix_length"]),
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
        shift_positions=False,
        use_gating=bool(told.get("use_gating")),
        shared_gating=bool(told.get("shared_gating", True)),
    )


def _keyed(prompt: Tensor, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"prompt_embeddings": prompt} | {f"prefix_gates.{key}": gate for key, gate in gates.items()}


def _gates(entries: Sequence[Entry], known: Mapping[str, Place], model: nn.Module) -> dict[str, Tensor]:
    """Return the gates by the number of their layer and their part, "0.weight"."""
    numbers = {id(module): i for i, module in enumerate(self_attentions(model))} if entries else {}
    gates = {}
    for entry in entries:
        path = own_path(entry.at.removesuffix(".prefix_tuning"), known)
        number = numbers.get(id(known[path].module))
        if number is None:
            raise AdapterFileError(f"{path} of the model is no self-attention that could have a gate")
        gates[f"{number}.{entry.rest}"] = entry.tensor
    return gates
