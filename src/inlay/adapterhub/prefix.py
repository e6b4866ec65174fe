"""Prefix tuning in AdapterHub's files. Positions are not counted on from the prefix there, unlike in PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..methods.prefix_tuning import PrefixTuningConfig
from .folder import Entry

FIXED = {"use_gating": False, "leave_out": [], "non_linearity": "tanh", "dropout": 0.0}
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
    told: Mapping[str, Any], entries: Sequence[Entry]
) -> tuple[PrefixTuningConfig, dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the configuration, the prefix by its key in PEFT's files, and the network that computes it.

    Raises:
        ValueError: a field has a value that Inlay does not know, or there are prefixes beside the one of self-attention.
    """
    if wrong := {name: told[name] for name, only in FIXED.items() if told.get(name, only) != only}:
        raise ValueError(f"a prefix of AdapterHub with {wrong} cannot be read by Inlay")
    # Each layer repeats the tensors of the whole model's pool.
    found = {entry.rest: entry.tensor for entry in entries}
    if beyond := sorted({name.partition(".")[0] for name in found} - {PREFIX.rstrip(".")}):
        raise ValueError(
            f"a prefix of AdapterHub with {beyond} cannot be read by Inlay: it has self-attention's only"
        )
    own = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    length = int(told["prefix_length"])
    if told.get("flat"):
        prompt = own["control_trans"].reshape(length, -1)
        return _config(length, None), {"prompt_embeddings": prompt}, None
    network = {ours: own[theirs] for theirs, ours in NETWORK.items()}
    hidden = torch.tanh(
        linear(network["embedding.weight"], network["transform.0.weight"], network["transform.0.bias"])
    )
    prompt = linear(hidden, network["transform.2.weight"], network["transform.2.bias"])
    return _config(length, int(told["bottleneck_size"])), {"prompt_embeddings": prompt}, network


def _config(length: int, hidden: int | None) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        num_virtual_tokens=length,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
        shift_positions=False,
    )
