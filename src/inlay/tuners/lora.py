"""``peft.tuners.lora`` for scripts that import from there."""

from ..adapted_model import AdaptedModel as LoraModel
from ..inits import EvaConfig, LoftQConfig
from ..layers.layer import AdaptedLayer as LoraLayer
from ..methods.lora import LoraConfig, LoraRuntimeConfig

__all__ = ["EvaConfig", "LoftQConfig", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
