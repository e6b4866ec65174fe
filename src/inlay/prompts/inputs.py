"""What a model is called with, changed so that virtual tokens stand in front. ``generate`` is in ``generation.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import IGNORED, cached_length, named_arguments, parameters_of
from .config import is_encoder_decoder, word_embedding
from .positions import check_room
from .prompts import Prompts
from .tokens import Tokens

ANSWERS = ("start_positions", "end_positions")
"""Places in the input that a question answerer is asked for: they move with it."""


def prepare(
    prompts: Prompts, model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a forward pass with the virtual tokens of the adapters that are on in front.

    Args:
        prompts: the model's prompt adapters.
        model: the base model.
        args: positional arguments.
        kwargs: named arguments.

    Returns:
        The arguments to call the base model with. Outputs that have one entry per token are longer by the virtual tokens, as
        PEFT's are; labels are extended by -100. ``start_positions`` and ``end_positions`` are moved along.

    Raises:
        ValueError: there are no tokens to put them in front of, or the attention mask is not ``[batch, tokens]``.
    """
    if not prompts.put_tokens():
        return args, kwargs
    given = named_arguments(model, args, kwargs)
    if is_encoder_decoder(model):
        return (), _with_encoder_input(prompts, model, given)
    own = embedded(model, given)
    tokens = prompts.tokens(len(own), own)
    if tokens is None:
        return args, kwargs
    past = cached_length(given.get("past_key_values"))
    if isinstance(past, Tensor) or past:
        return (), later_step(tokens, given)
    check_room(model, tokens.count, own.shape[1])
    put_in_front(tokens, own, given, _fills_left(tokens, model), "position_ids" in parameters_of(model))
    return (), given


def active_prompt(prompts: Prompts, batch_size: int) -> Any:
    """Return what the first active prompt adapter puts in front of a batch; see ``PeftModel.get_prompt``.

    Raises:
        ValueError: none is active, or it is a prefix with gates.
    """
    name = next(iter(prompts.names()), None)
    if name is None:
        raise ValueError(
            "no prompt adapter is active; get_prompt is for prompt tuning, P-tuning and prefix tuning"
        )
    config, encoder = prompts.configs[name], prompts.encoder(name)
    if not prompts.methods[name].splices:
        return encoder.prompt().unsqueeze(0).expand(batch_size, -1, -1)
    if prompts.gated(name):
        raise ValueError(
            f"the prefix {name!r} is gated by what each layer reads, so it is not known before the model runs"
        )
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(config.num_layers):
        keys, values = (t.expand(batch_size, -1, -1, -1) for t in prompts.prefix(name, layer))
        cache.update(keys, values, layer)
    return cache


def embedded(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Return the embedded input ``[batch, t, d]`` of a call: as it is given, or of its ids.

    Raises:
        ValueError: the call has neither.
    """
    embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
    if embeds is not None:
        return embeds  # type: ignore[no-any-return]
    if ids is None:
        raise ValueError("a prompt needs input_ids or inputs_embeds to stand in front of, and got neither")
    return word_embedding(model)(ids)  # type: ignore[no-any-return]


def put_in_front(
    tokens: Tokens, own: Tensor, given: dict[str, Any], fills_left: bool, takes_positions: bool
) -> None:
    """Change arguments in place: virtual tokens in front of the embeddings, and of all that goes with them."""
    settled = (lambda x: x) if fills_left else tokens.settled
    given.pop("input_ids", None)
    given.pop("cache_position", None)  # transformers 4 counts the tokens beforehand
    given["inputs_embeds"] = settled(torch.cat([tokens.embeddings, own], dim=1))
    mask = _checked_mask(given.get("attention_mask"))
    if mask is None and tokens.empty is not None:
        mask = own.new_ones(own.shape[:2], dtype=torch.long)
    if mask is not None:
        given["attention_mask"] = settled(tokens.in_front(mask, tokens.mask(mask)))
    if (kinds := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = settled(tokens.in_front(kinds))
    positions = given.get("position_ids")
    if positions is None and takes_positions and tokens.empty is not None and fills_left:
        positions = torch.arange(own.shape[1], device=own.device).unsqueeze(0)
    if positions is not None:
        given["position_ids"] = settled(tokens.positions(positions.expand(own.shape[0], -1)))
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == own.shape[:2] and not labels.is_floating_point():
        given["labels"] = settled(tokens.in_front(labels, IGNORED))
    shift = tokens.count if tokens.empty is None else tokens.count - tokens.empty
    for name in ANSWERS:
        if given.get(name) is not None:
            given[name] = given[name] + shift


def later_step(tokens: Tokens, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step whose cache holds the virtual tokens already."""
    mask, positions = _checked_mask(given.get("attention_mask")), given.get("position_ids")
    if mask is not None:
        given["attention_mask"] = tokens.in_front(mask, tokens.mask(mask))
    if positions is not None:
        given["position_ids"] = tokens.positions(positions)[:, tokens.count :]
    return given


def _with_encoder_input(prompts: Prompts, model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the virtual tokens in front of the encoder's input; the decoder has none, as in PEFT."""
    encoded, mask = given.get("encoder_outputs"), _checked_mask(given.get("attention_mask"))
    if encoded is not None:  # made with the prompt before; only the mask does not know of it
        states = encoded[0]
        tokens = prompts.tokens(len(states), states)
        if tokens is not None and mask is not None and mask.shape[1] == states.shape[1] - tokens.count:
            given["attention_mask"] = tokens.settled(tokens.in_front(mask, tokens.mask(mask)))
        return given
    own = embedded(model, given)
    tokens = prompts.tokens(len(own), own)
    if tokens is not None:
        check_room(model, tokens.count, own.shape[1])
        decoder: dict[str, Any] = {k: given.pop(k) for k in ("labels", "position_ids") if k in given}
        put_in_front(tokens, own, given, False, False)
        given |= decoder
    return given


def _checked_mask(mask: Any) -> Tensor | None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "virtual tokens need an attention_mask of shape [batch, tokens], and got "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    return mask


def _fills_left(tokens: Tokens, model: nn.Module) -> bool:
    """Whether what fills up belongs on the left: where a model reads from left to right, and its last token counts."""
    if tokens.empty is None:
        return True
    causal = any(getattr(m, "is_causal", None) is True for m in model.modules())
    return causal or bool(getattr(model, "can_generate", lambda: False)())
