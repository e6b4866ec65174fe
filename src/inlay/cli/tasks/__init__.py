"""What a model can be adapted to do. A task is one small file; its class is found by the name on the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Task

FILES = {
    "text-classification": "text_classification",
    "token-classification": "token_classification",
    "causal-lm": "causal_lm",
    "seq2seq": "seq2seq",
    "image-classification": "image_classification",
}


def task_class(name: str) -> type[Task]:
    """Return a task's class."""
    found: type[Task] = importlib.import_module(f"{__name__}.{FILES[name]}").TheTask
    return found
