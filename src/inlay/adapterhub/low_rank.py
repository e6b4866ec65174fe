"""LoRA and (IA)3 in AdapterHub's files: there one class, told apart by ``composition_mode``; both ways.

A LoRA with a gate depends on what a layer reads, so that it is no update of a weight: here it is a parallel bottleneck adapter
without a non-linearity, its biases zero. The gate stands in place of alpha / r there.

GPT-2's fused projection of queries, keys and values has a small LoRA for each of the three there. Here it is one of their
ranks' sum, whose B has a block for each and zeros between: the same update. Trained further, the zeros may grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..errors import AdapterFileError
from ..injection.walk import Place
from ..kinds import kind_of
from ..methods.bottleneck.config import BottleneckConfig
from ..methods.ia3 import IA3Config
from ..methods.lora import LoraConfig
from .folder import Entry, other_than
from .paths import own_path

FIXED = {"use_dora": False, "vera_d": None, "vera_b": None, "dtype": None}
"""Fields with the only value that Inlay reads: AdapterHub's DoRA scales the bias too, and its VeRA trains whole matrices."""
FUSED = ("q", "k", "v")
"""The order of the matrices in a fused projection."""
PLACES = {
    "q": ("query", "q_proj", "q", "query_proj"),
    "k": ("key", "k_proj", "k", "key_proj"),
    "v": ("value", "v_proj", "v", "value_proj"),
    "intermediate_lora": ("intermediate.dense", "fc1", "c_fc", "wi", "lin1"),
    "output_lora": ("output.dense", "fc2", "mlp.c_proj", "wo", "lin2"),
}
"""Where AdapterHub puts a LoRA, by the endings of modules' paths."""
WITHOUT_EFFECT = {
    "target_modules", "exclude_modules", "init_weights", "modules_to_save", "hidden_size", "reduction_factor",
}  # fmt: skip
"""Fields that say nothing about what a trained LoRA with a gate computes where it sits."""


