"""The positions of a model's own tokens, counted on from a prefix as PEFT counts them.

Where a module is told how many keys are cached (``past_key_values_length``: BERT and its kin, BART), it is told more; else
``position_ids`` are passed to the model; models that know distances only (T5) are served in ``sites.py``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import cached_length, named_arguments, parameters_of
from .attention import decoder_of
from .config import is_encoder_decoder

if TYPE_CHECKING:
    from .prompts import Prompts

PAST = "past_key_values_length"
TABLES = ("position_embeddings", "embed_positions", "wpe")
"""Names of embeddings that hold a learnt position each row."""
MARGIN = 2
"""Rows of such a table that some models do not use."""
OWN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
"""What tells a module how many tokens there are, where it is told."""
COUNTING = "create_position_ids_from_input_ids"


class Shift:
    """Hooks that move positions by what the prefixes that are on ask for; ``remove`` takes them out."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.prompts = prompts
        told = [m for m in decoder_of(model).modules() if PAST in parameters_of(m)]
        self.handles = [m.register_forward_pre_hook(self.in_embeddings, with_kwargs=True) for m in told]
        start = "decoder_" if is_encoder_decoder(model) else ""
        self.ids, self.inputs = (
            f"{start}position_ids",
            (f"{start}input_ids", f"{start}inputs_embeds", "labels"),
        )
        takes_ids = not told and self.ids in parameters_of(model)
        self.handles.append(
            model.register_forward_pre_hook(self.in_model if takes_ids else self.engage, with_kwargs=True)
        )
        self.handles.append(model.register_forward_hook(self.end, always_call=True))

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()

    def engage(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before each run of the model, look whether the attention still asks for prefixes."""
        self.prompts.engage()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After each run of the model, forget what its layers have shared."""
        self.prompts.forget_mask()

    def in_model(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Move the ``position_ids`` of a model that takes them."""
        self.prompts.engage()
        shift = self.prompts.shift_now()
        if not shift:
            return None
        given = named_arguments(model, args, kwargs)
        ids = given.get(self.ids)
        if ids is None:
            inputs = next((t for name in self.inputs if (t := given.get(name)) is not None), None)
            if inputs is None:
                return None  # the model itself says what it lacks
            start = cached_length(given.get("past_key_values"))
            ids = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0) + start
            check_room(model, _most(shift), inputs.shape[1])
        return (), given | {self.ids: _moved(ids, shift)}

    def in_embeddings(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Move the positions of a module that counts them itself."""
        shift = self.prompts.shift_now()
        if not shift:
            return None
        given = named_arguments(module, args, kwargs)
        mask = given.get("attention_mask")
        own = next((given[name] for name in OWN if given.get(name) is not None), None)
        if own is not None:
            check_room(module, _most(shift), own.shape[1])
        if isinstance(shift, tuple) and len(set(shift)) > 1:
            ids = given.get("position_ids")
            given["position_ids"] = _moved(_counted(module, given) if ids is None else ids, shift)
            return (), given
        by = shift[0] if isinstance(shift, tuple) else shift
        if given.get("position_ids") is not None:
            given["position_ids"] = _moved(given["position_ids"], by)
        else:
            given[PAST] = given.get(PAST, 0) + by
            if isinstance(mask, Tensor) and mask.dim() == 2:  # OPT counts what the mask shows
                given["attention_mask"] = torch.cat([mask.new_ones(len(mask), by), mask], dim=1)
        return (), given


def check_room(module: nn.Module, virtual: int, own: int) -> None:
    """Check that a table of learnt positions is long enough; on a GPU, a position beyond it ends the process's CUDA context.

    Args:
        module: the model, or the part of it that looks positions up.
        virtual: number of virtual tokens, or of positions that prefixes take.
        own: number of the input's own tokens.

    Raises:
        ValueError: it is not.
    """
    config = getattr(module, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if config is not None and (limit is None or virtual + own + MARGIN <= limit):
        return
    for path, table in module.named_modules():
        if isinstance(table, nn.Embedding) and (not path or path.rpartition(".")[2] in TABLES):
            skipped = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            room = table.num_embeddings - skipped
            if virtual + own > room:
                cut = f"cut inputs to {room - virtual} tokens, or " if virtual < room else ""
                raise ValueError(
                    f"{virtual} virtual tokens in front of {own} need {virtual + own} positions, but the model has learnt "
                    f"{room}; {cut}use fewer virtual ones (num_virtual_tokens)"
                )


def _most(shift: int | tuple[int, ...]) -> int:
    return shift if isinstance(shift, int) else max(shift)


def _moved(ids: Tensor, shift: int | tuple[int, ...]) -> Tensor:
    if isinstance(shift, int):
        moved = ids + shift
    else:
        rows = len(ids) if len(ids) > 1 else len(shift)
        moved = ids + torch.tensor(shift, device=ids.device).repeat_interleave(rows // len(shift))[:, None]
    return torch.where(ids < 0, ids, moved)  # OPT gives padding a position below 0


def _counted(module: nn.Module, given: dict[str, Any]) -> Tensor:
    """Return the positions that a module would count, without any prefix."""
    ids, past = given.get("input_ids"), given.get(PAST, 0)
    # RoBERTa counts from its padding token on, and only words: by a method of the class, or a function beside it.
    places = (module, sys.modules.get(type(module).__module__))
    counting = next((f for place in places if (f := getattr(place, COUNTING, None)) is not None), None)
    if counting is not None and ids is not None:
        return counting(ids, module.padding_idx, past)  # type: ignore[no-any-return]
    tensor = ids if ids is not None else given["inputs_embeds"]
    return torch.arange(past, past + tensor.shape[1], device=tensor.device).unsqueeze(0)
