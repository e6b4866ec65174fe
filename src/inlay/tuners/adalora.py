"""``peft.tuners.adalora`` for scripts that import from there."""

from ..adapted_model import AdaptedModel as AdaLoraModel
from ..methods.adalora.config import AdaLoraConfig

__all__ = ["AdaLoraConfig", "AdaLoraModel"]
