"""Initial values as MindPet's arguments give them: a name of MindSpore's, a number, a tensor, or a function that fills one.

Names are taken as MindSpore takes them, whatever their case and with or without underscores. Its ``normal`` and
``truncatednormal`` have a deviation of 0.01, its ``uniform`` a bound of 0.07.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Init = str | int | float | Tensor | Callable[[Tensor], Any]

he_uniform_sqrt5 = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
"""U(-1/sqrt(in), 1/sqrt(in)) for W[out, in]: how linear layers start, in MindSpore as in PyTorch."""

_BY_NAME: dict[str, Callable[[Tensor], Any]] = {
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "normal": partial(nn.init.normal_, std=0.01),
    "truncated_normal": partial(nn.init.trunc_normal_, std=0.01, a=-0.02, b=0.02),
    "uniform": partial(nn.init.uniform_, a=-0.07, b=0.07),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "he_uniform": nn.init.kaiming_uniform_,
    "he_normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
}
_SPELT = {name.replace("_", ""): name for name in _BY_NAME} | {"zero": "zeros", "one": "ones"}


def fill(layer: str, argument: str, parameter: Tensor, init: Init) -> None:
    """Set a parameter to its initial values.

    Args:
        layer: whose argument it is, for the message.
        argument: what the argument is called there.
        parameter: what to fill; a tensor must have its shape.
        init: as the top of this file says.

    Raises:
        TypeError: it is none of these.
        ValueError: the name is unknown or does not suit the shape, or the tensor has another shape.
    """
    if isinstance(init, str):
        _fill_by_name(layer, argument, parameter, init)
    elif isinstance(init, Tensor):
        if init.shape != parameter.shape:
            raise ValueError(
                f"{layer}: the shape of {argument} must be {list(parameter.shape)}, not {list(init.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(init)
    elif isinstance(init, (int, float)) and not isinstance(init, bool):
        nn.init.constant_(parameter, init)
    elif callable(init) and not isinstance(init, type):
        with torch.no_grad():
            init(parameter)
    else:
        raise TypeError(
            f"{layer}: {argument} must be a name, a number, a tensor of shape {list(parameter.shape)} or a "
            f"function that fills one, such as torch.nn.init.ones_, not {init!r} ({type(init).__name__})"
        )


def _fill_by_name(layer: str, argument: str, parameter: Tensor, init: str) -> None:
    name = _SPELT.get(init.lower().replace("_", ""))
    if name is None:
        near = difflib.get_close_matches(init.lower(), _BY_NAME, n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{layer}: {argument}={init!r} is unknown{suggestion} (known: {', '.join(_BY_NAME)})"
        )
    try:
        _BY_NAME[name](parameter)
    except ValueError as error:
        shape = list(parameter.shape)
        raise ValueError(f"{layer}: {argument}={init!r} does not suit the shape {shape}: {error}") from error
