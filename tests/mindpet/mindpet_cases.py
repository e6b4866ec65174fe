"""The cases of MindPet's layers in the goldens, and the layers of Inlay with the same numbers in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inlay import mindpet

CASES = {
    "lora_dense": ["basic2d", "r8a16_relu3d", "gelu4d_frac_alpha", "dropout_eval_identity", "default_init"],
    "adapter_layer": [
        "gelu2d",
        "silu4d",
        "leakyrelu",
        "prelu_trainable_slope",
        "softmax_over_bottleneck",
        "default_init",
        "fp16_compute",
    ],
    "adapter_dense": ["basic2d", "act_gelu_nl_tanh", "act_relu_nl_sigmoid4d", "default_init_b64", "fp16_compute"],
    "low_rank_adapter_layer": ["rf2_r1", "rf3_floor_r3_tanh", "rf1_r2_silu", "default_init", "fp16_compute"],
    "low_rank_adapter_dense": ["basic2d_rf2", "act_relu_r3", "act_gelu_default_rf1", "fp16_compute"],
    "prefix_layer": ["p4b2", "p6b3_drop", "p2b2_mid_default"],
    "prefix_encoder": ["noproj_b2", "noproj_b1_L1", "proj_b3_L3"],
}  # fmt: skip
DENSE = [(layer, case) for layer in list(CASES)[:5] for case in CASES[layer]]
CLASSES = {
    "lora_dense": "LoRADense",
    "adapter_layer": "AdapterLayer",
    "adapter_dense": "AdapterDense",
    "low_rank_adapter_layer": "LowRankAdapterLayer",
    "low_rank_adapter_dense": "LowRankAdapterDense",
    "prefix_layer": "PrefixLayer",
    "prefix_encoder": "PrefixEncoder",
}
INDICES = ("input_tokens", "mindpet_delta_ptuning2_prefix")


def inlay_name(name: str) -> str:
    """Return what a parameter of MindPet is called here."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight" if leaf in ("embedding_table", "w") else name


class Golden:
    """One case: its settings, and its arrays by name."""

    def __init__(self, shared: Path, layer: str, case: str) -> None:
        folder = shared / "goldens" / "mindpet"
        told = json.loads((folder / f"{layer}.json").read_text())["cases"]
        self.layer = layer
        self.settings: dict[str, Any] = next(c for c in told if c["name"] == case)
        stored = np.load(folder / f"{layer}.npz")
        self.arrays = {k.removeprefix(f"{case}."): stored[k] for k in stored if k.startswith(f"{case}.")}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays under a prefix by the names of Inlay, without tensors of indices."""
        names = [k.removeprefix(f"{prefix}.") for k in self.arrays if k.startswith(f"{prefix}.")]
        return {inlay_name(n): self[f"{prefix}.{n}"] for n in names if n not in INDICES}

    def build(self, **changes: Any) -> nn.Module:
        """Return the layer of the case with its weights, in evaluation mode."""
        hyper = {
            k: v
            for k, v in self.settings["hyper"].items()
            if self.layer != "prefix_encoder" or k != "batch_size"
        }
        layer: nn.Module = getattr(mindpet, CLASSES[self.layer])(**hyper | changes)
        layer.load_state_dict(self.group("w"))
        return layer.eval()
