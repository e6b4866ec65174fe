"""Prefix tuning in AdapterHub's files, both ways. Positions are not counted on from the prefix there, unlike in PEFT.

What belongs to the whole model is in its files once for the model and once more for each layer.
"""

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
from .folder import Entry, other_than
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
    if wrong := other_than(told, FIXED):
        raise ValueError(f"a prefix of AdapterHub with {wrong} cannot be read by Inlay")
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


# ---------------------------------------------------------------------- writing


def fields_and_keys(
    config: PrefixTuningConfig,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    name: str,
    known: Mapping[str, Place],
    model: nn.Module,
    top: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return AdapterHub's fields of a prefix, and its tensors by the keys there: flat where its network is not given.

    Args:
        config: the configuration.
        tensors: by the keys of Inlay's files.
        state: the network that computes the prefix, empty where there is none.
        name: the adapter's name, which is part of the keys.
        known: every module of the bare model by its path.
        model: the bare model.
        top: path of the model without its head.

    Raises:
        ValueError: AdapterHub cannot say it.
    """
    if config.shift_positions or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            "AdapterHub's prefixes leave the positions as they are, and those of encoder-decoders sit on the encoder too: only "
            "one with shift_positions=False, on another model, can be written for it"
        )
    flat = not state
    fields = {
        "architecture": "prefix_tuning", "bottleneck_size": 512 if flat else config.encoder_hidden_size, "cross_prefix": True,
        "encoder_prefix": True, "flat": flat, "init_weights_seed": None, "prefix_length": config.num_virtual_tokens,
        "shared_gating": config.shared_gating, "use_gating": config.use_gating,
    } | FIXED  # fmt: skip
    own = (
        {"control_trans": tensors["prompt_embeddings"].reshape(-1)}
        if flat
        else {theirs: state[ours] for theirs, ours in NETWORK.items()}
    )
    paths = {id(place.module): path for path, place in known.items()}
    attentions = [f"{paths[id(module)]}.prefix_tuning." for module in self_attentions(model)]
    pools = [f"{top}prefix_tuning.", *(f"{at}pool." for at in attentions)]
    renamed = {f"{pool}prefix_tunings.{name}.{PREFIX}{key}": t for pool in pools for key, t in own.items()}
    for key, tensor in tensors.items():
        if key.startswith("prefix_gates."):
            _, number, part = key.split(".")
            renamed[f"{attentions[int(number)]}prefix_gates.{name}.{part}"] = tensor
    return fields, renamed
