"""``peft.tuners.tuners_utils`` for scripts that import from there."""

from ..adapted_model import AdaptedModel as BaseTuner
from ..layers.layer import AdaptedLayer as BaseTunerLayer

__all__ = ["BaseTuner", "BaseTunerLayer"]
