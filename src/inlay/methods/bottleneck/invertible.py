"""Invertible adapters: a coupling behind the embeddings, undone in front of the language model's head.

MAD-X, Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052; NICE, Dinh et al. 2015, https://arxiv.org/abs/1410.8516.

    forward     o1 = e1 + F(e2)      o2 = e2 + G(o1)      e = [e1, e2], the embeddings e[..., d]; o = [o1, o2]
    inverse     e2 = o2 - G(o1)      e1 = o1 - F(e2)      at the input of the head, with the same F and G
    F(x) = W_2 act(W_1 x + b_1) + b_2                     W_1[b, d/2], W_2[d/2, b]; G likewise

The embeddings are taken where they are complete: positions, normalisation and dropout included where a module of its own puts
them out. With W_2 and b_2 at zero the coupling and its inverse are the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...injection.targets import embedding_ends
from ...injection.walk import Place, Site, unwrapped
from ...kinds import Norm, kind_of
from ...kinds.output import Embedded, own_widths
from ...layers.extras import ModulesToSaveWrapper, find_saved
from ...layers.taps import Head, Hung, first_argument
from ...method import Column, Slot
from .activations import activation
from .block import initialise, linear

WHOLE = "embeddings"
"""The name of a module that puts out complete embeddings: BERT's, DistilBERT's, ViT's."""
LAST_BESIDE = ("drop", "emb_dropout", "word_embeddings_layernorm")
"""Names of the last module that embeddings go through, beside the token embedding: GPT-2's and GPT-J's, GPT-NeoX's, BLOOM's."""


# ---------------------------------------------------------------------- where


def embedding_sites(config: Any, model: nn.Module, known: Mapping[str, Place]) -> list[Site]:
    """Return the places behind a model's embeddings: one, or one for each module that embeds with the same weight.

    The first keeps the parameters and knows the language model's head, where there is one.

    Raises:
        ValueError: the model does not tell its embeddings, or its head cannot be reached or has another width.
    """
    embedding, head = embedding_ends(model)
    if embedding is None:
        raise ValueError(
            f"inv_adapter={config.inv_adapter!r} sits behind the embeddings, and {type(model).__name__} does not tell them: it "
            "has no get_input_embeddings(), or it refuses; leave inv_adapter at None"
        )
    bare = unwrapped(embedding)[0]
    out = None if head is None else _head(config, unwrapped(head)[0], known)
    sites: list[Site] = []
    for place in _embedding_places(bare, known):
        end = _end(place, known)
        like, width = _like(end, place, getattr(model, "config", None))
        kind = Embedded(end.module, like=like, head=None if sites else out, width=width)
        sites.append(Site(end, kind))
    read = None if head is None else own_widths(unwrapped(head)[0])
    if read is not None and read[0] != sites[0].kind.out_features:
        raise ValueError(
            f"inv_adapter={config.inv_adapter!r} is undone in front of the head, which reads {read[0]} features, but the "
            f"embeddings are {sites[0].kind.out_features} wide; leave inv_adapter at None for this model"
        )
    return sites


def _embedding_places(embedding: nn.Module, known: Mapping[str, Place]) -> Iterator[Place]:
    """Yield the place of the input embedding, and of those that share its weight, as in T5's encoder and decoder."""
    weight = embedding._parameters.get("weight")
    for place in known.values():
        twin = isinstance(place.module, nn.Embedding) and place.module._parameters.get("weight") is weight
        if place.module is embedding or (weight is not None and twin):
            yield place


def _end(place: Place, known: Mapping[str, Place]) -> Place:
    """Return the module that puts out complete embeddings, given the one that looks up tokens."""
    parent = place.path.rpartition(".")[0]
    if parent.rpartition(".")[2] == WHOLE:
        return known[parent]
    beside = (f"{parent}.{name}" if parent else name for name in LAST_BESIDE)
    return next((known[path] for path in beside if path in known), place)


def _like(end: Place, embedding: Place, config: Any) -> tuple[nn.Module, int | None]:
    """Return a module that is made as complete embeddings are, and their width where that module does not show it."""
    if end.path.rpartition(".")[2] != WHOLE:
        return embedding.module, None
    norm = next((m for m in end.module.children() if isinstance(kind_of(m), Norm)), None)
    return (end.module, getattr(config, "hidden_size", None)) if norm is None else (norm, None)


def _head(config: Any, module: nn.Module, known: Mapping[str, Place]) -> Head:
    place = next(place for place in known.values() if place.module is module)
    saved = find_saved(known, getattr(config, "modules_to_save", None) or ())
    saved += [path for path, p in known.items() if isinstance(p.wrapper, ModulesToSaveWrapper)]
    if outer := [path for path in saved if place.path.startswith(f"{path}.")]:
        raise ValueError(
            f"inv_adapter={config.inv_adapter!r} is undone in front of {place.path}, which is inside {outer[0]}, a module that "
            f"is saved whole; name {place.path} itself in modules_to_save"
        )
    return Head(Hung(*place.parents[0]), first_argument(module))


# ---------------------------------------------------------------------- what


def new_coupling(kind: Embedded, config: Any, path: str) -> dict[str, Column]:
    """Return F and G as the columns of a layer, without values.

    Raises:
        ValueError: the embeddings cannot be divided into halves.
    """
    width, half = kind.out_features, kind.out_features // 2
    if width % 2:
        raise ValueError(
            f"inv_adapter={config.inv_adapter!r} halves the embeddings, but {path} puts out {width} features"
        )
    size = max(1, int(half // config.inv_adapter_reduction_factor))
    where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
    return {
        f"invertible_{name}": nn.ModuleDict(
            {
                "0": nn.Linear(half, size, **where),
                "2": nn.Linear(size, half, **where),
            }  # the names in AdapterHub's files
        )
        for name in "FG"
    }


def initialise_coupling(slot: Slot, start_at_zero: bool) -> None:
    """Give F and G their values: the zero maps, or small normal numbers as AdapterHub's, whatever else the adapter starts as."""
    how: Any = slot.config
    for column in slot.columns:
        initialise(slot[column]["0"], how.init_weights if start_at_zero else "bert", False)
        initialise(slot[column]["2"], "bert", start_at_zero)


# ---------------------------------------------------------------------- running


def couple(slot: Slot, e: Tensor) -> Tensor:
    """Return o[..., d] for embeddings e[..., d]."""
    e1, e2 = e.chunk(2, -1)
    o1 = e1 + _half(slot, "F", e2)
    return torch.cat((o1, e2 + _half(slot, "G", o1)), -1)


def uncouple(slot: Slot, o: Tensor) -> Tensor:
    """Return e[..., d] for o[..., d]."""
    o1, o2 = o.chunk(2, -1)
    e2 = o2 - _half(slot, "G", o1)
    return torch.cat((o1 - _half(slot, "F", e2), e2), -1)


def _half(slot: Slot, name: str, x: Tensor) -> Tensor:
    layers = (slot.shared or slot)[f"invertible_{name}"]
    act = activation(slot.config.non_linearity)  # type: ignore[attr-defined]
    return linear(layers["2"], act(linear(layers["0"], x)))
