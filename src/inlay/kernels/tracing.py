"""Whether plain operations are wanted, in place of autograd functions and of what is kept between calls."""

from __future__ import annotations

import torch


def being_traced() -> bool:
    """Whether a compiler, which fuses plain operations itself, or a transform of ``torch.func``, which needs them, is at work."""
    return torch.compiler.is_compiling() or bool(torch._C._are_functorch_transforms_active())
