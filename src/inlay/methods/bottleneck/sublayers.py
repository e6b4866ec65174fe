"""Where the sub-layers of transformers are: found by the names of a block's children, without a list of models.

A block is a module that holds every path of one ``Family``. For its attention and its feed-forward block the family names
three points, as paths below the block (alternatives are divided by ``|``, the first that exists is taken):

    entry    the module whose first input is the residual r
    exit     the module whose output y is what the model adds to r: the last linear layer, or the dropout or normalisation
             that comes right after it
    norm     the normalisation that the model applies to y + r; empty in models that normalise first

A model with other names is one more entry: ``register_family(Family(...))``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...kinds import Norm, kind_of
from ...kinds.output import own_widths
from ...taps import Hung, SubLayer
from ...walk import Place, unwrapped


@dataclass(frozen=True)
class Points:
    """The three points of a sub-layer, as paths below its block."""

    entry: str
    exit: str
    norm: str = ""


@dataclass(frozen=True)
class Family:
    """Blocks that are built alike.

    Args:
        name: what to call them in messages.
        attention: the points of the (self-)attention.
        feedforward: the points of the feed-forward block.
        without: a path that tells other blocks from these, which must not exist.
        flag: an attribute of the block and the value that it must have, such as ``("norm_first", True)``.
        calls_first: of the attention and its normalisation, which the block's ``forward`` names first; for families that
            differ in nothing else.
    """

    name: str
    attention: Points
    feedforward: Points
    without: str = ""
    flag: tuple[str, Any] | None = None
    calls_first: str = ""


_BART = Points("self_attn", "self_attn.out_proj", "self_attn_layer_norm")
_BART_FEEDFORWARD = Points("fc1", "fc2", "final_layer_norm")
_PRE_BART = Points("self_attn_layer_norm", "self_attn.out_proj")
_PRE_BART_FEEDFORWARD = Points("final_layer_norm", "fc2")

FAMILIES: list[Family] = [
    Family(
        "PyTorch, norm last",
        Points("self_attn", "dropout1", "norm1"),
        Points("linear1", "dropout2", "norm2"),
        without="multihead_attn",
        flag=("norm_first", False),
    ),
    Family(
        "PyTorch, norm first",
        Points("norm1", "dropout1"),
        Points("norm2", "dropout2"),
        without="multihead_attn",
        flag=("norm_first", True),
    ),
    Family(
        "BERT",
        Points("attention", "attention.output.dropout", "attention.output.LayerNorm"),
        Points("intermediate", "output.dropout", "output.LayerNorm"),
    ),
    Family("ViT", Points("layernorm_before", "attention.o_proj"), Points("layernorm_after", "mlp.fc2")),
    Family(
        "ViT before transformers 5",
        Points("layernorm_before", "attention.output.dropout"),
        Points("layernorm_after", "output.dropout"),
        without="mlp",
    ),
    Family(
        "GPT-2",
        Points("ln_1", "attn.resid_dropout|attn.attention.resid_dropout"),
        Points("ln_2|ln_1", "mlp.dropout"),
    ),
    Family(
        "Gemma 2",
        Points("input_layernorm", "post_attention_layernorm"),
        Points("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        "OLMo 2",
        Points("self_attn", "post_attention_layernorm"),
        Points("mlp", "post_feedforward_layernorm"),
        without="input_layernorm",
    ),
    Family(
        "GPT-NeoX",
        Points("input_layernorm", "post_attention_dropout"),
        Points("post_attention_layernorm", "post_mlp_dropout"),
    ),
    Family(
        "Llama",
        Points("input_layernorm", "resid_attn_dropout|self_attn.o_proj|self_attn.dense"),
        Points("post_attention_layernorm|input_layernorm", "resid_mlp_dropout|mlp.down_proj|mlp.fc2|mlp"),
        without="pre_feedforward_layernorm",
    ),
    Family(
        "T5 decoder",
        Points("layer.0.layer_norm", "layer.0.dropout"),
        Points("layer.2.layer_norm", "layer.2.dropout"),
    ),
    Family(
        "T5 encoder",
        Points("layer.0.layer_norm", "layer.0.dropout"),
        Points("layer.1.layer_norm", "layer.1.dropout"),
        without="layer.1.EncDecAttention",
    ),
    Family("OPT, norm first", _PRE_BART, _PRE_BART_FEEDFORWARD, flag=("do_layer_norm_before", True)),
    Family("OPT, norm last", _BART, _BART_FEEDFORWARD, flag=("do_layer_norm_before", False)),
    Family("BART", _BART, _BART_FEEDFORWARD, calls_first="attention"),
    Family("mBART, Whisper", _PRE_BART, _PRE_BART_FEEDFORWARD, calls_first="norm"),
    Family(
        "DistilBERT",
        Points("attention", "attention.out_lin", "sa_layer_norm"),
        Points("ffn", "ffn.dropout", "output_layer_norm"),
    ),
    Family("CLIP", Points("layer_norm1", "self_attn.out_proj"), Points("layer_norm2", "mlp.fc2")),
    Family("ModernBERT", Points("attn_norm", "attn.out_drop"), Points("mlp_norm", "mlp.Wo")),
]
"""The families that are known; the first that fits a block is taken."""


def register_family(family: Family) -> None:
    """Make another family of blocks known; it is asked before those that are there."""
    FAMILIES.insert(0, family)


@dataclass(frozen=True)
class Found:
    """A sub-layer of a model: which part of which block, and where its points are."""

    block: int
    part: str
    exit: Place
    like: nn.Module
    sublayer: SubLayer


def find_sublayers(known: Mapping[str, Place]) -> Iterator[Found]:
    """Yield the sub-layers of a model, blocks in their order, the attention before the feed-forward block.

    Args:
        known: every module of the bare model by its path.
    """
    block = 0
    for path in ("", *known):
        prefix = f"{path}." if path else ""
        family = next((f for f in FAMILIES if _fits(f, known, path, prefix)), None)
        if family is None:
            continue
        for part in ("attention", "feedforward"):
            yield _found(block, part, getattr(family, part), known, prefix)
        block += 1


def _fits(family: Family, known: Mapping[str, Place], path: str, prefix: str) -> bool:
    points = (family.attention, family.feedforward)
    for names in (name for p in points for name in (p.entry, p.exit, p.norm) if name):
        if _resolve(names, known, prefix) is None:
            return False
    if family.without and prefix + family.without in known:
        return False
    if family.flag is None and not family.calls_first:
        return True
    block = known[path].module if path else None
    if family.flag is not None:
        return bool(getattr(block, family.flag[0], None) == family.flag[1])
    return block is not None and _called_first(block, family) == family.calls_first


def _called_first(block: nn.Module, family: Family) -> str:
    """Return whether a block's ``forward`` names its attention or the normalisation before it first."""
    names = inspect.unwrap(type(block).forward).__code__.co_names
    norm, attention = "self_attn_layer_norm", family.attention.exit.partition(".")[0]
    if norm not in names or attention not in names:
        return ""
    return "norm" if names.index(norm) < names.index(attention) else "attention"


def _resolve(names: str, known: Mapping[str, Place], prefix: str) -> Place | None:
    return next((known[prefix + name] for name in names.split("|") if prefix + name in known), None)


def _found(block: int, part: str, points: Points, known: Mapping[str, Place], prefix: str) -> Found:
    entry, last = (_resolve(names, known, prefix) for names in (points.entry, points.exit))
    norm = _resolve(points.norm, known, prefix) if points.norm else None
    assert entry is not None and last is not None
    like = _like(last, norm, entry)
    sublayer = SubLayer(Hung(*entry.parents[0]), None if norm is None else Hung(*norm.parents[0]))
    return Found(block, part, last, like, sublayer)


def _like(last: Place, norm: Place | None, entry: Place) -> nn.Module:
    """Return a layer that has the width of a sub-layer's output: a norm of the residual stream, or the last layer of all."""
    siblings = [unwrapped(m)[0] for m in last.inside[-1]._modules.values() if m is not None]
    norms = [place.module for place in (norm, entry) if place is not None]
    for module in norms:
        if isinstance(kind_of(module), Norm):
            return module
    return next((m for m in (last.module, *reversed(siblings)) if own_widths(m) is not None), last.module)
