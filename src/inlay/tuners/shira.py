"""``peft.tuners.shira`` for scripts that import from there."""

from ..adapted_model import AdaptedModel as ShiraModel
from ..layer import AdaptedLayer as ShiraLayer
from ..methods.shira import ShiraConfig

__all__ = ["ShiraConfig", "ShiraLayer", "ShiraModel"]
