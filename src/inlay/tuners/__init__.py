"""Addresses from which scripts written for PEFT import the classes of adapted layers and models. There is one of each here."""

from ..adapted_model import AdaptedModel as LoraModel
from ..layer import AdaptedLayer as LoraLayer
from ..methods.lora import LoraConfig

__all__ = ["LoraConfig", "LoraLayer", "LoraModel"]
