"""Leading components of rows that come batch by batch.

Ross et al. 2008, https://doi.org/10.1007/s11263-007-0075-7

state       S[k], V[k, in]: the k largest singular values of m rows less their mean, and their directions
new rows    X[n, in]: [S V; X - mean(X); sqrt(m n / (m + n)) (mean so far - mean(X))] has those of all m + n
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decompose import leading_part_fast

ROUNDS = 4


class IncrementalPCA:
    """The k leading principal components of the rows seen so far.

    Attributes:
        components: V[k, in], each with its largest entry positive; empty until k rows have come.
        singular_values: S[k].
        similarity: cosine of each component with what it was one update earlier; empty until the second.
        seen: number of rows.
    """

    def __init__(self, k: int) -> None:
        self.k, self.seen = k, 0
        self.components = self.singular_values = self.similarity = torch.empty(0)
        self._counted = 0  # rows that are in the components
        self._waiting: list[Tensor] = []  # rows that are not yet: an update takes at least k
        self._mean, self._spread = torch.empty(0), torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take new rows x[n, in] into account, at once or when k have come together."""
        self._waiting.append(x)
        self.seen += len(x)
        if self.seen - self._counted >= self.k:
            self._update(torch.cat(self._waiting).float())
            self._waiting = []

    def explained(self) -> Tensor:
        """Return the part of the rows' variance that lies along each component, [k]."""
        return self.singular_values.square() / self._spread.clamp_min(torch.finfo(torch.float32).tiny)

    def _update(self, x: Tensor) -> None:
        n, m, mean = len(x), self._counted, x.mean(0)
        rows = x - mean
        spread, shift = rows.square().sum(), torch.zeros_like(mean)
        if m:
            shift = (m * n / (m + n)) ** 0.5 * (self._mean - mean)
            spread = self._spread + spread + shift.square().sum()
            rows = torch.cat([self.singular_values[:, None] * self.components, rows, shift[None]])
            mean = (m * self._mean + n * mean) / (m + n)
        _, values, components = leading_part_fast(rows, self.k, ROUNDS, oversampling=self.k)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * largest.sign()
        if m:
            self.similarity = torch.nn.functional.cosine_similarity(components, self.components)
        self.components, self.singular_values, self._counted = components, values, m + n
        self._mean, self._spread = mean, spread
