"""The layers of the MindPet toolkit in PyTorch, for people who build their own blocks.

Arguments come in MindPet's order under MindPet's names, parameters are called what they are called there, and outputs and
gradients are MindPet's. To adapt a model that exists, ``inlay.get_peft_model`` is the usual road. None of the layers freezes
anything: that is what ``inlay.freeze_delta(model, mode)`` is for.

Differences, on purpose:

- ``compute_dtype`` is float32 by default, not float16, which overflows from 65,504 on. float64 and bfloat16 work everywhere.
  Under autocast the products run in autocast's dtype; the result has the input's in any case.
- A dropout of 0, an int, is accepted. A ``lora_alpha`` that is not finite is refused.
- Inputs of integers are refused: MindPet truncates the result to integers. Adapters, too, ask for two dimensions at least.
- An unknown activation is a ``ValueError`` with a suggestion, for ``activation`` (MindPet: ``KeyError``) as for
  ``non_linearity`` (``TypeError``). Both take a ``torch.nn.Module`` or a function of a tensor as well. See ``activations``
  for three of the names.
- Initial values are names of MindSpore's, numbers, tensors, or functions such as ``torch.nn.init.ones_`` in place of its
  Initializers.
- Low-rank layers compute (x L) R; MindPet forms L R in each step, and fails on current versions of MindSpore.
- ``PrefixLayer`` trains; ``PrefixEncoder`` runs its network once instead of once per example, and takes only True or False for
  ``prefix_projection``.
- Parameters inside PyTorch's own modules have PyTorch's names: ``embedding_table`` and the ``w`` of prelu are ``weight``. The
  two tensors of indices, ``input_tokens`` and ``mindpet_delta_ptuning2_prefix``, do not exist.
- Messages name the layer, the argument, the value and what is allowed; no ``shard``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "adapter": "AdapterDense AdapterLayer",
    "lora": "LoRADense",
    "low_rank_adapter": "LowRankAdapterDense LowRankAdapterLayer",
    "prefix": "PrefixEncoder PrefixLayer",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = [*sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'inlay.mindpet' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .adapter import AdapterDense as AdapterDense
    from .adapter import AdapterLayer as AdapterLayer
    from .lora import LoRADense as LoRADense
    from .low_rank_adapter import LowRankAdapterDense as LowRankAdapterDense
    from .low_rank_adapter import LowRankAdapterLayer as LowRankAdapterLayer
    from .prefix import PrefixEncoder as PrefixEncoder
    from .prefix import PrefixLayer as PrefixLayer
