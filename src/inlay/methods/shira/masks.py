"""Masks of SHiRA: which entries of W[out, in] are trained. Each returns k places as numbers into the flattened matrix, ascending.

    random    any k entries
    struct    the diagonal, whole rows and whole columns, which let gradients reach every input and output
    wm        the k entries of largest magnitude in the pretrained weight
    grad      the k entries whose gradient is largest in magnitude   } over batches that the user gives:
    snip      the k entries with the largest |W * gradient|          } see ``calibrate_shira``

Bhardwaj et al. 2024, section 4.1, https://arxiv.org/abs/2406.13175.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

Mask = Callable[[Tensor, int, torch.Generator], Tensor]
"""(W[out, in], k, generator on the CPU) -> places[k]."""


def layer_seed(seed: int, path: str) -> int:
    """Return a seed that differs from layer to layer, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "big")


def random_mask(w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k places drawn at random."""
    size = w.numel()
    if 2 * k > size:
        return torch.randperm(size, generator=generator)[:k].sort().values
    # A permutation of all entries would cost more than the mask of a large layer is worth: draw until k are distinct.
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < k:
        more = torch.randint(size, (k - len(places) + k // 16 + 16,), generator=generator)
        places = torch.unique(torch.cat([places, more]))
    surplus = torch.randperm(len(places), generator=generator)[:k]
    return places[surplus].sort().values


def struct_mask(w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the diagonal and as many whole rows and columns, drawn at random, as k entries allow; one column is a part."""
    out, width = w.shape
    rows, columns = torch.randperm(out, generator=generator), torch.randperm(width, generator=generator)
    mask = torch.zeros(out, width, dtype=torch.bool)
    mask.fill_diagonal_(True)
    if k <= min(out, width):
        return mask.flatten().nonzero().flatten()[:k]
    lines = (k - min(out, width)) // (out + width)
    mask[rows[:lines]] = True
    mask[:, columns[:lines]] = True
    in_order = columns[lines:] if lines < width else columns
    free = (~mask).T[in_order].nonzero()[: k - int(mask.sum())]
    mask[free[:, 1], in_order[free[:, 0]]] = True
    return mask.flatten().nonzero().flatten()


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the places of the k largest scores[out, in]."""
    return scores.flatten().topk(k, sorted=False).indices.sort().values.cpu()


def magnitude_mask(w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the k places of largest magnitude."""
    return largest(w.abs(), k)


MASKS: dict[str, Mask] = {"random": random_mask, "struct": struct_mask, "wm": magnitude_mask}
"""Masks that need nothing but the weight, by ``mask_type``."""
CALIBRATED = ("grad", "snip")
"""Masks that need gradients as well."""
