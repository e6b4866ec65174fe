"""The projections of a bottleneck: a dense matrix, a sum of Kronecker products (Compacter), or a product of low rank.

dense       y = x W' + b                                            nn.Linear
Kronecker   y = x sum_i A_i (x) W_i + b      W_i = left_i right_i   Kronecker, A[n, n, n] is kept by the adapter
low rank    y = (x left) right + b                                  LowRankLinear
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import LowRankLinear
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
        wide, narrow = max(width_in, width_out), min(width_in, width_out)
        through = n * (rank or 0) * (wide + n * narrow)
        self.through_factors = rank is not None and through < width_in * width_out

    def forget_factors(self) -> None:
        """Keep the bias alone: W is another layer's."""
        for name in [name for name in self._parameters if name != "bias"]:
            del self._parameters[name]

    def matrix(self, rule: Tensor, factors: Kronecker) -> Tensor:
        """Return ``H[in, out]``, given A ``[n, n, n]`` and the layer that has W, this one or another."""
        w = factors.W if factors.rank is None else factors.W_left @ factors.W_right
        return torch.einsum("iab,ipq->apbq", rule, w).reshape(self.n * w.shape[1], self.n * w.shape[2])

    def down(self, rule: Tensor, factors: Kronecker) -> Part:
        """Return the projection as one that reads what is wide: all W_left at once, then A and W_right in one matrix."""
        if not self.through_factors:
            return Part(self.matrix(rule, factors).T, self.bias)
        left, right = factors.W_left, factors.W_right
        n, r = left.shape[0], left.shape[2]
        mix = torch.einsum("iab,ikq->aikbq", rule, right).reshape(n * n * r, -1)
        return Part(left.transpose(1, 2).reshape(n * r, -1), None, mix, self.bias)

    def up(self, rule: Tensor, factors: Kronecker) -> Part:
        """Return the projection as one that puts out what is wide: W_left and A in one matrix, then all W_right at once."""
        if not self.through_factors:
            return Part(self.matrix(rule, factors).T, self.bias)
        left, right = factors.W_left, factors.W_right
        n, r = left.shape[0], left.shape[2]
        mix = torch.einsum("iab,ipk->apbik", rule, left).reshape(-1, n * n * r)
        return Part(right.flatten(0, 1).T, self.bias, mix)


class Part(NamedTuple):
    """One of the two projections of a bottleneck, as a wide product and perhaps a narrow one on the bottleneck's side.

    Attributes:
        wide: ``D[k, p]`` on the way down, for rows of p numbers of the input; ``U[q, m]`` on the way up, for rows of the output.
        bias: of the wide side's output.
        mix: ``[rows k, b]`` on the way down, ``[b, rows m]`` on the way up; None where the wide product is all.
        mix_bias: of the mix on the way down.
    """

    wide: Tensor
    bias: Tensor | None
    mix: Tensor | None = None
    mix_bias: Tensor | None = None

    def down(self, x: Tensor) -> Tensor:
        """Return the bottleneck's input ``[..., b]`` for ``x[..., in]``."""
        return self.mixed(_by_rows(x, self.wide, self.bias))

    def mixed(self, s: Tensor) -> Tensor:
        """Return what the narrow product of the way down makes of the wide one's result."""
        return s if self.mix is None else F.linear(s, self.mix.to(s.dtype).T, _to(self.mix_bias, s))

    def up(self, a: Tensor) -> Tensor:
        """Return ``[..., out]`` for what comes out of the bottleneck, ``a[..., b]``."""
        if self.mix is None:
            return F.linear(a, self.wide.to(a.dtype), _to(self.bias, a))
        out = _by_rows(a @ self.mix.to(a.dtype), self.wide, None)
        return out if self.bias is None else out + self.bias.to(a.dtype)


def part_of(projection: nn.Module, down: bool, rule: Tensor | None, factors: nn.Module, like: Tensor) -> Part:
    """Return a projection of any form.

    Args:
        projection: one of the three forms.
        down: which way it goes.
        rule: A, of a Kronecker product.
        factors: the layer that has its W.
        like: a tensor on the device where it is to run.
    """
    if isinstance(projection, Kronecker):
        assert rule is not None and isinstance(factors, Kronecker)
        made = (projection.down if down else projection.up)(rule.to(like.device), factors)
        moved: Any = [t if t is None else t.to(like.device) for t in made]
        return Part(*moved)
    if isinstance(projection, LowRankLinear):
        left, right, bias = projection.weight_left, projection.weight_right, projection.bias
        return Part(left.T, None, right, bias) if down else Part(right.T, bias, left)
    assert isinstance(projection, nn.Linear)
    return Part(projection.weight, projection.bias)


def _by_rows(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x[..., i p]``, each of its i rows through ``w[k, p]``: ``[..., i k]``."""
    if x.shape[-1] == w.shape[1]:
        return F.linear(x, w.to(x.dtype), _to(bias, x))
    return F.linear(x.reshape(*x.shape[:-1], -1, w.shape[1]), w.to(x.dtype)).flatten(-2)


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


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


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Run a layer in the dtype of its input, whatever its own is."""
    return F.linear(x, layer.weight.to(x.dtype), _to(layer.bias, x))


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
