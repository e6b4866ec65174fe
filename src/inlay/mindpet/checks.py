"""What the layers ask of their arguments and inputs. Every message names the argument, its value, and what is allowed.

Each function takes the layer's name and the arguments by theirs: ``positive("LoRADense", lora_rank=lora_rank)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def positive(layer: str, **sizes: Any) -> None:
    """Check widths, ranks and counts.

    Raises:
        TypeError: a size is no int; a bool is none.
        ValueError: a size is below one.
    """
    for argument, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{layer}: {argument} must be an int of at least 1, not {size!r} ({_type(size)})")
        if size < 1:
            raise ValueError(f"{layer}: {argument}={size} must be at least 1")


def flag(layer: str, **flags: Any) -> None:
    """Check that arguments are True or False.

    Raises:
        TypeError: one is not.
    """
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{layer}: {argument} must be True or False, not {value!r} ({_type(value)})")


def probability(layer: str, **rates: Any) -> None:
    """Check dropout probabilities.

    Raises:
        TypeError: one is no number.
        ValueError: one is outside [0, 1).
    """
    for argument, rate in rates.items():
        if not isinstance(rate, (int, float)) or isinstance(rate, bool):
            raise TypeError(f"{layer}: {argument} must be a number in [0, 1), not {rate!r} ({_type(rate)})")
        if not 0 <= rate < 1:
            raise ValueError(f"{layer}: {argument}={rate} is not a probability in [0, 1)")


def scale(layer: str, **factors: Any) -> None:
    """Check numbers that multiply.

    Raises:
        TypeError: one is no number.
        ValueError: one is zero, infinite or not a number at all.
    """
    for argument, factor in factors.items():
        if not isinstance(factor, (int, float)) or isinstance(factor, bool):
            raise TypeError(
                f"{layer}: {argument} must be an int or a float, not {factor!r} ({_type(factor)})"
            )
        if factor == 0 or not math.isfinite(factor):
            raise ValueError(f"{layer}: {argument}={factor} must be finite and other than zero")


def dtype(layer: str, **dtypes: Any) -> None:
    """Check dtypes of parameters and computations.

    Raises:
        TypeError: one is none of float16, bfloat16, float32 and float64 of torch.
    """
    for argument, value in dtypes.items():
        if value not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise TypeError(f"{layer}: {argument} must be one of {allowed}, not {value!r} ({_type(value)})")


def rows(layer: str, x: Tensor, width: int) -> None:
    """Check an input x[..., width].

    Raises:
        TypeError: it holds integers, to which a result could only be truncated.
        ValueError: it is no matrix or larger, or has another width.
    """
    if not x.is_floating_point():
        raise TypeError(f"{layer}: x must be floating point, not {x.dtype}; pass x.float()")
    if x.dim() < 2:
        raise ValueError(
            f"{layer}: x must have at least 2 dimensions, not {x.dim()}; pass x.unsqueeze(0) for one row"
        )
    if x.shape[-1] != width:
        raise ValueError(
            f"{layer}: the last dimension of x must be {width}, not {x.shape[-1]} of {list(x.shape)}"
        )


def _type(value: Any) -> str:
    return type(value).__name__
