"""Virtual tokens in ``generate``: in front of the first step, or of every step where there is no cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import cached_length
from ..layers.positions import Prompt
from .config import is_encoder_decoder
from .inputs import embedded, later_step, prepare, put_in_front
from .positions import check_room
from .prompts import Prompts

PER_TOKEN = {"inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}
"""What ``generate`` is told of each token."""


def prepare_generation(
    prompts: Prompts, model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of ``generate`` with the virtual tokens in front of the first step.

    transformers then does the rest (caches, positions, masks, beams) as for any embedded input. What is returned to the user
    are the ids without virtual tokens.

    Raises:
        ValueError: there are no tokens to put them in front of.
    """
    if not prompts.put_tokens():
        return args, kwargs
    given = dict(kwargs)
    if args:
        given["inputs"] = args[0]
    ids = given.pop("inputs", None)
    ids = given.pop("input_ids", None) if ids is None else ids
    own = embedded(model, given | {"input_ids": ids})
    tokens = prompts.tokens(len(own), own)
    if tokens is None:
        return args, kwargs
    mask = given.get("attention_mask")
    mask = inferred_mask(model, ids, own, given) if mask is None else mask
    past = cached_length(given.get("past_key_values"))
    if isinstance(past, Tensor) or past:
        joined: dict[str, Any] = later_step(tokens, given | {"input_ids": ids, "attention_mask": mask})
        return args[1:], joined
    extended = {**given, "inputs_embeds": own, "attention_mask": mask}
    check_room(model, tokens.count, own.shape[1])
    put_in_front(tokens, own, extended, not is_encoder_decoder(model), False)
    if is_encoder_decoder(model):
        return args[1:], extended
    if bool((mask[:, 0] == 0).any()):
        padding = (mask.cumsum(dim=1) == 0).sum(dim=1)
        for name in PER_TOKEN & extended.keys():
            extended[name] = tokens.behind(padding, extended[name])
    if ids is not None:
        extended = _lengths_in_new_tokens(model, extended, ids.shape[1]) | {"input_ids": ids}
    return args[1:], extended


@contextmanager
def at_every_step(prompts: Prompts, model: nn.Module, kwargs: dict[str, Any]) -> Iterator[bool]:
    """Put the virtual tokens in front of each step of a ``generate`` without a cache, which starts anew every time.

    Yields:
        Whether that is the case.
    """
    told = kwargs.get("use_cache")
    told = getattr(kwargs.get("generation_config"), "use_cache", None) if told is None else told
    told = getattr(getattr(model, "generation_config", None), "use_cache", True) if told is None else told
    if told or is_encoder_decoder(model) or not prompts.put_tokens():
        yield False
        return
    thread = get_ident()  # others may run the same model meanwhile

    def in_front(module: nn.Module, a: Any, k: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return prepare(prompts, module, a, k) if get_ident() == thread else None

    handle = model.register_forward_pre_hook(in_front, with_kwargs=True)
    try:
        yield True
    finally:
        handle.remove()


def given_prompt(
    prompts: Prompts, model: nn.Module, args: Any, kwargs: dict[str, Any], at_each_step: bool
) -> Prompt:
    """Return what the arguments of ``generate`` say of the sequence that it goes on from.

    Args:
        prompts: the model's prompt adapters.
        model: the base model.
        args: positional arguments, as ``prepare_generation`` returns them.
        kwargs: named arguments.
        at_each_step: whether virtual tokens are put in front at each step instead, see ``at_every_step``.
    """
    given = dict(kwargs)
    if is_encoder_decoder(model):
        return Prompt(given.get("decoder_attention_mask"), None)
    ids = given.get("input_ids", args[0] if args else given.get("inputs"))
    ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
    own, mask = given.get("inputs_embeds", ids), given.get("attention_mask")
    if mask is None and ids is not None:
        mask = inferred_mask(model, ids, ids, given)
    if at_each_step and ids is not None:
        mask = prepare(prompts, model, (), {"input_ids": ids, "attention_mask": mask})[1]["attention_mask"]
    if mask is not None:
        return Prompt(mask.bool(), mask.shape[1])
    return Prompt(None, None if own is None else own.shape[1])


def inferred_mask(model: nn.Module, ids: Tensor | None, own: Tensor, given: dict[str, Any]) -> Tensor:
    """Return the mask that ``generate`` would infer from the ids: padding is left out, unless it also ends texts."""
    ones = own.new_ones(own.shape[:2], dtype=torch.long)
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    pad, end = (given.get(f"{n}_token_id", getattr(config, f"{n}_token_id", None)) for n in ("pad", "eos"))
    if ids is None or pad is None or pad in (end if isinstance(end, list) else [end]):
        return ones
    return ids.ne(pad).long()


def _lengths_in_new_tokens(model: Any, given: dict[str, Any], own: int) -> dict[str, Any]:
    """Spell out lengths as numbers of new tokens: transformers would count the virtual ones in the others."""
    given = dict(given)
    config = given.get("generation_config")
    if config is not None:
        config = given["generation_config"] = copy.deepcopy(config)
    for kind, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        told = given.pop(kind, None)
        if told is None:  # transformers 4 has 20 where nothing is set
            values = (getattr(c, kind, None) for c in (config, model.generation_config))
            told = next((v for v in values if v and (kind, v) != ("max_length", 20)), None)
        counted = (given.get(new), getattr(config, new, None), getattr(model.generation_config, new, None))
        if config is not None:
            setattr(config, kind, getattr(type(config)(), kind))
        if told is not None and all(c is None for c in counted):
            count = max(told - own, 0 if kind == "min_length" else 1)
            if config is None:
                given[new] = count
            else:  # transformers takes lengths either from a configuration or from arguments
                setattr(config, new, count)
    return given
