"""What every kind of layer must say about itself, and the list of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factor = nn.Module | nn.Parameter
KindT = TypeVar("KindT", bound="type[LayerKind]")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_KINDS: list[tuple[Callable[[nn.Module, str], bool], type[LayerKind]]] = []


def layer_kind(test: Callable[[nn.Module, str], bool]) -> Callable[[KindT], KindT]:
    """Register a kind for every ``(layer, parameter name)`` for which ``test`` holds; the last registered wins."""

    def register(cls: KindT) -> KindT:
        _KINDS.insert(0, (test, cls))
        return cls

    return register


def kind_of(layer: nn.Module, param: str = "weight") -> LayerKind | None:
    """Return the geometry of a layer, or None where no kind knows it."""
    for test, cls in _KINDS:
        if test(layer, param):
            return cls(layer, param)
    return None


def supported_layers() -> str:
    """Return the names of the layers an adapter can sit on, for error messages."""
    return ", ".join(name for _, cls in reversed(_KINDS) for name in cls.layers)


class LayerKind:
    """Geometry of one layer: sizes, the canonical matrix, and how it is applied.

    Attributes:
        param: name of the adapted parameter on the layer.
        bias: name of its bias, whether or not the layer has one.
        in_features, out_features: sizes of the canonical matrix of one expert.
        direct: whether the layer is a product ``apply(x, W) + bias``, so that a delta may be added to its output.
        standard: whether its class computes that product and nothing else (a subclass may not).
        device, dtype: where the layer's numbers are; new parameters are made there.
    """

    layers: ClassVar[tuple[str, ...]] = ()
    forward: ClassVar[tuple[Any, ...]] = ()
    direct: ClassVar[bool] = True
    bias: str = "bias"
    in_features: int
    out_features: int

    def __init__(self, layer: nn.Module, param: str) -> None:
        self.param = param
        self.standard = type(layer).forward in self.forward
        self.follow(layer)

    def follow(self, layer: nn.Module) -> None:
        """Note where the layer's numbers are now, and of which dtype."""
        weight = getattr(layer, self.param)
        self.device = weight.device
        self.dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()

    def matrix(self, w: Tensor) -> Tensor:
        """Return the canonical matrix ``W[..., out, in]`` of a layer's weight, as a view."""
        return w

    def native(self, m: Tensor) -> Tensor:
        """Return the layer's weight of a canonical matrix, as a view: the inverse of ``matrix``."""
        return m

    def widen(self, m: Tensor) -> Tensor:
        """Return the matrix in the space where a low-rank product lives (differs for grouped convolutions)."""
        return m

    def adjust(self, layer: nn.Module, w: Tensor) -> None:
        """Make the layer fit a weight that is about to be set on it."""

    def spread(self, v: Tensor) -> Tensor:
        """Shape ``v[out]`` so that it broadcasts over the layer's output."""
        return v

    @property
    def by_rows(self) -> bool:
        """Whether running parts of a batch one by one gives the parts of what the whole batch gives."""
        return self.direct

    @property
    def inputs(self) -> int:
        """How many features an input has (a convolution's are its channels, each of which several columns of W read)."""
        return self.in_features

    def spread_inputs(self, v: Tensor) -> Tensor:
        """Shape ``v[inputs]`` so that it broadcasts over the layer's input."""
        return v

    def scale_inputs(self, m: Tensor, v: Tensor) -> Tensor:
        """Return the canonical matrix that reads its inputs multiplied by ``v[inputs]``: ``m diag(v)``."""
        return m * v

    def gather(self, y: Tensor) -> Tensor:
        """Sum an output-shaped tensor over everything but its features: the transpose of ``spread``."""
        return y.flatten(0, -2).sum(0)

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        """Return what the layer computes of an input with another canonical matrix and bias, rounded as the layer rounds."""
        raise TypeError(f"{type(self).__name__} has no product of its own; it runs with merged weights")

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        """Return new, uninitialised factors ``(down, up)`` of a rank-r update."""
        if up_bias and not self.bias:
            raise ValueError(
                f"lora_bias=True is not supported on the parameter {self.param}, which has no bias; leave it at False"
            )
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        down = uninitialised(nn.Linear, self.in_features, r, bias=False, **where)
        return down, uninitialised(nn.Linear, r, self.out_features, bias=up_bias, **where)

    def flat(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors' weights as plain matrices ``up[out, r]`` and ``down[r, in]``."""
        return up, down

    def add_product(self, w: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        """Return ``w + scale * up @ down`` for a canonical matrix ``w``, in one pass over it."""
        return torch.addmm(self.widen(w), *self.flat(up, down), alpha=scale)

    def product(self, up: Tensor, down: Tensor) -> Tensor:
        """Return ``up @ down`` as a canonical matrix, ``[..., out, in]``."""
        up, down = self.flat(up, down)
        return up @ down

    def through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return ``up(down(x))`` without ever forming the product."""
        return F.linear(F.linear(x, down), up)

    def through_matrices(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return what the layer's own operation makes of x with the canonical matrix ``up[out, r] @ down[r, in]``."""
        return self.through(x, down, up)


def dimensions(layer: nn.Module, param: str) -> int:
    """Return the number of axes of a layer's parameter, 0 where it has none of this name."""
    value = getattr(layer, param, None)
    return value.dim() if isinstance(value, Tensor) else 0


def uninitialised(cls: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Return a module whose parameters have memory but no values yet: a method's ``init`` gives them theirs."""
    silent = type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    module: ModuleT = silent(*args, **kwargs)
    module.__class__ = cls
    return module
