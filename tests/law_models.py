"""Small models of one layer (or one block) each, for the tests of the law. Sizes are as small as they can be and all differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

RANK = 4
BATCH = 4
ROWS = 10


class Only(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Attending(Only):
    """Self-attention over x, given as query, key and value."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y


class Padded(Only):
    """A stack of encoder layers whose last position is padding, which lets PyTorch pack the batch in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        with (
            warnings.catch_warnings()
        ):  # PyTorch's own encoder warns that nested tensors are in prototype stage
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
            y: Tensor = self.layer(x, src_key_padding_mask=padding)
        return y.masked_fill(padding.unsqueeze(-1), 0.0)


class Bank(nn.Module):
    """Experts as transformers keeps them: one 3-d parameter, read by the module's own forward."""

    def __init__(self, is_transposed: bool = False, two: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (3, 6, 5) if is_transposed else (3, 5, 6)
        self.up = nn.Parameter(torch.randn(shape) / 2)
        if two:
            self.down = nn.Parameter(torch.randn(3, 6, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1) @ (self.up if self.is_transposed else self.up.mT)
        return torch.tanh(h) @ self.down.mT if hasattr(self, "down") else h


class Bilinear(nn.Module):
    """A module with a 2-d parameter that is not called ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() @ self.matrix.mT


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)


def _norm(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():  # or every weight would be one and every bias zero
        nn.init.normal_(p)
    return layer


FLOATS, GRID, IMAGE, VOLUME, IDS = (
    (BATCH, 3, 6),
    (BATCH, 6, 9),
    (BATCH, 6, 7, 5),
    (BATCH, 6, 4, 3, 5),
    (BATCH, 7),
)
SEQUENCE = (BATCH, 3, 8)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Only(nn.Linear(6, 5)), FLOATS),
    "linear_no_bias": (lambda: Only(nn.Linear(6, 5, bias=False)), FLOATS),
    "gpt2_conv1d": (lambda: Only(Conv1D(5, 6)), FLOATS),
    "conv1d": (lambda: Only(nn.Conv1d(6, 4, 3)), GRID),
    "conv1d_same": (lambda: Only(nn.Conv1d(6, 4, 3, padding="same", dilation=2, bias=False)), GRID),
    "conv2d": (lambda: Only(nn.Conv2d(6, 4, (3, 2), padding=1)), IMAGE),
    "conv2d_stride_dilation": (
        lambda: Only(nn.Conv2d(6, 4, 2, stride=(2, 1), dilation=(1, 2), padding=(1, 2))),
        IMAGE,
    ),
    "conv2d_circular": (lambda: Only(nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="circular")), IMAGE),
    "conv2d_reflect": (lambda: Only(nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect")), IMAGE),
    "conv2d_groups": (lambda: Only(nn.Conv2d(6, 8, 3, groups=2)), IMAGE),
    "conv3d": (lambda: Only(nn.Conv3d(6, 4, (2, 1, 3))), VOLUME),
    "embedding": (lambda: Only(nn.Embedding(ROWS, 5)), IDS),
    "embedding_padding": (lambda: Only(nn.Embedding(ROWS, 5, padding_idx=0)), IDS),
    "embedding_gemma": (
        lambda: Only(Gemma3TextScaledWordEmbedding(ROWS, 5, padding_idx=0, embed_scale=5**0.5)),
        IDS,
    ),
    "embedding_bart": (lambda: Only(BartScaledWordEmbedding(ROWS, 5, padding_idx=0, embed_scale=3.0)), IDS),
    "mha": (lambda: Attending(nn.MultiheadAttention(8, 2)), SEQUENCE),
    "mha_batch_first": (lambda: Attending(nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCE),
    "mha_no_bias": (lambda: Attending(nn.MultiheadAttention(8, 2, bias=False, batch_first=True)), SEQUENCE),
    "encoder_layer": (lambda: Only(_encoder_layer()), SEQUENCE),
    "encoder_layer_linear": (lambda: Only(_encoder_layer()), SEQUENCE),
    "encoder_stack_padded": (lambda: Padded(nn.TransformerEncoder(_encoder_layer(), 2)), SEQUENCE),
    "experts": (lambda: Only(Bank()), FLOATS),
    "experts_transposed": (lambda: Only(Bank(is_transposed=True)), FLOATS),
    "experts_two": (lambda: Only(Bank(two=True)), FLOATS),
    "layer_norm": (lambda: Only(_norm(nn.LayerNorm(6))), FLOATS),
    "batch_norm": (lambda: Only(_norm(nn.BatchNorm2d(6))), IMAGE),
    "rms_norm": (lambda: Only(_norm(nn.RMSNorm(6))), FLOATS),
    "matrix": (lambda: Only(Bilinear()), FLOATS),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a model in eval mode, the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        model = MODELS[name][0]()
    return model.to(dtype).eval()


def inputs_of(name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Return an input of a model: numbers, or token ids with the padding token 0 among them."""
    generator, shape = torch.Generator().manual_seed(seed), MODELS[name][1]
    if shape is IDS:
        ids = torch.randint(0, ROWS, shape, generator=generator)
        ids[:, 0], ids[:, 1] = 0, 4
        return ids
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def conv_delta(groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (B[out, r/groups, 1...], A[r, in, *k]) -> the dense weight [out, in, *k] of one after the other."""

    def delta(b: Tensor, a: Tensor) -> Tensor:
        ups, downs = b.flatten(1).chunk(groups), a.chunk(groups)
        return torch.cat(
            [torch.einsum("oj,ji...->oi...", up, down) for up, down in zip(ups, downs, strict=True)]
        )

    return delta


def expert_delta(transposed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (B[out, r * experts], A[experts * r, in]) -> one product for each expert; PEFT keeps the expert last in B."""

    def delta(b: Tensor, a: Tensor) -> Tensor:
        ups, downs = b.unflatten(1, (RANK, 3)), a.unflatten(0, (3, RANK))
        products: Any = [ups[:, :, e] @ downs[e] for e in range(3)]
        return torch.stack([p.mT for p in products] if transposed else products)

    return delta
