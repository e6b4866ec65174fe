"""A small model with blocks, an embedding and a head, for tests of files and requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay import LoraConfig


class Net(nn.Module):
    def __init__(self, width: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(width, width), "v_proj": nn.Linear(width, width)})
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["v_proj"](torch.tanh(block["q_proj"](x)))  # type: ignore[index]
        y: torch.Tensor = self.head(x)
        return y


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["head"]} | settings)
    )
