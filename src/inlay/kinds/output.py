"""The output of any module: a place for adapters that act on what a module computes, not on a weight of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.sequence import Outer, Surroundings
from ..layers.taps import Head, SubLayer, first_argument
from .base import LayerKind, kind_of, layer_kind


@layer_kind(lambda m, p: p == "output")
class Output(LayerKind):
    """What a module puts out: a tensor ``y[..., out]``, or the first element of a tuple, list or mapping.

    There is no weight, so there is nothing to merge into, and no quantised store to know.

    Args:
        layer: the module.
        param: "output".
        like: another module that has the width, the device and the dtype of the output, for modules without parameters.
        width: size of the output's last axis, where it cannot be read from the modules.
        sublayer: where the residual and the normalisation of a sub-layer of a transformer hang; None for the module alone,
            whose first input is then taken for the residual.
        index: number of the block in its model, for settings that differ by layer.
    """

    layers = ()
    direct = False
    bias = ""

    def __init__(
        self,
        layer: nn.Module,
        param: str = "output",
        *,
        like: nn.Module | None = None,
        width: int | None = None,
        sublayer: SubLayer | None = None,
        index: int | None = None,
    ) -> None:
        self.sublayer, self.index, self.standard = sublayer, index, False
        self.argument = first_argument(layer)
        self.param = param if sublayer is None else f"{param} of a sub-layer"
        if isinstance(layer, nn.modules.conv._ConvNd):
            raise ValueError(
                f"a {type(layer).__name__} puts out its channels first, and an adapter on an output works on the last axis; "
                "choose linear layers or whole blocks"
            )
        self.like = source = like if like is not None else layer
        self.follow(layer)
        found = (width, width) if width is not None else _widths(source)
        if found is None:
            raise ValueError(
                f"cannot tell how wide the output of a {type(layer).__name__} is; say it with hidden_size, or adapt the linear "
                "layer before it"
            )
        self.in_features, self.out_features = found
        if sublayer is not None:  # the residual is as wide as what is added to it
            self.in_features = self.out_features

    def follow(self, layer: nn.Module) -> None:
        tensors = (*self.like.parameters(), *self.like.buffers())
        tensor = next((t for t in tensors if t.is_floating_point()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self.dtype = torch.get_default_dtype() if tensor is None else tensor.dtype

    @property
    def by_rows(self) -> bool:
        return True


class Embedded(Output):
    """What the embeddings of a model put out, ``e[..., d]``: a place for adapters that are undone in front of its head.

    Args:
        layer: the module.
        like: another module that has the width, the device and the dtype of the embeddings.
        head: where the head hangs; None where there is none, or where another layer's adapters know it.
        width: d, where ``like`` does not show it.
    """

    def __init__(
        self, layer: nn.Module, *, like: nn.Module, head: Head | None, width: int | None = None
    ) -> None:
        super().__init__(layer, "output as embeddings", like=like, width=width)
        self.head, self.in_features = head, self.out_features


class Positioned(Output):
    """What a block puts out, ``y[rows, positions, d]``: a place for adapters that ask where in its sequence a position is.

    Args:
        layer: the module.
        around: the modules around it, from the outermost one on.
        like: another module that has the width, the device and the dtype of the output.
        width: d, where it cannot be read from the modules.
        index: number of the block in its model.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        around: Sequence[Outer],
        like: nn.Module | None = None,
        width: int | None = None,
        index: int | None = None,
    ) -> None:
        beside = (m for outer in around for m in outer.module._modules.values())
        if any(
            isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in (*layer.modules(), *beside)
        ):
            raise ValueError(
                "an adapter of single positions needs outputs [rows, positions, d]; build the attention with batch_first=True"
            )
        super().__init__(layer, "output by position", like=like, width=width, index=index)
        self.surroundings = Surroundings(layer, around)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the sizes of a module's first input and of its output: its own, its configuration's, or its last layer's."""
    own = own_widths(module)
    if own is not None:
        return own
    for source in (module, getattr(module, "config", None)):
        for name in ("hidden_size", "embed_dim"):
            if isinstance(size := getattr(source, name, None), int):
                return size, size
    inner = [found for m in module.modules() if m is not module and (found := own_widths(m)) is not None]
    return (inner[0][0], inner[-1][1]) if inner else None


def own_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the sizes of input and output that a single layer's weight shows; None for modules that are no single layer."""
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    weight: Any = getattr(module, "weight", None)
    kind = kind_of(module) if isinstance(weight, Tensor) and weight.dim() in (1, 2) else None
    if kind is None:
        return None
    return (kind.out_features if weight.dim() == 1 else kind.in_features), kind.out_features
