"""What transformers records of a model's blocks (``output_hidden_states=True``), where an adapter acts on a block's output.

Version 5 records by hooks on the blocks themselves, inside our wrappers, so what they saw is what the block put out. It is
replaced by what the model goes on with. Version 4 records where nothing can reach it, and shows the block's own output.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def put_on_record(own: Tensor, adapted: Tensor) -> None:
    """Replace a block's own output by the adapted one in what is being recorded, if anything is."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is None or torch.compiler.is_compiling():  # ContextVar.get cannot be traced
        return
    collector: Any = getattr(recording, "_active_collector", None)
    states = ((collector.get() if collector is not None else None) or {}).get("hidden_states")
    if states and states[-1] is own:
        states[-1] = adapted
