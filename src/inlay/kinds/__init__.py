"""Kinds: the geometry of the layers an adapter can sit on.

Every method does its mathematics on the canonical matrix ``W[..., out, in]``. A kind maps a layer's own weight to that
matrix and back, applies it, and builds the two factors of a low-rank update, so that ``through(x, down, up)`` is the
layer's own operation with the matrix ``product(up, down)``:

    kind         layer's weight               W[..., out, in]          down            up
    Linear       [out, in]                    as it is                 Linear(in, r)   Linear(r, out)
    Conv1D       [in, out] (GPT-2)            transposed               Linear(in, r)   Linear(r, out)
    Conv         [out, in/groups, *k]         [out, in/groups * k]     ConvNd(in, r)   ConvNd(r, out, 1, groups)
    Embedding    [num, dim]                   transposed, [dim, num]   [r, num]        [dim, r]
    InProjection [3 embed, embed]             as it is                 Linear          Linear
    Experts      [expert, out, in] (or .mT)   [expert, out, in]        Linear(in, r * experts) ...
    Norm         [features]                   [features, 1]            none
    Output       none: what a module puts out y[..., out]              none
"""

from __future__ import annotations

# The last kind registered for a parameter wins, so the general ones come first.
from .base import Factor, LayerKind, kind_of, layer_kind, supported_layers, uninitialised
from .parameters import Experts, InProjection, Matrix  # isort: split

from .conv import Conv
from .embedding import Embedding
from .linear import Conv1D, Linear
from .norm import Norm
from .output import Output

__all__ = [
    "Conv",
    "Conv1D",
    "Embedding",
    "Experts",
    "Factor",
    "InProjection",
    "LayerKind",
    "Linear",
    "Matrix",
    "Norm",
    "Output",
    "kind_of",
    "layer_kind",
    "supported_layers",
    "uninitialised",
]
