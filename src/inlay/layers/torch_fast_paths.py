"""PyTorch's own fast paths for transformer encoders read the weights of their modules without calling them.

An adapter inside would be passed over in eval mode. A hook on an adapted layer turns the layer's fast path off (PyTorch checks
for hooks); the encoder's packing of padded batches, which relies on that path, is turned off by its own flag.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .layer import AdaptedLayer

_FLAG = "use_nested_tensor"
_KEPT = "_inlay_use_nested_tensor"


def keep_modules_called(layer: AdaptedLayer, inside: Iterable[nn.Module]) -> None:
    """Make the encoders around an adapted layer call it instead of reading its weight."""
    for outer in inside:
        if isinstance(outer, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_do_nothing)
        if isinstance(outer, nn.TransformerEncoder) and not hasattr(outer, _KEPT):
            setattr(outer, _KEPT, getattr(outer, _FLAG, False))
            setattr(outer, _FLAG, False)


def restore_fast_paths(model: nn.Module) -> None:
    """Give the encoders that hold no adapted layer any more their packing back."""
    for module in model.modules():
        if hasattr(module, _KEPT) and not any(isinstance(inner, AdaptedLayer) for inner in module.modules()):
            setattr(module, _FLAG, getattr(module, _KEPT))
            delattr(module, _KEPT)


def _do_nothing(module: nn.Module, args: Any) -> None:
    return None
