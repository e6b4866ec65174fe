"""The projections of a bottleneck: a dense matrix, a sum of Kronecker products (Compacter), or a product of low rank.

dense       y = x W' + b                                            nn.Linear
Kronecker   y = x sum_i A_i (x) W_i + b      W_i = left_i right_i   Kronecker, A[n, n, n] is kept by the adapter
low rank    y = (x left) right + b                                  LowRankLinear
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import LowRankLinear, low_rank_linear
from ...kinds import uninitialised


class Kronecker(nn.Module):
    """``x[..., in] -> x H + b[out]`` with ``H[in, out]`` the sum of n Kronecker products ``A_i[n, n] (x) W_i[in/n, out/n]``.

    The rule A is not here: all layers of an adapter may share it, and so they may W.

    Args:
        width_in, width_out: sizes of input and output, divisible by n.
        n: how many products, and the size of A.
        rank: rank of each W_i; None keeps W_i whole.
        bias: whether there is a b.
        where: device and dtype.
    """

    def __init__(
        self, width_in: int, width_out: int, n: int, rank: int | None, bias: bool, where: dict[str, Any]
    ) -> None:
        super().__init__()
        self.n, self.rank = n, rank
        p, q = width_in // n, width_out // n
        if rank is None:
            self.W = nn.Parameter(torch.empty(n, p, q, **where))
        else:
            self.W_left = nn.Parameter(torch.empty(n, p, rank, **where))
            self.W_right = nn.Parameter(torch.empty(n, rank, q, **where))
        self.bias = nn.Parameter(torch.empty(width_out, **where)) if bias else None
        # Multiplications for one vector: through the factors, or with H; forming H is paid for once in a forward pass.
        through = n * (rank or 0) * (width_in + width_out) + (n * n * (rank or 0)) ** 2
        self.through_factors = rank is not None and through < width_in * width_out

    def forget_factors(self) -> None:
        """Keep the bias alone: W is another layer's."""
        for name in [name for name in self._parameters if name != "bias"]:
            del self._parameters[name]

    def project(self, x: Tensor, rule: Tensor, factors: Kronecker) -> Tensor:
        """Return ``x H + b``.

        Args:
            x: ``[..., in]``.
            rule: A ``[n, n, n]``.
            factors: the layer that has W, this one or another.
        """
        rule = rule.to(x.device, x.dtype)
        y = factors._through_factors(x, rule) if self.through_factors else x @ factors._matrix(x, rule)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _through_factors(self, x: Tensor, rule: Tensor) -> Tensor:
        left, right = self.W_left.to(x.device, x.dtype), self.W_right.to(x.device, x.dtype)
        n, r = left.shape[0], left.shape[2]
        eye_n, eye_r = (torch.eye(size, device=x.device, dtype=x.dtype) for size in (n, r))
        mix = torch.einsum("iab,ij,kl->aikbjl", rule, eye_n, eye_r).reshape(n * n * r, n * n * r)
        # x is n rows of in/n: each row through all W_left at once, all rows through A, each row through all W_right.
        narrow = x.reshape(*x.shape[:-1], n, -1) @ left.transpose(0, 1).flatten(1)
        mixed = (narrow.flatten(-2) @ mix).reshape(*x.shape[:-1], n, n * r)
        return (mixed @ right.flatten(0, 1)).flatten(-2)

    def _matrix(self, x: Tensor, rule: Tensor) -> Tensor:
        w = self.W if self.rank is None else self.W_left @ self.W_right
        w = w.to(x.device, x.dtype)
        return torch.einsum("iab,ipq->apbq", rule, w).reshape(self.n * w.shape[1], self.n * w.shape[2])


def new_projection(config: Any, width_in: int, width_out: int, path: str, where: dict[str, Any]) -> nn.Module:
    """Return a projection of the form that a configuration asks for, without values.

    Raises:
        ValueError: the number of Kronecker products does not divide the widths.
    """
    if config.low_rank is not None:
        return uninitialised(LowRankLinear, width_in, width_out, config.low_rank, **where)
    if not config.phm_layer:
        return nn.Linear(width_in, width_out, **where)
    n = config.phm_dim
    if width_in % n or width_out % n:
        raise ValueError(
            f"phm_dim={n} does not divide the widths {width_in} and {width_out} of the projections at {path}; "
            "choose another phm_dim, reduction_factor or bottleneck_size"
        )
    return Kronecker(
        width_in, width_out, n, config.phm_rank if config.factorized_phm_W else None, config.phm_bias, where
    )


def linear(layer: nn.Linear | LowRankLinear, x: Tensor) -> Tensor:
    """Run a layer in the dtype of its input, whatever its own is."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, LowRankLinear):
        return low_rank_linear(x, layer.weight_left.to(x.dtype), layer.weight_right.to(x.dtype), bias)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Run a normalisation in the dtype of its input, whatever its own is."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


@torch.no_grad()
def initialise(projection: nn.Module, how: str, zero: bool, factors: str = "glorot-uniform") -> None:
    """Give a projection its values.

    Args:
        projection: one of the three forms.
        how: "bert", "lora", "mam_adapter" or "houlsby".
        zero: make it the zero map.
        factors: how factors are drawn: "glorot-uniform", "glorot-normal" or "normal" (deviation 0.01).
    """
    bias = getattr(projection, "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)
    if isinstance(projection, nn.Linear):
        _initialise_dense(projection.weight, how, zero)
        return
    named = {name: p for name, p in projection.named_parameters() if name != "bias"}
    for name, p in named.items():
        for matrix in p if p.dim() == 3 else (p,):
            _draw(matrix, factors)
        if zero and name in ("W", "W_right", "weight_right"):
            nn.init.zeros_(p)


def _initialise_dense(weight: Tensor, how: str, zero: bool) -> None:
    if zero:
        nn.init.zeros_(weight)
    elif how == "bert":
        nn.init.normal_(weight, std=0.02)
    elif how == "houlsby":
        nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _draw(matrix: Tensor, how: str) -> None:
    if how == "glorot-uniform":
        nn.init.xavier_uniform_(matrix)
    elif how == "glorot-normal":
        nn.init.xavier_normal_(matrix)
    else:
        nn.init.normal_(matrix, std=0.01)


@torch.no_grad()
def draw_rule(rule: Tensor, spread: float, how: str) -> None:
    """Give a rule its values, of this deviation (or half range, for "uniform")."""
    if how == "uniform":
        rule.uniform_(-spread, spread)
    else:
        rule.normal_(std=spread)
