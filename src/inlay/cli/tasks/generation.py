"""Greedy continuation of many prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..engine import Engine


def generate_texts(
    engine: Engine, tokenizer: Any, prompts: Sequence[Sequence[int]], side: str
) -> Iterator[str]:
    """Yield the generated text for each prompt, in order.

    Args:
        engine: model, batch size and longest text.
        tokenizer: turns tokens into text, and names the token that ends it.
        prompts: token ids.
        side: where to pad: ``left`` for decoders, which go on at the right; ``right`` for encoders.
    """
    model = engine.ready()
    limit = getattr(model.config, "max_position_embeddings", None) if side == "left" else None
    for start in range(0, len(prompts), engine.batch_size):
        ids, mask = _padded(prompts[start : start + engine.batch_size], tokenizer.pad_token_id, side)
        room = engine.max_new_tokens if limit is None else min(engine.max_new_tokens, limit - ids.shape[1])
        if room < 1:
            yield from [""] * len(ids)
            continue
        with engine.inference():
            written = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room,
                do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = written[:, ids.shape[1] :] if side == "left" else written
        ends = (
            tokenizer.eos_token_id is not None
        )  # without an end there is no padding, and any token may be text
        yield from (text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=ends))


def _padded(rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, span], mask[place, span] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask
