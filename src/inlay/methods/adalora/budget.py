"""AdaLoRA's rank budget: how much each rank of each matrix matters, how many ranks a step affords, and which are kept.

A rank is a triplet: a row of A, a value of E, a column of B. Each of its numbers p has

    s = |p * dL/dp|                       sensitivity: what the loss would change by if p were zero
    I <- b1 I + (1 - b1) s                importance, smoothed over steps
    U <- b2 U + (1 - b2) |s - I|          uncertainty of it

and the triplet scores ``IU(E) + mean IU(row of A) + mean IU(column of B)``. All triplets of an adapter are ranked together.
Matrices of one shape are worked on at once: a model has few shapes and many matrices.
Zhang et al. 2023, https://arxiv.org/abs/2303.10512, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ...method import Slot


@dataclass(frozen=True)
class Batch:
    """Triplets of matrices that have one shape and one device: A[..., r, in], E[..., r, 1], B[..., out, r] of each."""

    paths: tuple[str, ...]
    a: list[nn.Parameter]
    e: list[nn.Parameter]
    b: list[nn.Parameter]

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, matrix by matrix."""
        return [p for triple in zip(self.a, self.e, self.b, strict=True) for p in triple]

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors shaped like the parameters as one new tensor with a row for each matrix, in at least float32."""
        flat = torch.cat([t.reshape(-1) for t in tensors]).view(len(self.a), -1)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def scores(self, values: Tensor) -> Tensor:
        """Return the score [matrix, r] of each triplet from a value for each number, in the shape of ``rows``."""
        parts = torch.split(values, [p.numel() for p in (self.a[0], self.e[0], self.b[0])], dim=1)
        a, e, b = (
            part.reshape(len(p), *p[0].shape) for part, p in zip(parts, (self.a, self.e, self.b), strict=True)
        )
        score: Tensor = e.squeeze(-1) + (a.mean(-1) + b.mean(-2))
        return (
            score.flatten(1, -2).mean(1) if score.dim() > 2 else score
        )  # experts keep or lose a rank together


def batches(slots: Sequence[Slot]) -> list[Batch]:
    """Return the triplets of an adapter, shape by shape."""
    alike: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        a, b = slot["lora_A"], slot["lora_B"]
        alike.setdefault((a.shape, b.shape, a.dtype, a.device), []).append(slot)
    return [
        Batch(tuple(s.path for s in group), *([s[c] for s in group] for c in ("lora_A", "lora_E", "lora_B")))
        for group in alike.values()
    ]


def affordable(step: int, initial: int, target: int, first: int, last: int) -> int:
    """Return how many triplets a step affords: a cubic descent from ``initial`` after ``first`` to ``target`` at ``last``."""
    left = 1 - (step - first) / (last - first)
    return int((initial - target) * left**3 + target)


class RankBudget:
    """What is known of the importance of an adapter's triplets."""

    def __init__(self) -> None:
        self.smoothed: dict[
            tuple[str, ...], Tensor
        ] = {}  # by the matrices of a batch: [(I, U), matrix, number]

    def observe(self, found: Sequence[Batch], beta1: float, beta2: float) -> None:
        """Take in the gradients of a step.

        Raises:
            ValueError: there are none.
        """
        if all(p.grad is None for batch in found for p in batch.parameters()):
            raise ValueError(
                "update_and_allocate found no gradients; call it after loss.backward() and optimizer.step() and before "
                "zero_grad()"
            )
        for batch in found:
            parameters = batch.parameters()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            sensitivity = batch.rows([p.detach() for p in parameters]).mul_(batch.rows(gradients)).abs_()
            # A step that overflowed in mixed precision must not be remembered for ever.
            sensitivity.nan_to_num_(0.0, posinf=0.0)
            importance, uncertainty = self._memory(batch, sensitivity)
            importance.lerp_(sensitivity, 1 - beta1)
            uncertainty.lerp_(sensitivity.sub_(importance).abs_(), 1 - beta2)

    def _memory(self, batch: Batch, like: Tensor) -> Tensor:
        memory = self.smoothed.get(batch.paths)
        if memory is None:
            memory = torch.zeros(2, *like.shape, dtype=like.dtype, device=like.device)
        self.smoothed[batch.paths] = memory = memory.to(like.device)
        return memory

    def keep(self, found: Sequence[Batch], spare: int) -> list[Tensor]:
        """Return which triplets are kept, ``[matrix, r]`` of bool for each batch, when the ``spare`` lowest are not affordable.

        Raises:
            ValueError: nothing has been observed yet.
        """
        if missing := [batch.paths[0] for batch in found if batch.paths not in self.smoothed]:
            raise ValueError(
                f"ranks are to be pruned, but no importance of {missing[0]} has been measured yet; call "
                "update_and_allocate(step) at every optimizer step, from the first on"
            )
        scores = [batch.scores(torch.mul(*self.smoothed[batch.paths])) for batch in found]
        least = _threshold(torch.cat([score.flatten().to(scores[0].device) for score in scores]), spare)
        return [~(score <= least.to(score.device)) for score in scores]

    def state(self, found: Sequence[Batch]) -> dict[str, Tensor]:
        """Return what is remembered, by path; empty before the first step."""
        return {
            f"{path}.{what}": values[index]
            for batch in found
            if batch.paths in self.smoothed
            for what, values in zip(("importance", "uncertainty"), self.smoothed[batch.paths], strict=True)
            for index, path in enumerate(batch.paths)
        }

    def load_state(self, found: Sequence[Batch], state: Mapping[str, Tensor]) -> None:
        """Take up again what ``state`` returned; forget everything where it is empty.

        Raises:
            ValueError: it belongs to another adapter; nothing is changed then.
        """
        wanted = {
            f"{path}.{what}": sum(math.prod(ps[0].shape) for ps in (batch.a, batch.e, batch.b))
            for batch in found
            for path in batch.paths
            for what in ("importance", "uncertainty")
        }
        if state and {key: t.numel() for key, t in state.items()} != wanted:
            raise ValueError(
                f"the state of the rank budget does not fit the adapter: it has {len(state)} tensors for other matrices or "
                f"other ranks than the {len(wanted) // 2} matrices here; delete the file to measure importance anew"
            )
        self.smoothed = {
            batch.paths: torch.stack(
                [
                    torch.stack([state[f"{p}.{what}"] for p in batch.paths])
                    for what in ("importance", "uncertainty")
                ]
            ).to(batch.a[0].device, torch.promote_types(batch.a[0].dtype, torch.float32))
            for batch in found
            if state
        }


def _threshold(scores: Tensor, spare: int) -> Tensor:
    """Return the score up to which triplets go: the ``spare``-th lowest, or less than any where none is to go."""
    nothing = scores.new_tensor(-torch.inf)
    if spare <= 0 or not len(scores):
        return nothing
    least = scores.kthvalue(min(spare, len(scores))).values
    if spare >= len(scores):
        return least
    # All alike, as before the first step with a learning rate above zero: no reason to drop everything.
    return torch.where(least < scores.max(), least, nothing)
