"""``peft.tuners.shira`` for scripts that import from there."""

from ..adapted_model import AdaptedModel as ShiraModel
from ..layers.layer import AdaptedLayer as ShiraLayer
from ..methods.shira import ShiraConfig

__all__ = ["ShiraConfig", "ShiraLayer", "ShiraModel"]
