"""Families of transformer blocks: how the children of a block are called, and where its sub-layers begin and end.

A block is a module that holds every path of one ``Family``. For its attention and its feed-forward block the family names
three points, as paths below the block (alternatives are divided by ``|``, the first that exists is taken):

    entry    the module whose first input is the residual r
    exit     the module whose output y is what the model adds to r: the last linear layer, or the dropout or normalisation
             that comes right after it
    norm     the normalisation that the model applies to y + r; empty in models that normalise first

A model with other names is one more entry: ``register_family(Family(...))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        order: two of the block's children, of which ``forward`` names this one before that; for families that differ in
            nothing else.
    """

    name: str
    attention: Points
    feedforward: Points
    without: str = ""
    flag: tuple[str, Any] | None = None
    order: tuple[str, str] | None = None


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
        "PyTorch's decoder, norm last",
        Points("self_attn", "dropout1", "norm1"),
        Points("linear1", "dropout3", "norm3"),
        flag=("norm_first", False),
    ),
    Family(
        "PyTorch's decoder, norm first",
        Points("norm1", "dropout1"),
        Points("norm3", "dropout3"),
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
        "GLM 4",
        Points("input_layernorm", "post_self_attn_layernorm"),
        Points("post_attention_layernorm", "post_mlp_layernorm"),
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
        Points("input_layernorm", "resid_attn_dropout|self_attn.o_proj|self_attn.dense|linear_attn.out_proj"),
        Points(
            "post_attention_layernorm|input_layernorm",
            "resid_mlp_dropout|mlp.down_proj|mlp.fc2|mlp|block_sparse_moe",
        ),
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
    Family("BART", _BART, _BART_FEEDFORWARD, order=("self_attn", "self_attn_layer_norm")),
    Family("mBART, Whisper", _PRE_BART, _PRE_BART_FEEDFORWARD, order=("self_attn_layer_norm", "self_attn")),
    Family(
        "DistilBERT",
        Points("attention", "attention.out_lin", "sa_layer_norm"),
        Points("ffn", "ffn.dropout", "output_layer_norm"),
    ),
    Family(
        "ALBERT",
        Points("attention", "attention.output_dropout|attention.dense", "attention.LayerNorm"),
        Points("ffn", "ffn_output", "full_layer_layer_norm"),
    ),
    Family(
        "BLOOM",
        Points("input_layernorm", "self_attention.dense"),
        Points("post_attention_layernorm", "mlp.dense_4h_to_h"),
        flag=("apply_residual_connection_post_layernorm", False),
    ),
    Family(
        "Falcon",
        Points("input_layernorm|ln_attn", "self_attention.dense"),
        Points("post_attention_layernorm|ln_mlp|input_layernorm", "mlp.dense_4h_to_h"),
        flag=("apply_residual_connection_post_layernorm", None),
    ),
    Family(
        "wav2vec 2, norm last",
        Points("attention", "dropout", "layer_norm"),
        Points("feed_forward", "feed_forward.output_dropout", "final_layer_norm"),
        order=("attention", "layer_norm"),
    ),
    Family(
        "wav2vec 2, norm first",
        Points("layer_norm", "dropout"),
        Points("final_layer_norm", "feed_forward.output_dropout"),
        order=("layer_norm", "attention"),
    ),
    Family("DINOv2", Points("norm1", "layer_scale1"), Points("norm2", "layer_scale2")),
    Family("CLIP", Points("layer_norm1", "self_attn.out_proj"), Points("layer_norm2", "mlp.fc2")),
    Family("ModernBERT", Points("attn_norm", "attn.out_drop"), Points("mlp_norm", "mlp.Wo")),
]
"""The families that are known; the first that fits a block is taken."""


def register_family(family: Family) -> None:
    """Make another family of blocks known; it is asked before those that are there."""
    FAMILIES.insert(0, family)
