"""Prefix tuning: train virtual keys and values in every layer. Li & Liang 2021, https://arxiv.org/abs/2101.00190.

    softmax(q [P_K; K]^T) [P_V; V]        K, V[..., heads, t, d], P_K, P_V[heads, n, d] of each layer
    P = X                                 X[n, 2 layers heads d] trained
    P = W2 tanh(W1 X + b1) + b2           with prefix_projection, X[n, heads d]; the paper's way, steadier on small data
    g_K P_K, g_V P_V                      with use_gating: g = mean_t sigmoid(w x_t + b) of what the attention reads, x[t, hidden]

On every layer of any model, encoders with a classification head too, this is P-Tuning v2 (Liu et al. 2021,
https://arxiv.org/abs/2110.07602). It does not start as the identity: the prefix takes part of the attention even where it is
zero (``init_weights="zero"``). The file holds P alone; the network of a projection stands in a second file beside it. Gates are
UniPELT's, Mao et al. 2022, https://arxiv.org/abs/2110.07577.
Authors' code: https://github.com/XiangLi1999/PrefixTuning, https://github.com/THUDM/P-tuning-v2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..blocks import open_gate, start_gate
from ..config import PeftType
from ..input_method import InputMethod
from ..kernels.tracing import being_traced
from ..prompts.config import PromptLearningConfig, settle_common, text_config
from ..prompts.encoder import PromptModule
from .field_values import check_switches, warn_of_idle


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning and P-Tuning v2.

    Args:
        prefix_projection: compute the prefix by a network of two layers.
        encoder_hidden_size: width of that network; ``token_dim`` by default.
        init_weights: None, or "zero": the prefix starts at zero.
        shift_positions: count the positions of the model's own tokens on from the prefix, as PEFT does; False leaves them as
            they are without a prefix, as AdapterHub and the papers do. PEFT cannot read the latter.
        use_gating: multiply the prefix of each layer by a learned gate between 0 and 1, the mean over the positions of a
            sequence, padding included. PEFT has no such prefix.
        shared_gating: one gate for keys and values; False gives each its own.

    Raises:
        ValueError: ``init_weights`` is unknown.
    """

    peft_type: PeftType | str | None = PeftType.PREFIX_TUNING
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None
    shift_positions: bool = True
    use_gating: bool = False
    shared_gating: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r} is unknown; it is None or 'zero'")
        check_switches(self, "prefix_projection", "shift_positions", "use_gating", "shared_gating")
        if not self.use_gating:
            warn_of_idle(self, "shared_gating", True, "use_gating=True")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.shift_positions:  # a field that PEFT does not know
            del values["shift_positions"]
        if not self.use_gating:  # nor these
            del values["use_gating"], values["shared_gating"]
        return values


