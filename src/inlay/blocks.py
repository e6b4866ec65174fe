"""Blocks that more than one family of adapters is built of: a linear layer of low rank, the bottleneck with its residual, a gate.

    low-rank linear   y = (x L) R + b           x[..., in], L[in, rank], R[rank, out], b[out]
    bottleneck        y = h + up(f(down(h)))    h[..., d], down: d -> k, f elementwise, up: k -> d
    gate              g = mean_t sigmoid(w x_t + b)      x[batch, t, d], w[n, d], b[n], g[batch, 1, n]

The bottleneck is that of Houlsby et al. 2019, https://arxiv.org/abs/1902.00751. With low-rank layers for ``down`` and ``up``
it is the low-rank adapter that Mahabadi et al. 2021 compare with in https://arxiv.org/abs/2106.04647. The gate is that of
UniPELT, Mao et al. 2022, https://arxiv.org/abs/2110.07577.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y[..., out] = (x left) right + bias for left[in, rank] and right[rank, out].

    The product of the factors is never formed: n rows cost n rank (in + out) multiplications instead of n in out and those of the
    product itself, forward and again backward.

    Example::

        y = low_rank_linear(torch.randn(4, 8), torch.randn(8, 1), torch.randn(1, 6))  # y[4, 6]
    """
    return F.linear(F.linear(x, left.T), right.T, bias)


class LowRankLinear(nn.Module):
    """A linear layer whose weight is the product of two thin factors: y = (x L) R + b.

    The layout is that of the papers, x times weight: ``weight_left[in, rank]``, ``weight_right[rank, out]``, ``bias[out]``. As
    the weight W[out, in] of an ``nn.Linear`` it is ``(weight_left @ weight_right).T``.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the factors; where it is above ``in out / (in + out)`` the layer is larger than a full one.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        ValueError: a width or the rank is below one.

    Example::

        down = LowRankLinear(768, 24, rank=1)
        hidden = down(torch.randn(2, 5, 768))  # hidden[2, 5, 24]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight_left = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.weight_right = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors from Xavier's uniform distribution, and set the bias to zero."""
        nn.init.xavier_uniform_(self.weight_left)
        nn.init.xavier_uniform_(self.weight_right)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y[..., out] for x[..., in]."""
        return low_rank_linear(x, self.weight_left, self.weight_right, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def bottleneck_residual(
    h: Tensor,
    down: Callable[[Tensor], Tensor],
    non_linearity: Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return h + up(non_linearity(down(h))), of the shape and dtype of h where ``up`` returns these."""
    return h + up(non_linearity(down(h)))


def open_gate(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return how far a gate is open for each sample: ``g[batch, 1, n]``, between 0 and 1, for ``x[batch, t, d]``.

    The mean is over all positions, padding included, as in AdapterHub; a layer does not know which positions are padding. An
    x without positions, ``[rows, d]``, has a gate for each row.
    """
    g = torch.sigmoid(F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)))
    return g.mean(-2, keepdim=True) if g.dim() > 2 else g


@torch.no_grad()
def start_gate(layer: nn.Linear) -> None:
    """Give a gate its first values: half open, whatever it reads, but for a little noise."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