def convert(
    told: Mapping[str, Any], entries: Sequence[Entry], known: Mapping[str, Place]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors by the keys of Inlay's files.

    Raises:
        ValueError: a field has a value that Inlay does not know.
        AdapterFileError: the model has no place for a tensor.
    """
    if wrong := other_than(told, FIXED):
        raise ValueError(f"a LoRA of AdapterHub with {wrong} cannot be read by Inlay")
    by_path: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        by_path.setdefault(own_path(entry.at, known), {})[entry.rest] = entry.tensor
    scale = told.get("composition_mode", "add") == "scale"
    if told.get("use_gating"):
        if scale or told.get("dropout"):
            raise ValueError(
                f"{'an (IA)3' if scale else 'a LoRA with dropout'} of AdapterHub with use_gating cannot be read by Inlay"
            )
        return _gated(told, by_path, known)
    if scale:
        return _ia3(told, by_path, known)
    return _lora(told, by_path, known)


def _lora(
    told: Mapping[str, Any], by_path: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    r, alpha = told["r"], told["alpha"]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, parts in by_path.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if len(a) != r or len(b) != _rows(path, known):
            matrices = _fused_matrices(told, path, len(a) // r)
            b = _block_columns(b, matrices, _rows(path, known))
            ranks[path] = len(a)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=told.get("dropout", 0.0),
        target_modules=list(by_path),
        rank_pattern=ranks,
        alpha_pattern={path: alpha * rank // r for path, rank in ranks.items()},
    )
    return config, tensors


def _gated(
    told: Mapping[str, Any], by_path: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for path, parts in by_path.items():
        a, b = parts["lora_A"], parts["lora_B"]
        if len(a) != told["r"] or len(b) != _rows(path, known):
            raise ValueError(
                f"a LoRA with gates on the fused projection {path} cannot be read by Inlay: it has one for each of its matrices"
            )
        own = {
            "down.weight": a, "down.bias": a.new_zeros(len(a)), "up.weight": b, "up.bias": b.new_zeros(len(b)),
            "gate.weight": parts["gate.weight"], "gate.bias": parts["gate.bias"],
        }  # fmt: skip
        tensors |= {f"base_model.model.{path}.adapter_{name}": tensor for name, tensor in own.items()}
    config = BottleneckConfig.preset("gated_lora", bottleneck_size=told["r"], target_modules=list(by_path))
    return config, tensors


def _ia3(
    told: Mapping[str, Any], by_path: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    tensors = {}
    for path, parts in by_path.items():
        gain, rows = parts["lora_B"] * told.get("alpha", 1), _rows(path, known)
        if len(gain) != rows:
            matrices = _fused_matrices(told, path, len(told["attn_matrices"]))
            whole = torch.ones(len(FUSED), rows // len(FUSED), 1, dtype=gain.dtype)
            whole[matrices] = gain.view(len(matrices), -1, 1)
            gain = whole.view(rows, 1)
        tensors[f"base_model.model.{path}.ia3_l"] = gain
    return IA3Config(target_modules=list(by_path), feedforward_modules=[]), tensors


def _rows(path: str, known: Mapping[str, Place]) -> int:
    kind = kind_of(known[path].module)
    if kind is None:
        raise AdapterFileError(
            f"{path} ({type(known[path].module).__name__}) is no layer that LoRA could adapt"
        )
    return kind.out_features


def _fused_matrices(told: Mapping[str, Any], path: str, count: int) -> list[int]:
    matrices = [i for i, name in enumerate(FUSED) if name in told["attn_matrices"]]
    if len(matrices) != count:
        raise AdapterFileError(
            f"{path} holds {count} matrices, but attn_matrices={told['attn_matrices']} names {len(matrices)}"
        )
    return matrices


def _block_columns(b: Tensor, matrices: Sequence[int], rows: int) -> Tensor:
    """Return B[rows, matrices * r] with a block for each matrix and zeros elsewhere, of blocks that lie one below another."""
    r, height = b.shape[1], rows // len(FUSED)
    whole = b.new_zeros(rows, len(matrices) * r)
    for i, matrix in enumerate(matrices):
        block = b[i * height : (i + 1) * height]
        whole[matrix * height : (matrix + 1) * height, i * r : (i + 1) * r] = block
    return whole


# ---------------------------------------------------------------------- writing


def fields_and_keys(
    config: Any, tensors: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return AdapterHub's fields of a LoRA or an (IA)3, and its tensors by the keys there.

    Raises:
        ValueError: AdapterHub cannot say it.
    """
    scale, gated = isinstance(config, IA3Config), is_gated(config)
    if gated:
        tensors = _without_biases(tensors)
    else:
        _check_sayable(config, scale)
    r = 1 if scale else config.bottleneck_size if gated else config.r
    where = {path: _place(path) for path in {_path_and_part(key)[0] for key in tensors}}
    matrices = [name for name in FUSED if name in where.values()]
    fields = {
        "architecture": "lora", "selfattn_lora": bool(matrices), "intermediate_lora": "intermediate_lora" in where.values(),
        "output_lora": "output_lora" in where.values(), "leave_out": [], "r": r,
        "alpha": config.lora_alpha if isinstance(config, LoraConfig) else r, "dropout": getattr(config, "lora_dropout", 0.0),
        "attn_matrices": matrices, "composition_mode": "scale" if scale else "add", "init_weights": "ia3" if scale else "lora",
        "init_weights_seed": None, "use_gating": gated,
    } | FIXED  # fmt: skip
    renamed = {}
    for key, tensor in tensors.items():
        path, part = _path_and_part(key)
        renamed[f"{path}.loras.{name}.{part}"] = tensor
    return fields, renamed


def is_gated(config: Any) -> bool:
    """Whether a configuration is that of a LoRA with a gate, which ``convert`` makes a bottleneck adapter."""
    if not isinstance(config, BottleneckConfig) or not config.target_modules:
        return False
    size, targets = config.bottleneck_size, list(config.target_modules)
    plain = BottleneckConfig.preset("gated_lora", bottleneck_size=size, target_modules=targets)
    free = {f.name for f in dataclasses.fields(PeftConfig)} | WITHOUT_EFFECT
    names = [f.name for f in dataclasses.fields(config) if f.name not in free]
    return isinstance(size, int) and all(getattr(config, name) == getattr(plain, name) for name in names)


def _without_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    biases = (".adapter_down.bias", ".adapter_up.bias")
    if grown := [key for key, tensor in tensors.items() if key.endswith(biases) and tensor.any()]:
        raise ValueError(
            f"AdapterHub's LoRA has no bias, and {grown[0]} is not zero; it cannot be written for it"
        )
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(biases)}


def _path_and_part(key: str) -> tuple[str, str]:
    """Return the module that a key of Inlay's files is of, and what AdapterHub calls the tensor."""
    path, _, part = key.removeprefix("base_model.model.").rpartition(".")
    if part == "ia3_l":
        return path, "lora_B"
    path, _, column = path.rpartition(".")
    known = {"adapter_down": "lora_A", "adapter_up": "lora_B", "adapter_gate": f"gate.{part}"}
    return path, known.get(column, column)


def _check_sayable(config: Any, scale: bool) -> None:
    if scale:
        if config.feedforward_modules:
            raise ValueError(
                "AdapterHub's (IA)3 multiplies outputs, this one multiplies the inputs of "
                f"{sorted(config.feedforward_modules)}; it cannot be written for AdapterHub"
            )
        return
    beyond = [
        f
        for f in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
        if getattr(config, f)
    ]
    if config.bias != "none":
        beyond.append("bias")
    if beyond:
        raise ValueError(
            f"AdapterHub has no word for {', '.join(beyond)}; such a LoRA cannot be written for it"
        )


def _place(path: str) -> str:
    for place, endings in PLACES.items():
        if any(path == ending or path.endswith(f".{ending}") for ending in endings):
            if place == "output_lora" and path.endswith("attention.output.dense"):
                break
            return place
    raise ValueError(
        f"AdapterHub has no LoRA on {path}: there it adapts queries, keys, values and the two layers of the feed-forward block"
    )
