"""What initialisations that look at the base weight share: reading, taking apart, writing back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kinds import Experts

if TYPE_CHECKING:
    from ..kinds import LayerKind
    from ..method import Slot

OVERSAMPLING = 16


def check_one_matrix(kind: LayerKind, config: Any, r: int, layer: str) -> None:
    """Refuse layers whose update is not the product of one pair of matrices.

    Raises:
        ValueError: experts or grouped convolutions.
    """
    probe = torch.empty(kind.out_features, kind.in_features, device="meta")
    if not isinstance(kind, Experts) and kind.widen(probe) is probe:
        return
    what = "a matrix for each expert" if isinstance(kind, Experts) else "a matrix for each of its groups"
    raise ValueError(
        f"init_lora_weights={config.init_lora_weights!r} needs a layer with one matrix, and {layer} "
        f"({type(kind).__name__}) holds {what}; use init_lora_weights=True or 'gaussian', or leave the layer "
        "out with exclude_modules"
    )


def check_decomposable(kind: LayerKind, config: Any, r: int, layer: str) -> None:
    """Refuse layers whose matrix has fewer than r components, and updates that are scaled away.

    Raises:
        ValueError: also as ``check_one_matrix``.
    """
    check_one_matrix(kind, config, r, layer)
    most = min(kind.out_features, kind.in_features)
    if r > most:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} cannot take r={r} components of {layer}, whose "
            f"matrix is {kind.out_features} x {kind.in_features} and has {most}; lower r, set a smaller rank "
            "for this layer with rank_pattern, or leave it out with exclude_modules"
        )
    if min([config.lora_alpha, *config.alpha_pattern.values()]) <= 0:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} divides by the scale of the update; "
            "choose lora_alpha > 0"
        )


def exact_weight(slot: Slot) -> Tensor:
    """Return the base weight W[out, in] in at least float32."""
    w = slot.weight().detach()
    return w.to(torch.promote_types(w.dtype, torch.float32))


def leading_part(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular values S[r] of w[out, in] and their vectors: U[out, r], S, Vh[r, in]."""
    if w.shape[0] < w.shape[1]:  # LAPACK is several times as fast on a tall matrix
        v, s, uh = leading_part(w.mT, r)
        return uh.mT, s, v.mT
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r], s[:r], vh[:r]


def leading_part_fast(
    w: Tensor, r: int, rounds: int, oversampling: int = OVERSAMPLING
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``leading_part`` does, approximately, without a full decomposition (arXiv 0909.4061).

    The random probe is drawn on the CPU from a seed of its own: the same matrix is taken apart in the same
    way in every process, as it must be again when a trained adapter is loaded.

    Args:
        w: the matrix [out, in].
        r: how many components.
        rounds: subspace iterations; each divides the error by the ratio of kept to other values, squared.
        oversampling: how many more directions to follow than are kept.
    """
    width = r + oversampling
    if width >= min(w.shape):
        return leading_part(w, r)
    probe = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=w.dtype).to(
        w.device
    )
    basis = torch.linalg.qr(w @ probe)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ basis)[0])[0]
    u, s, vh = leading_part(basis.mT @ w, r)
    return basis @ u, s, vh


def set_factors(slot: Slot, up: Tensor, down: Tensor) -> None:
    """Set LoRA's factors from the matrices up[out, r] and down[r, in]."""
    for parameter, matrix in zip(_parameters(slot), (up, down), strict=True):
        parameter.copy_(matrix.reshape(parameter.shape))


def leave_the_rest(slot: Slot, w: Tensor) -> None:
    """Make the base weight ``W - s B A``, with the factors as rounded, so that the adapted layer starts as W.

    Raises:
        ValueError: the layer's weight is not this adapter's alone.
    """
    up, down = slot.kind.flat(*_parameters(slot))
    slot.layer.set_base_matrix(
        torch.addmm(w, up.to(w.dtype), down.to(w.dtype), alpha=-slot["scaling"]), slot.name
    )


def _parameters(slot: Slot) -> tuple[nn.Parameter, nn.Parameter]:
    if "lora_A" in slot.columns:
        return slot["lora_B"].weight, slot["lora_A"].weight
    return slot["lora_embedding_B"], slot["lora_embedding_A"]
