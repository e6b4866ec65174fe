"""How far factors are from orthogonal, as one autograd function: the mean over matrices of ||A A' - 1|| and ||B' B - 1||.

    A[..., r, in]   B[..., out, r]   ||.|| Frobenius          Zhang et al. 2023, https://arxiv.org/abs/2303.10512, equation 4

The gradient has a closed form, 2 (G - 1) A / ||G - 1|| for G = A A', and is made together with the value: matrices of one shape
are stacked, so that the number of operations does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import outside_autocast


def orthogonality(weight: float, groups: Sequence[Sequence[Tensor]], turned: Sequence[bool]) -> Tensor:
    """Return ``weight`` times the mean over all matrices, 0-d, in at least float32.

    Args:
        weight: of the term in the loss.
        groups: matrices M[..., r, k] in groups of one shape; leading axes are further matrices.
        turned: for each group, whether its matrices are M[..., k, r] instead.
    """
    if torch.compiler.is_compiling():
        return plain_orthogonality(weight, groups, turned)
    matrices = [m for group in groups for m in group]
    sizes = [len(group) for group in groups]
    value: Tensor = _Orthogonality.apply(weight, sizes, turned, *matrices)  # type: ignore[no-untyped-call]
    return value


def plain_orthogonality(weight: float, groups: Sequence[Sequence[Tensor]], turned: Sequence[bool]) -> Tensor:
    """The same function in differentiable operations: for second derivatives and for ``torch.compile``."""
    total: Tensor | float = 0.0
    for group, other_way in zip(groups, turned, strict=True):
        _, excess = _excess(group, other_way)
        distances = excess.flatten(1).norm(dim=1).sum()
        total = distances.to(groups[0][0].device) + total
    return torch.mul(torch.as_tensor(total), weight / _count(groups))


def _count(groups: Sequence[Sequence[Tensor]]) -> int:
    return sum(m.shape[:-2].numel() for group in groups for m in group)


def _excess(group: Sequence[Tensor], other_way: bool) -> tuple[Tensor, Tensor]:
    """Return the matrices as one stack and G - 1 of each."""
    stack = torch.stack(tuple(group))
    if stack.dim() > 3:
        stack = stack.flatten(0, -3)
    if stack.element_size() < 4:
        stack = stack.float()
    with outside_autocast(stack):
        gram = torch.bmm(stack.mT, stack) if other_way else torch.bmm(stack, stack.mT)
    return stack, gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: float, sizes: list[int], turned: Sequence[bool], *matrices: Tensor
    ) -> Tensor:
        groups = _grouped(matrices, sizes)
        share, distances, products = weight / _count(groups), [], []
        for group, other_way in zip(groups, turned, strict=True):
            stack, excess = _excess(group, other_way)
            distances.append(torch.linalg.vector_norm(excess, dim=(1, 2)))
            with outside_autocast(stack):
                products.append(torch.bmm(stack, excess) if other_way else torch.bmm(excess, stack))
        ctx.save_for_backward(*matrices, *distances, *products)
        ctx.sizes, ctx.turned, ctx.weight, ctx.share = sizes, turned, weight, share
        total = torch.cat([d.to(distances[0].device) for d in distances]).sum()
        return total.mul_(share)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        matrices, kept = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if torch.is_grad_enabled():
            views = [m.view_as(m) for m in matrices]
            value = plain_orthogonality(ctx.weight, _grouped(views, ctx.sizes), ctx.turned)
            wanted = [v for v, need in zip(views, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, dy, create_graph=True))
            return None, None, None, *(next(found) if need else None for need in needed)
        parts: list[Tensor] = []
        for index, group in enumerate(_grouped(matrices, ctx.sizes)):
            distance, product = kept[index], kept[index + len(ctx.sizes)]
            # A matrix that is orthogonal has no direction to go: its gradient is zero and not 0 / 0.
            gain = dy.to(distance.device) * (2 * ctx.share) / distance.clamp_min(1e-30)
            gradient = (product * gain[:, None, None]).to(group[0].dtype)
            parts += gradient.view(len(group), *group[0].shape).unbind(0)
        return None, None, None, *parts


def _grouped(matrices: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    groups, start = [], 0
    for size in sizes:
        groups.append(matrices[start : start + size])
        start += size
    return groups
