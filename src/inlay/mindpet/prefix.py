"""Trained keys and values in front of those of attention: prefix tuning, and P-Tuning v2 for all layers at once.

    PrefixLayer     prefix[P, H] = tanh(E D1' + d1) D2' + d2        E[P, embed], D1[mid, embed], D2[H, mid]
    PrefixEncoder   prefix[P, 2 L h c] = E, or the same of E        L layers, h heads of c channels, a key and a value each

Li and Liang 2021, https://arxiv.org/abs/2101.00190; Liu et al. 2021, https://arxiv.org/abs/2110.07602. Attention sees P more
positions, so neither starts as the identity. The network between is small and the same for every example: it runs once, not
once per example.

**How to set prefixes into attention.** Keys and values go in front along the axis of positions, for each example by itself,
after rotary embeddings; the mask gets P columns in front, which every query may see, for every head; positions stay as they
were::

    past_key, past_value = prefix.for_attention(batch)  # or one of PrefixEncoder's pairs
    key = torch.cat([past_key, key], dim=2)  # [batch, heads, P + T, head_dim]
    value = torch.cat([past_value, value], dim=2)
    mask = torch.cat([mask.new_ones(*mask.shape[:-1], P), mask], dim=-1)  # bool[batch, 1, T, P + T], True: may see
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)

A mask that is added to the scores gets zeros in front instead of ones. ``is_causal=True`` does not know about a prefix: give
a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks

_EMBEDDING_DEVIATION = 0.01


class PrefixLayer(nn.Module):
    """Trained keys and values for the attention of one layer: MindPet's arguments, in its order.

    It differs from MindPet's, which cannot be trained: there the prefix is computed once, when the layer is made, and stays
    what it was, with gradients of zero. Here ``forward`` computes it anew, so the embedding and the network learn, and
    dropout is applied in training. MindPet's guide puts prefixes in front of a flattened batch, where they mix examples, and
    leaves the causal mask to one head alone; the top of this file says how to do it. Key and value are one matrix by default,
    as MindPet's parameters have it; ``key_is_value=False`` gives the value its own half of the last weight.

    Parameters: ``mindpet_delta_prefixtuning_wte.weight`` [P, embed], ``mindpet_delta_prefixtuning_control_trans.0`` and ``.2``
    with ``weight`` and ``bias``. MindPet's ``input_tokens``, the numbers from 0 to P - 1, is not needed.

    Args:
        prefix_token_num: P, positions in front.
        batch_size: checked as MindPet checks it, P must be a multiple of it; without effect, 1 always fits.
        num_heads: heads that ``for_attention`` splits H into.
        hidden_dim: H, width of all heads together.
        embed_dim: width of the embedding.
        mid_dim: width of the network's hidden layer.
        dropout_rate: probability with which elements of the prefix are zeroed in training.
        key_is_value: whether key and value are one matrix.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, P is no multiple of ``batch_size``, or the probability is outside [0, 1).

    Example::

        prefix = PrefixLayer(16, 1, num_heads=12, hidden_dim=768, embed_dim=512)
        past_key, past_value = prefix.for_attention(8)  # [8, 12, 16, 64] each
    """

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: float = 0.1,
        *,
        key_is_value: bool = True,
    ) -> None:
        super().__init__()
        name = "PrefixLayer"
        checks.positive(
            name,
            prefix_token_num=prefix_token_num,
            batch_size=batch_size,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            embed_dim=embed_dim,
            mid_dim=mid_dim,
        )
        checks.probability(name, dropout_rate=dropout_rate)
        checks.flag(name, key_is_value=key_is_value)
        if prefix_token_num % batch_size:
            raise ValueError(
                f"{name}: prefix_token_num={prefix_token_num} must be a multiple of batch_size={batch_size}, as in MindPet; "
                "batch_size has no effect any more, so pass 1"
            )
        self.prefix_token_num, self.batch_size = prefix_token_num, batch_size
        self.num_heads, self.hidden_dim, self.key_is_value = num_heads, hidden_dim, key_is_value
        self.mindpet_delta_prefixtuning_wte = _embedding(prefix_token_num, embed_dim)
        self.mindpet_delta_prefixtuning_control_trans = nn.Sequential(
            nn.Linear(embed_dim, mid_dim),
            nn.Tanh(),
            nn.Linear(mid_dim, hidden_dim if key_is_value else 2 * hidden_dim),
        )
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the key and the value of the prefix, [P, hidden_dim] each; gradients flow to all parameters."""
        past = self.mindpet_delta_prefixtuning_control_trans(self.mindpet_delta_prefixtuning_wte.weight)
        past = self.dropout(past)
        if self.key_is_value:
            return past, past
        key, value = past.chunk(2, dim=-1)
        return key, value

    def for_attention(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the key and the value as views [batch_size, num_heads, P, hidden_dim / num_heads], nothing copied.

        Raises:
            TypeError: ``batch_size`` is no int.
            ValueError: ``batch_size`` is negative, or ``hidden_dim`` no multiple of ``num_heads``.
        """
        _check_batch("PrefixLayer", batch_size)
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"PrefixLayer: hidden_dim={self.hidden_dim} cannot be split into num_heads={self.num_heads}; "
                "make it a multiple, or call the layer and split its result yourself"
            )
        key, value = (
            past.unflatten(-1, (self.num_heads, -1)).transpose(0, 1).expand(batch_size, -1, -1, -1)
            for past in self()
        )
        return key, value

    @property
    def past_key(self) -> Tensor:
        """The key [P, hidden_dim], computed when asked for; in training each time with another dropout."""
        past: Tensor = self()[0]
        return past

    @property
    def past_value(self) -> Tensor:
        """The value [P, hidden_dim], computed when asked for; in training each time with another dropout."""
        past: Tensor = self()[1]
        return past

    def extra_repr(self) -> str:
        return (
            f"{self.prefix_token_num} positions, num_heads={self.num_heads}, hidden_dim={self.hidden_dim}, "
            f"key_is_value={self.key_is_value}"
        )


class PrefixEncoder(nn.Module):
    """Trained keys and values for the attention of all layers (P-Tuning v2): MindPet's arguments, in its order.

    Parameters: ``mindpet_delta_ptuning2_embedding.weight`` [P, 2 L h c] and, with ``prefix_projection``,
    ``mindpet_delta_ptuning2_dense_in`` and ``mindpet_delta_ptuning2_dense_out`` with ``weight`` and ``bias``. MindPet's
    ``mindpet_delta_ptuning2_prefix``, the numbers from 0 to P - 1, is not needed.

    Args:
        pre_seq_len: P, positions in front.
        num_layers: L, layers of the model.
        num_heads: h, heads of keys and values: with grouped queries the number of groups, not of the queries' heads.
        kv_channels: c, width of a head.
        prefix_projection: whether a network with one hidden layer stands behind the embedding.
        projection_dim: width of its hidden layer; only looked at with ``prefix_projection``.
        dropout_prob: probability with which elements of the prefixes are zeroed in training, for each example by itself.
        parallel_config: of MindSpore's; None only.
        out_perm: order in which the axes (batch, P, 2 L, h, c) are returned; 2 L must come first.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is below one, the probability is outside [0, 1), ``out_perm`` is no such order, or
            ``parallel_config`` is given.

    Example::

        encoder = PrefixEncoder(128, 28, 2, 128, False, 0, 0.1)  # GLM2-6B: 1,835,008 parameters
        for past_key, past_value in encoder(8):  # [8, 2, 128, 128] each, one pair for each of 28 layers
            ...
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool,
        projection_dim: int,
        dropout_prob: float,
        parallel_config: Any = None,
        out_perm: Sequence[int] = (2, 0, 3, 1, 4),
    ) -> None:
        super().__init__()
        name = "PrefixEncoder"
        checks.positive(
            name,
            pre_seq_len=pre_seq_len,
            num_layers=num_layers,
            num_heads=num_heads,
            kv_channels=kv_channels,
        )
        checks.flag(name, prefix_projection=prefix_projection)
        checks.probability(name, dropout_prob=dropout_prob)
        if parallel_config is not None:
            raise ValueError(
                f"{name}: parallel_config is MindSpore's and has no meaning in PyTorch; leave it at None"
            )
        if sorted(out_perm) != [0, 1, 2, 3, 4] or out_perm[0] != 2:
            raise ValueError(
                f"{name}: out_perm={out_perm!r} must be an order of 0 to 4 that begins with 2, the axis of layers"
            )
        self.pre_seq_len, self.num_layers = pre_seq_len, num_layers
        self.num_heads, self.kv_channels = num_heads, kv_channels
        self.prefix_projection, self.out_perm = prefix_projection, tuple(out_perm)
        width = 2 * num_layers * num_heads * kv_channels
        self.mindpet_delta_ptuning2_embedding = _embedding(pre_seq_len, width)
        if prefix_projection:
            checks.positive(name, projection_dim=projection_dim)
            self.mindpet_delta_ptuning2_dense_in = nn.Linear(width, projection_dim)
            self.mindpet_delta_ptuning2_dense_out = nn.Linear(projection_dim, width)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, batch_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Return for each layer one tensor [2, batch_size, heads, P, channels], key and value, in the given dtype.

        Without dropout the examples share their memory: do not write into them. (MindPet's default dtype is float16.)

        Raises:
            TypeError: ``batch_size`` is no int, or ``dtype`` not floating point.
            ValueError: ``batch_size`` is negative.
        """
        _check_batch("PrefixEncoder", batch_size)
        checks.dtype("PrefixEncoder", dtype=dtype)
        past: Tensor = self.mindpet_delta_ptuning2_embedding.weight
        if self.prefix_projection:
            past = self.mindpet_delta_ptuning2_dense_out(
                torch.tanh(self.mindpet_delta_ptuning2_dense_in(past))
            )
        past = past.to(dtype).view(self.pre_seq_len, 2 * self.num_layers, self.num_heads, self.kv_channels)
        past = self.dropout(past.expand(batch_size, -1, -1, -1, -1))
        return past.permute(self.out_perm).chunk(self.num_layers)

    def extra_repr(self) -> str:
        return (
            f"{self.pre_seq_len} positions, num_layers={self.num_layers}, num_heads={self.num_heads}, "
            f"kv_channels={self.kv_channels}"
        )


def _embedding(positions: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(positions, width)
    nn.init.normal_(embedding.weight, std=_EMBEDDING_DEVIATION)
    return embedding


def _check_batch(layer: str, batch_size: Any) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise TypeError(
            f"{layer}: batch_size must be an int, not {batch_size!r} ({type(batch_size).__name__})"
        )
    if batch_size < 0:
        raise ValueError(f"{layer}: batch_size={batch_size} must not be negative")
