"""AdapterDrop: train with a random number of the lowest blocks left without adapters. Rücklé et al. 2021, arXiv 2010.11918.

Before each optimizer step a number n from 0 to ``max_layers`` is drawn, and the adapters of the first n blocks do nothing in that
step. An adapter trained so loses little when some lower blocks go without at inference:
``set_adapter("a", skip_layers=range(5))``.
What is skipped costs nothing, and what lies below the lowest adapter needs no backward pass.

The number depends on the seed and the step alone, so it is the same on all devices, and in a run that is resumed.
The authors' code: https://github.com/Adapter-Hub/efficient-task-transfer
"""

from __future__ import annotations

import random
from typing import Any

from transformers.trainer_callback import TrainerCallback

from .adapter_step import adapted_model


class AdapterDropCallback(TrainerCallback):
    """Callback of transformers' Trainer: ``Trainer(..., callbacks=[AdapterDropCallback(max_layers=11)])``.

    Evaluation during the run is done with all blocks that the model had before. A loop of one's own calls
    ``model.set_adapter("a", skip_layers=range(callback.number(step)))`` before each step. Under DistributedDataParallel the
    run needs ``ddp_find_unused_parameters=True``.

    Args:
        max_layers: the largest number of blocks that is drawn.
        seed: two runs with the same seed draw the same numbers.

    Raises:
        ValueError: ``max_layers`` is below 1; or, when training starts, not below the number of blocks with adapters.
    """

    def __init__(self, max_layers: int, seed: int = 0) -> None:
        if not isinstance(max_layers, int) or isinstance(max_layers, bool) or max_layers < 1:
            raise ValueError(f"max_layers must be a whole number of 1 or more, not {max_layers!r}")
        self.max_layers, self.seed = max_layers, seed
        self.before: frozenset[int] = frozenset()

    def number(self, step: int) -> int:
        """Return how many blocks an optimizer step leaves out, from 0 to ``max_layers``.

        Args:
            step: number of optimizer steps before this one.
        """
        return random.Random(f"{self.seed}:{step}").randint(0, self.max_layers)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that some block is always left."""
        adapted = adapted_model(model)
        if adapted is None:
            raise ValueError("AdapterDropCallback needs a model with adapters; use get_peft_model first")
        blocks = {layer.block for layer in adapted.layers() if layer.block is not None}
        if self.max_layers > max(blocks, default=0):
            raise ValueError(
                f"max_layers={self.max_layers} would leave no block with adapters: they sit in the blocks {sorted(blocks)}"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Leave blocks out for one optimizer step and its backward pass."""
        switch = adapted_model(model).switch  # type: ignore[union-attr]
        self.before = switch.setting.skip_layers
        switch.change(skip_layers=self.before | frozenset(range(self.number(state.global_step))))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take them in again."""
        adapted_model(model).switch.change(skip_layers=self.before)  # type: ignore[union-attr]
