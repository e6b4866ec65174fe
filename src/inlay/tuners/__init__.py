"""Addresses from which scripts written for PEFT import the classes of adapted layers and models. There is one of each here."""

from ..adapted_model import AdaptedModel as AdaLoraModel
from ..adapted_model import AdaptedModel as LoraModel
from ..adapted_model import AdaptedModel as ShiraModel
from ..layers.layer import AdaptedLayer as LoraLayer
from ..methods.adalora.config import AdaLoraConfig
from ..methods.lora import LoraConfig
from ..methods.shira import ShiraConfig

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "ShiraConfig",
    "ShiraModel",
]
