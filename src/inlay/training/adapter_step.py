"""The Trainer callback that lets adapters act after each optimizer step; ``trainer.py`` adds it by itself."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from ..adapted_model import AdaptedModel
from ..errors import PeftWarning
from ..layers.layer import AdaptedLayer


def adapted_model(model: nn.Module | None) -> AdaptedModel | None:
    """Return the adapters of a model, under whatever is wrapped around it; None where it has none."""
    while model is not None and isinstance(inner := _inside(model), nn.Module):
        model = inner
    base = getattr(model, "base_model", None)
    if isinstance(base, AdaptedModel):
        return base
    injected = model is not None and any(isinstance(m, AdaptedLayer) for m in model.modules())
    return AdaptedModel(model, {}) if model is not None and injected else None


def _inside(model: nn.Module) -> Any:
    """Return what ``torch.compile`` or a parallel wrapper has inside."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return model._modules.get("_orig_mod")


class AdapterStepCallback(TrainerCallback):
    """Calls ``update_and_allocate`` after each optimizer step, while the gradients are still there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Warn where the run is too short for the schedule of an adapter."""
        adapted = adapted_model(model)
        if adapted is None:
            return
        for name in adapted.stepping_adapters():
            last = getattr(adapted.peft_config[name], "last_allocation", -1)
            if state.max_steps <= last:
                warnings.warn(
                    f"the run has {state.max_steps} optimizer steps, but adapter {name!r} goes on choosing ranks until step "
                    f"{last}, so its ranks will not be the final ones; set total_step={state.max_steps}",
                    PeftWarning,
                    stacklevel=2,
                )

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Let the adapters step. ``state.global_step`` counts the steps before this one."""
        adapted = adapted_model(model)
        if adapted is not None and adapted.stepping_adapters():
            adapted.update_and_allocate(state.global_step)
