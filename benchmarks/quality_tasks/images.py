"""Small photographs and a convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForImageClassification

from .task import SPLITS, Batch, Task


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """``npz`` files with image (N x height x width x 3, bytes) and label; a network that reads [-1, 1].

    Args:
        data: folder below ``data``.
        network: folder below ``models``.
        labels: number of classes.
        pixels: height and width to which the images are enlarged.
    """

    data: str
    network: str
    labels: int
    pixels: int

    def folders(self) -> tuple[str, ...]:
        return (f"data/{self.data}", f"models/{self.network}")

    def examples(self, shared: Path) -> dict[str, list[Any]]:
        found = {}
        for split in SPLITS:
            with np.load(shared / "data" / self.data / f"{split}.npz") as part:
                images = torch.from_numpy(part["image"]).permute(0, 3, 1, 2)
                found[split] = list(zip(images, part["label"].tolist(), strict=True))
        return found

    def model(self, shared: Path, pretrained: bool) -> nn.Module:
        folder = shared / "models" / self.network
        config = AutoConfig.from_pretrained(folder, num_labels=self.labels, classifier_dropout_prob=0.0)
        if pretrained:
            # The head for ImageNet is replaced by a new one.
            options = {"config": config, "ignore_mismatched_sizes": True}
            return cast(nn.Module, AutoModelForImageClassification.from_pretrained(folder, **options))
        return cast(nn.Module, AutoModelForImageClassification.from_config(config))

    def batch(self, examples: Sequence[Any]) -> Batch:
        images: Tensor = torch.stack([image for image, _ in examples]).float() / 127.5 - 1
        images = interpolate(images, size=(self.pixels, self.pixels), mode="bilinear")
        return {"pixel_values": images, "labels": torch.tensor([label for _, label in examples])}

    def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        right = [model(pixel_values=b["pixel_values"]).logits.argmax(-1) == b["labels"] for b in batches]
        return torch.cat(right).double().mean().item()
