"""Ways to start LoRA's factors: functions of a slot, by the name that ``init_lora_weights`` gives them.

    True        A uniform (Kaiming), B zero: the adapted layer starts as the layer itself
    False       both random: not the identity; for tests
    "gaussian"  A normal with deviation 1 / r, B zero

The others live in their own files, one paper each, and register themselves with ``@initialisation("name")``.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ..kinds import LayerKind
    from ..method import Slot

Check = Callable[["LayerKind", Any, int, str], None]


@dataclass(frozen=True)
class Initialisation:
    """One way to start LoRA.

    Attributes:
        function: sets the values of a slot, which holds random factors already.
        check: raises ValueError where ``(kind, config, r, the layer in words)`` rule it out.
        changes_base: whether it gives the base layer another weight, which the adapter then goes with.
    """

    function: Callable[[Slot], None]
    check: Check | None
    changes_base: bool


INITS: dict[str, Initialisation] = {}


@dataclass
class LoftQConfig:
    """Settings of ``init_lora_weights="loftq"``: bits of the base (2, 4 or 8) and rounds of alternation."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (2, 4, 8):
            raise ValueError(f"loftq_bits={self.loftq_bits} is not possible; choose 2, 4 or 8")
        if self.loftq_iter < 1:
            raise ValueError(
                f"loftq_iter={self.loftq_iter} is not possible; choose 1 or more rounds of alternation"
            )


@dataclass
class EvaConfig:
    """Settings of ``init_lora_weights="eva"``; see ``inlay.initialize_lora_eva_weights``.

    Args:
        rho: rank may be redistributed up to rho * r in one layer (1.0: no redistribution).
        tau: cosine similarity at which a component counts as converged.
        use_label_mask: leave out positions whose label is ``label_mask_value``.
        label_mask_value: the label of positions to leave out.
        whiten: scale components to unit variance.
        adjust_scaling_factors: keep s what it was before ranks were redistributed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must be between 0.0 and 1.0, got {self.tau}")


def initialisation(
    name: str, check: Check | None = None, changes_base: bool = False
) -> Callable[[Callable[[Slot], None]], Callable[[Slot], None]]:
    """Register a function of a slot as a way to start LoRA; the rest is as in ``Initialisation``."""

    def register(function: Callable[[Slot], None]) -> Callable[[Slot], None]:
        INITS[name] = Initialisation(function, check, changes_base)
        return function

    return register


def base_name(name: str) -> str:
    """Return the registered name of an ``init_lora_weights`` that may carry a number (``pissa_niter_16``)."""
    return name.split("_niter_")[0]


def is_init(name: str) -> bool:
    """Whether ``init_lora_weights`` may be this string."""
    stem, _, number = name.partition("_niter_")
    return stem in INITS and (not number or (stem == "pissa" and number.isdigit()))


def changes_base(config: Any) -> bool:
    """Whether an adapter of this configuration goes with other base weights, made when it is added."""
    how = config.init_lora_weights
    return isinstance(how, str) and INITS[base_name(how)].changes_base


def check_start(kind: LayerKind, config: Any, r: int, layer: str) -> None:
    """Refuse what ``config.init_lora_weights`` cannot do on a layer.

    Args:
        kind: the layer's geometry.
        config: the adapter's configuration.
        r: its rank on this layer.
        layer: the layer in words, for the message.

    Raises:
        ValueError: it cannot.
    """
    how = config.init_lora_weights
    if isinstance(how, str) and (check := INITS[base_name(how)].check) is not None:
        check(kind, config, r, layer)


@torch.no_grad()
def start(slot: Slot) -> None:
    """Set the initial values of LoRA's factors as ``config.init_lora_weights`` says."""
    how = slot.config.init_lora_weights  # type: ignore[attr-defined]
    if "lora_A" in slot.columns:
        _start_linear(slot, how)
    else:
        down, up = slot["lora_embedding_A"], slot["lora_embedding_B"]
        nn.init.normal_(down) if how is False else nn.init.zeros_(down)
        nn.init.normal_(up)
    if isinstance(how, str):
        INITS[base_name(how)].function(slot)


def _start_linear(slot: Slot, how: bool | str) -> None:
    down, up = slot["lora_A"], slot["lora_B"]
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
    else:
        nn.init.zeros_(up.weight)
    if up.bias is not None:
        nn.init.zeros_(up.bias)


@initialisation("gaussian")
def gaussian(slot: Slot) -> None:
    """A normal with deviation 1 / r, as LoRA's authors say; an embedding's factors start as with True."""
    if "lora_A" in slot.columns:
        nn.init.normal_(slot["lora_A"].weight, std=1 / slot["r"])


for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