class PrefixEncoder(PromptModule):
    """The virtual keys and values of one adapter, ``[n, 2 layers token_dim]``, the network that computes them, and gates.

    Args:
        config: the adapter's completed configuration.
        hidden_size: width of what the attention reads, for gates.
    """

    def __init__(self, config: PrefixTuningConfig, hidden_size: int) -> None:
        d, out = int(config.token_dim or 0), 2 * int(config.num_layers or 0) * int(config.token_dim or 0)
        projected = config.prefix_projection and not config.inference_mode
        super().__init__(int(config.num_virtual_tokens or 0), d if projected else out)
        self.width = d
        self.cuts: dict[str, Cut] = {}
        if projected:
            hidden = config.encoder_hidden_size or d
            self.transform = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, out))
        outs = 1 if config.shared_gating else 2
        count = int(config.num_layers or 0) if config.use_gating else 0
        self.gates = nn.ModuleList(nn.Linear(hidden_size, outs) for _ in range(count))
        for gate in self.gates:
            start_gate(cast("nn.Linear", gate))
        if config.init_weights == "zero":
            last = self.transform[-1] if projected else self.embedding
            for p in last.parameters():
                nn.init.zeros_(p)

    @property
    def computes(self) -> bool:
        """Whether there is a network."""
        return "transform" in self._modules

    def saved_beside(self) -> dict[str, str]:
        return {f"gates.{name}": f"prefix_gates.{name}" for name, _ in self.gates.named_parameters()}

    def encode(self, embedded: Tensor) -> Tensor:
        """Run the network, where there is one."""
        return self.transform(embedded) if self.computes else embedded

    def entry(self, index: int) -> Tensor:
        """Return one of the ``2 layers`` blocks of the prefix, ``[n, token_dim]``, computing no other."""
        if not (self.computes and self.computes_anew()):
            return self._cut("prompt", self.prompt(), 1)[index]
        last = cast("nn.Linear", self.transform[-1])
        weight, bias = self._cut("weight", last.weight, 0)[index], self._cut("bias", last.bias, 0)[index]
        return linear(self.transform[:-1](self.embedding.weight), weight, bias)

    def _cut(self, name: str, whole: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Return the ``2 layers`` blocks of a tensor.

        A cut of a parameter is kept until the parameter changes, so that its gradient is put together once, instead of every
        layer making one of the size of the whole, and adding it up. It keeps nothing of any pass through the model.
        """
        own = type(whole) is nn.Parameter and whole.requires_grad and torch.is_grad_enabled()
        if not own or being_traced():
            return torch.split(whole, self.width, dim)
        state = (whole._version, whole.data_ptr())
        kept = self.cuts.get(name)
        if kept is None or kept.whole is not whole or kept.state != state:
            kept = Cut(whole, state, torch.split(whole, self.width, dim))
            if type(kept.blocks[0]) is Tensor:  # fake ones would turn up in real runs
                self.cuts[name] = kept
        return kept.blocks

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cuts": {}}


class Cut(NamedTuple):
    """A parameter, its version and address, and the blocks it was cut into."""

    whole: Tensor
    state: tuple[int, int]
    blocks: tuple[Tensor, ...]


class PrefixTuning(InputMethod, name="PREFIX_TUNING"):
    """Virtual keys and values in every layer; see the top of this file."""

    config = PrefixTuningConfig
    splices = True

    def complete(self, config: PrefixTuningConfig, model: nn.Module) -> None:
        from ..prompts.attention import self_attentions

        told, given = text_config(model), (config.token_dim, config.num_attention_heads, config.num_layers)
        modules = self_attentions(model)
        settle_common(config, model)
        width, heads = key_shape(told)
        fitting = heads * width, heads, len(modules)
        names = ("token_dim", "num_attention_heads", "num_layers")
        for name, value, fits in zip(names, given, fitting, strict=True):
            if value not in (None, fits):
                raise ValueError(
                    f"{name}={value} does not fit {type(model).__name__}, whose {len(modules)} self-attention modules have "
                    f"{heads} key heads of {width} numbers; leave it out, or set it to {fits}"
                )
            setattr(config, name, fits)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim

    def build(self, model: nn.Module, config: PrefixTuningConfig) -> PrefixEncoder:
        return PrefixEncoder(config, hidden_size(text_config(model)))

    def prefix(self, encoder: PromptModule, config: PrefixTuningConfig, layer: int) -> tuple[Tensor, Tensor]:
        assert isinstance(encoder, PrefixEncoder)
        step = 2
        if config.num_transformer_submodules == 2:
            # PEFT cuts the entries, taken twice, into groups of four, of which the decoder's self-attention uses two.
            step = 4
        entries = (
            encoder.entry((step * layer + kind) % (2 * int(config.num_layers or 0))) for kind in (0, 1)
        )
        heads = int(config.num_attention_heads or 1)
        keys, values = (e.view(len(e), heads, -1).transpose(0, 1) for e in entries)
        return keys, values

    def gated(self, config: PrefixTuningConfig) -> bool:
        return config.use_gating

    def gates(self, encoder: PromptModule, config: PrefixTuningConfig, layer: int, x: Tensor) -> Tensor:
        assert isinstance(encoder, PrefixEncoder)
        return open_gate(cast("nn.Linear", encoder.gates[layer]), x)[:, 0].expand(-1, 2)

    def shift(self, config: PrefixTuningConfig) -> int:
        """PEFT keeps the prefix in the cache, from whose length positions are counted."""
        return int(config.num_virtual_tokens or 0) if config.shift_positions else 0


def key_shape(told: Any) -> tuple[int, int]:
    """Return the numbers of a key, and the number of key heads, of a transformers configuration."""
    names = ("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
    heads = next(int(v) for name in names if isinstance(v := getattr(told, name, None), int))
    widths = (getattr(told, "head_dim", None), getattr(told, "d_kv", None))
    width = next((int(w) for w in widths if isinstance(w, int)), hidden_size(told) // heads)
    groups = getattr(told, "num_key_value_heads", None)
    if getattr(told, "multi_query", False) and not getattr(told, "new_decoder_architecture", False):
        groups = 1  # the new architecture of Falcon repeats its keys for all heads before it keeps them
    return width, groups if isinstance(groups, int) else heads


def hidden_size(told: Any) -> int:
    """Return the width of a model's hidden states, of a transformers configuration."""
    names = ("hidden_size", "n_embd", "d_model")
    return next(int(v) for name in names if isinstance(v := getattr(told, name, None), int))
