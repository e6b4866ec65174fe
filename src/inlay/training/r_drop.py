"""R-Drop (Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv 2106.14448).

Each sample goes through the model twice, under two dropout masks, and the two predictions P1 and P2 are drawn together:

    loss = mean over samples of  (CE1 + CE2) / 2  +  alpha / 4 * (KL(P1 || P2) + KL(P2 || P1))

This is half of the paper's objective, as in bert4keras: at alpha = 0 it is the plain cross entropy, so a learning rate keeps its
meaning. (The example in the authors' README weighs the divergence twice as much.) Rows are interleaved: ``logits[0::2]`` is the
first and ``logits[1::2]`` the second pass of the same samples; ``rdrop_repeat`` doubles a batch that way.

The authors' code: https://github.com/dropreg/R-Drop
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rdrop_repeat(*items: Tensor) -> tuple[Tensor, ...]:
    """Return each tensor with every row twice in a row: [a, b] becomes [a, a, b, b].

    Raises:
        TypeError: an item is no tensor.
        ValueError: an item has no rows, being 0-d.
    """
    for item in items:
        if not isinstance(item, Tensor):
            raise TypeError(f"rdrop_repeat takes tensors, not {type(item).__name__}")
        if not item.dim():
            raise ValueError("rdrop_repeat takes tensors with rows; one is 0-d")
    return tuple(item.repeat_interleave(2, dim=0) for item in items)


class RDropLoss(nn.Module):
    """The loss of R-Drop on the logits of a doubled batch.

    Half precision is computed in float32.

    Args:
        alpha: weight of the divergence; the paper's are below 1 for images, 5 for translation.
        compatibility: "mindpet" for the numbers of the MindPet toolkit: the divergence is summed over rows instead of averaged,
            so its weight grows with the batch; its targets have no gradient; and rows that the cross entropy ignores count in
            it. It takes logits[2B, C] with integer labels only.
        ignore_index: the integer label of positions that have no loss, in neither part.
        reduction: "mean" over the positions with a loss, or "sum", for whoever divides by their number over several batches.

    Raises:
        TypeError: ``alpha`` is not a number.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        alpha: float = 4.0,
        compatibility: Literal["mindpet"] | None = None,
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha must be a number, not {type(alpha).__name__}")
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be 0 or more and finite, not {alpha}")
        if compatibility not in (None, "mindpet"):
            raise ValueError(f"compatibility must be None or 'mindpet', not {compatibility!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
        if compatibility and reduction == "sum":
            raise ValueError("compatibility='mindpet' fixes the reduction: leave it at 'mean'")
        self.alpha, self.compatibility = alpha, compatibility
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, 0-d, in float32 (float64 for logits of float64); 0 where no position has a loss.

        Args:
            logits: [2B, C], or [2B, T, C] for tokens; rows 2i and 2i + 1 are the passes of sample i.
            labels: doubled as the logits are: classes [2B] or [2B, T], or probabilities of the logits' shape.

        Raises:
            ValueError: the shapes do not fit, or rows 2i and 2i + 1 have different labels.
        """
        self._check(logits, labels)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.compatibility == "mindpet":
            return self._as_mindpet(exact, labels)
        log_p = exact.log_softmax(-1)
        first, second = log_p[0::2], log_p[1::2]
        if labels.is_floating_point():
            here, ce = None, -(labels.to(log_p.dtype) * log_p).sum(-1)
        else:
            here = labels[0::2] != self.ignore_index
            target = labels.long().masked_fill(labels == self.ignore_index, 0)
            ce = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        # Both divergences in one product: sum p1 (l1 - l2) + sum p2 (l2 - l1).
        divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1)
        losses = (ce[0::2] + ce[1::2]) / 2 + self.alpha / 4 * divergence
        if here is None:
            return losses.mean() if self.reduction == "mean" else losses.sum()
        total = losses.where(here, 0.0).sum()
        return total / here.sum().clamp(min=1) if self.reduction == "mean" else total

    def _as_mindpet(self, logits: Tensor, labels: Tensor) -> Tensor:
        first, second = logits[0::2].log_softmax(-1), logits[1::2].log_softmax(-1)
        ce = F.cross_entropy(logits, labels.reshape(-1).long(), ignore_index=self.ignore_index)
        there = F.kl_div(first, second.detach(), reduction="sum", log_target=True)
        back = F.kl_div(second, first.detach(), reduction="sum", log_target=True)
        return ce + (there + back) / 4 * self.alpha

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        shapes = f"logits {list(logits.shape)} and labels {list(labels.shape)} ({labels.dtype})"
        if logits.dim() < 2 or not len(logits) or len(logits) % 2:
            raise ValueError(
                f"{shapes}: logits need an even number of rows, two for each sample; use rdrop_repeat"
            )
        if self.compatibility == "mindpet":
            if logits.dim() != 2 or labels.is_floating_point() or labels.numel() != len(logits):
                raise ValueError(
                    f"{shapes}: compatibility='mindpet' takes logits[2B, C] and integer labels[2B]"
                )
            return
        if labels.shape != (logits.shape if labels.is_floating_point() else logits.shape[:-1]):
            raise ValueError(
                f"{shapes} do not fit: labels are classes {list(logits.shape[:-1])} or probabilities {list(logits.shape)}"
            )
        # Whoever doubles by torch.cat pairs different samples, and nothing else would tell.
        if not torch.compiler.is_compiling() and not torch.equal(labels[0::2], labels[1::2]):
            raise ValueError(
                "rows 2i and 2i + 1 have different labels, so they are not the same sample; double the batch by rdrop_repeat"
            )
