"""OFT: rotate what a layer reads, block by block. Qiu et al. 2023, https://arxiv.org/abs/2306.07280; OFTv2: https://arxiv.org/abs/2506.19847.

    W' = W R^T,  b' = b        W[out, in], R = diag(R_1, ..., R_n), R_i[block, block] orthogonal, n = in / block

    x[..., in] -> x R [..., in] -> W -> y[..., out]

R_i = (I + Q_i)(I - Q_i)^-1 with a skew-symmetric Q_i, whose block (block - 1) / 2 entries above the diagonal are trained; by
default the inverse is the beginning of its Neumann series. With ``use_cayley_neumann=False`` it is exact, and Q the other way
round, as in PEFT. An embedding's rows are rotated instead, E' = E R. Q starts at zero, so R starts as the identity and the
adapted layer as the layer itself. Rotations keep lengths of, and angles between, the rows of W.
Authors' code: https://github.com/Zeju1997/oft
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..errors import PeftWarning
from ..kernels.autocast import outside_autocast
from ..kinds import Conv, Embedding, LayerKind, Norm
from ..method import Column, Method, Slot


@dataclass(kw_only=True)
class OFTConfig(PeftConfig):
    """Configuration of OFT. Fields and defaults are those of PEFT 0.21.

    Args:
        r: number of blocks; ``oft_block_size`` must then be 0.
        oft_block_size: side of a block; of two sizes that divide a layer's inputs, the nearer one is taken, with a warning.
        module_dropout: probability with which, in training, a block is left as the identity.
        target_modules: names (endings of module paths) or one regular expression for whole paths, or "all-linear"; by
            default the attention projections that are usual for the model's type.
        fan_in_fan_out: accepted for compatibility; the layout of the weight is known from the layer's class.
        bias: which biases of the base model are trained: "none" or "all".
        exclude_modules: names or a regular expression of modules to leave out.
        init_weights: start as the identity (True), or at random (False).
        layers_to_transform: index or indices of the blocks to adapt; needs ``target_modules`` as a list.
        layers_pattern: name(s) of the list of blocks, where it is not found by itself.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        eps: freedom of ``coft``; without it, of no effect.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: take the Neumann series for the inverse; fast, and orthogonal only as far as Q is small.
        num_cayley_neumann_terms: length of that series.

    Raises:
        ValueError: values that contradict each other, or a field of PEFT that Inlay does not implement.
    """

    not_implemented: ClassVar[dict[str, Any]] = {"coft": False}

    peft_type: PeftType | str | None = PeftType.OFT
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: Collection[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if (self.r == 0) == (self.oft_block_size == 0) or self.r < 0 or self.oft_block_size < 0:
            raise ValueError(
                f"give either `r` or `oft_block_size`, positive, and 0 for the other "
                f"(r * oft_block_size is the number of inputs); got r={self.r} and oft_block_size={self.oft_block_size}"
            )
        if not 0.0 <= self.module_dropout < 1.0:
            raise ValueError(f"module_dropout={self.module_dropout} is not a probability in [0, 1)")
        if self.num_cayley_neumann_terms < 1:
            raise ValueError(
                f"num_cayley_neumann_terms={self.num_cayley_neumann_terms} must be positive; PEFT's default is 5"
            )


class Rotation(nn.Module):
    """The trained entries of Q, above its diagonal: weight[blocks, block (block - 1) / 2]."""

    def __init__(self, blocks: int, size: int, kind: LayerKind) -> None:
        super().__init__()
        count = size * (size - 1) // 2
        self.weight = nn.Parameter(torch.empty(blocks, count, device=kind.device, dtype=kind.dtype))


class OFT(Method, name="OFT"):
    """W' = W R^T; see the top of this file."""

    config = OFTConfig

    def build(self, kind: LayerKind, config: OFTConfig, path: str) -> dict[str, Column]:
        if isinstance(kind, Norm):
            raise ValueError(
                f"OFT rotates the input of a product; {path} normalises. Leave it out with exclude_modules"
            )
        embedding = isinstance(kind, Embedding)
        features = kind.out_features if embedding else kind.in_features
        if config.r:
            blocks = _nearest_divisor(features, config.r, "r", path)
        else:
            blocks = features // _nearest_divisor(features, config.oft_block_size, "oft_block_size", path)
        rotation = Rotation(1 if config.block_share else blocks, features // blocks, kind)
        return {
            "oft_embedding_R" if embedding else "oft_R": rotation,
            "r": blocks,
            "oft_block_size": features // blocks,
        }

    def init(self, slot: Slot) -> None:
        for p in slot.parameters().values():
            nn.init.zeros_(p) if slot.config.init_weights else nn.init.normal_(p, std=0.1)  # type: ignore[attr-defined]

    def before(self, slot: Slot, x: Tensor) -> Tensor:
        if isinstance(slot.kind, (Embedding, Conv)):
            return x
        return _by_blocks(x, _with_dropout(slot, _blocks(slot, x.dtype)))

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(slot.kind, Embedding):
            with outside_autocast(y):  # which leaves looked-up rows as they are
                return _by_blocks(y, _with_dropout(slot, _blocks(slot, y.dtype)))
        if isinstance(slot.kind, Conv):
            # Patches overlap and each is rotated as a whole, which no change of the input amounts to.
            turn = _with_dropout(slot, _blocks(slot, y.dtype)).mT
            change = turn - torch.eye(turn.shape[-1], device=y.device, dtype=y.dtype)
            return y + slot.kind.apply(x.to(y.dtype), _by_blocks(slot.weight().to(y.dtype), change))
        return y

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turn = _blocks(slot, w.dtype)
        if isinstance(slot.kind, Embedding):
            return _by_blocks(w.mT, turn).mT, b
        if w.shape[-1] == slot.kind.in_features:
            return _by_blocks(w, turn.mT), b
        groups = w.shape[-1] // slot.kind.in_features  # another adapter has joined them to a dense layer
        return torch.cat([_by_blocks(part, turn.mT) for part in w.chunk(groups, -1)], -1), b

    def beyond_merge(self, slot: Slot) -> str | None:
        dropout = slot.layer.training and slot.config.module_dropout  # type: ignore[attr-defined]
        return "module_dropout" if dropout else None


def _blocks(slot: Slot, dtype: torch.dtype) -> Tensor:
    """Return R[blocks, block, block]. Half precision is computed in float32: an inverse needs it."""
    exact = torch.promote_types(dtype, torch.float32)
    rotation: Any = next(iter(slot.parameters().values()))
    config: Any = slot.config
    with outside_autocast(rotation):
        q = _skew(rotation.to(exact), slot["oft_block_size"])
        turn = _series(q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else _cayley(q)
    return turn.to(dtype).expand(slot["r"], -1, -1)


def _skew(values: Tensor, size: int) -> Tensor:
    """Return Q[blocks, size, size] with the values[blocks, size (size - 1) / 2] above its diagonals, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=values.device)
    upper = values.new_zeros(size, size, len(values)).index_put((rows, columns), values.mT).movedim(-1, 0)
    return upper - upper.mT


def _cayley(q: Tensor) -> Tensor:
    """Return (I - Q)(I + Q)^-1, orthogonal."""
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    turn: Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
    return turn


def _series(q: Tensor, terms: int) -> Tensor:
    """Return the beginning of (I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ..., cut off where PEFT does, its last term once."""
    total = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype).expand_as(q)
    if terms == 1:
        return total
    total = total + 2 * q
    if terms == 2:
        return total
    power = q
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return ``x[..., n * block]`` times the block-diagonal matrix of ``blocks[n, block, block]``."""
    rows = x.reshape(*x.shape[:-1], len(blocks), -1)
    return torch.einsum("...nb,nbc->...nc", rows, blocks).flatten(-2)


def _with_dropout(slot: Slot, blocks: Tensor) -> Tensor:
    """Return the blocks with some of them the identity, in training."""
    p: float = slot.config.module_dropout  # type: ignore[attr-defined]
    if not slot.layer.training or not p:
        return blocks
    keep = torch.rand(len(blocks), 1, 1, device=blocks.device) >= p
    return torch.where(keep, blocks, torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype))


def _nearest_divisor(size: int, wanted: int, field: str, path: str) -> int:
    """Return the number nearest to the wanted one that divides a size, the smaller one of two."""
    found = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))
    if found != wanted:
        warnings.warn(
            f"{field}={wanted} does not divide the {size} features of {path}; {found} is used there",
            PeftWarning,
            stacklevel=2,
        )
    return found
