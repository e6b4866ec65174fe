"""The configuration of AdaLoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import PeftType
from ...errors import PeftWarning
from ..lora import LoraConfig


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA. Fields and defaults are those of PEFT 0.21; ``r`` is not used.

    Args:
        target_r: average rank in the end.
        init_r: rank of every matrix in the beginning.
        tinit: number of steps before the first rank goes.
        tfinal: number of steps after the last one went.
        deltaT: ranks go at every deltaT-th step.
        beta1, beta2: how much of the past stays in a rank's importance and in the uncertainty of it.
        orth_reg_weight: weight of the penalty that keeps A and B near orthogonal.
        total_step: number of optimizer steps of the run.
        rank_pattern: which ranks were kept, {"path of the layer.lora_E": [init_r of bool]}; set by training.

    Raises:
        ValueError: ``total_step`` is missing, the schedule leaves no step to prune at, a number is out of range, or a field
            of LoRA is set that has no meaning here.
    """

    meaningless: ClassVar[dict[str, Any]] = {
        "use_dora": False, "use_rslora": False, "lora_bias": False, "alpha_pattern": {}, "loftq_config": {},
        "eva_config": None,
    }  # fmt: skip
    """Fields of LoRA that cannot be set, with the only value that is accepted."""

    peft_type: PeftType | str | None = PeftType.ADALORA
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, only in self.meaningless.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for AdaLoRA; leave it at {only!r}"
                )
        if isinstance(self.init_lora_weights, str):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} has no meaning for AdaLoRA; set it to True or False"
            )
        if not self.total_step or self.total_step <= 0:
            raise ValueError(
                f"AdaLoRA needs total_step, the number of optimizer steps of the run, above 0; it is {self.total_step}"
            )
        self._check_schedule(self.total_step)
        if self.r != 8:
            warn(
                f"r={self.r} is not used by AdaLoRA; the rank starts at init_r={self.init_r} and ends at target_r"
            )
        if self.target_r > self.init_r:
            warn(f"target_r={self.target_r} is above init_r={self.init_r}, so no rank will be pruned")

    def _check_schedule(self, total_step: int) -> None:
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight} is below 0; set it to 0 for no penalty")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be between 0 and 1")
        if self.tinit < 0 or self.tfinal < 0 or self.deltaT < 1 or min(self.init_r, self.target_r) < 1:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} must be 0 or more, deltaT={self.deltaT}, init_r={self.init_r} "
                f"and target_r={self.target_r} 1 or more"
            )
        if self.tinit >= total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the total_step={total_step} steps to prune at; "
                "decrease them or increase total_step"
            )
        if not all(isinstance(kept, list) for kept in (self.rank_pattern or {}).values()):
            raise ValueError(
                "rank_pattern of AdaLoRA says which ranks training kept, as lists of bool; choose ranks with init_r and target_r"
            )

    @property
    def last_allocation(self) -> int:
        """The step, counted from 0, after which no rank goes any more: at the latest the last one of the run."""
        return (self.total_step or 0) - max(self.tfinal, 1)


def warn(message: str) -> None:
    """Warn of something that is no error."""
    warnings.warn(message, PeftWarning, stacklevel=3)
