"""What a user did that cannot work, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the options, the data, a model or an adapter; the message is one clear line."""


def one_line(error: BaseException | str) -> str:
    """Return a message with every run of white space made one blank."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Turn an error that a library raises for bad input into a ``UserError`` that says what could not be done."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        raise UserError(f"{what}: {one_line(error)}") from error
