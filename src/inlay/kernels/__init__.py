"""Autograd functions used by the fused paths of methods: pure functions of tensors."""

from .dora_linear import dora_linear
from .dora_norm import dora_norm, row_norm_squares
from .lora_linear import lora_linear

__all__ = ["dora_linear", "dora_norm", "lora_linear", "row_norm_squares"]
