"""Loss per token over a whole data set: sums and counts per row, so that the batch size does not matter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from inlay.arguments import IGNORED

if TYPE_CHECKING:
    import numpy as np
    import torch


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return [rows, 2]: the sum of the token losses of each row, and how many tokens have one.

    Args:
        logits: [rows, places, vocabulary]; more places than labels where virtual tokens stand in front.
        labels: [rows, places].
    """
    import torch
    from torch.nn.functional import cross_entropy

    logits = logits[:, -labels.shape[1] :].float()
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).to(losses.dtype)], 1)


def perplexity(sums: np.ndarray) -> dict[str, float]:
    """Return the mean loss per token and its exponential."""
    loss = float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1))
    return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
