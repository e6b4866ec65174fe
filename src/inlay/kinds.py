"""Kinds: the geometry of the layers an adapter can sit on.

Every method does its mathematics on the canonical matrix ``W[..., out, in]``. A kind maps a layer's own weight to that
matrix and back, applies it, and builds the two factors of a low-rank update, so that ``through(x, down, up)`` is the
layer's own operation with the matrix ``product(up, down)``:

    kind         layer's weight               W[..., out, in]          down            up
    Linear       [out, in]                    as it is                 Linear(in, r)   Linear(r, out)
    Conv1D       [in, out] (GPT-2)            transposed               Linear(in, r)   Linear(r, out)
    Conv         [out, in/groups, *k]         [out, in/groups * k]     ConvNd(in, r)   ConvNd(r, out, 1, groups)
    Embedding    [num, dim]                   transposed, [dim, num]   [r, num]        [dim, r]
    InProjection [3 embed, embed]             as it is                 Linear          Linear
    Experts      [expert, out, in] (or .mT)   [expert, out, in]        Linear(in, r * experts) ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

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
        weight = getattr(layer, param)
        self.param, self.device = param, weight.device
        self.standard = type(layer).forward in self.forward
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


def _dimensions(layer: nn.Module, param: str) -> int:
    value = getattr(layer, param, None)
    return value.dim() if isinstance(value, Tensor) else 0


@layer_kind(lambda m, p: _dimensions(m, p) == 2)
class Matrix(LayerKind):
    """Any other 2-d parameter, W[out, in]; its module runs with the merged parameter."""

    layers = ("any 2-d parameter",)
    direct = False

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.out_features, self.in_features = getattr(layer, param).shape
        self.bias = ""


@layer_kind(
    lambda m, p: (
        p == "weight" and hasattr(m, "in_features") and hasattr(m, "out_features") and hasattr(m, "weight")
    )
)
class Linear(LayerKind):
    """``nn.Linear`` and everything shaped like it, quantised or not. W[out, in]."""

    layers = ("torch.nn.Linear",)
    forward = (nn.Linear.forward,)

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.in_features, self.out_features = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, m, b)


def _is_gpt2_conv1d(m: nn.Module, p: str) -> bool:
    module = sys.modules.get("transformers.pytorch_utils")
    return p == "weight" and module is not None and isinstance(m, module.Conv1D)


@layer_kind(_is_gpt2_conv1d)
class Conv1D(Linear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores W[in, out]."""

    layers = ("transformers.pytorch_utils.Conv1D",)

    def __init__(self, layer: nn.Module, param: str) -> None:
        LayerKind.__init__(self, layer, param)
        self.in_features, self.out_features = cast("Any", layer).weight.shape
        self.standard = type(layer).forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT

    def native(self, m: Tensor) -> Tensor:
        return m.mT

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ m.mT if b is None else torch.addmm(b, rows, m.mT)
        return y.view(*x.shape[:-1], -1)


@layer_kind(lambda m, p: p == "weight" and isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
class Conv(LayerKind):
    """``nn.Conv1d/2d/3d``. W[out, in/groups, *k], canonically W[out, in/groups * prod(k)].

    A low-rank update of a grouped convolution, in PEFT's file format, reads *all* input channels, so its product is the
    matrix of a dense convolution, W[out, in * prod(k)]: ``widen`` brings the base weight there, and merging makes the
    layer dense (groups = 1).
    """

    layers = ("torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d")
    forward = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
        self.function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.in_channels, self.out_features, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.padding_mode = layer.kernel_size, layer.padding_mode
        self.geometry: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        self.edges = list(layer._reversed_padding_repeated_twice)
        self.in_features = layer.in_channels // layer.groups * layer.weight.shape[2:].numel()

    def matrix(self, w: Tensor) -> Tensor:
        return w.flatten(1)

    def native(self, m: Tensor) -> Tensor:
        return m.reshape(self.out_features, -1, *self.kernel_size)

    def widen(self, m: Tensor) -> Tensor:
        return _block_diagonal(m, self.groups) if m.shape[1] == self.in_features else m

    def adjust(self, layer: nn.Module, w: Tensor) -> None:
        layer.groups = self.in_channels // w.shape[1]  # type: ignore[assignment]

    def spread(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * len(self.kernel_size))

    def gather(self, y: Tensor) -> Tensor:
        axis = y.dim() - len(self.kernel_size) - 1
        return y.movedim(axis, -1).flatten(0, -2).sum(0)

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        w = self.native(m)
        return self._convolve(x, w, self.in_channels // w.shape[1], b)

    def _convolve(self, x: Tensor, w: Tensor, groups: int, b: Tensor | None = None) -> Tensor:
        geometry = self.geometry
        if self.padding_mode != "zeros":
            x, geometry = F.pad(x, self.edges, mode=self.padding_mode), geometry | {"padding": 0}
        y: Tensor = self.function(x, w, b, **geometry, groups=groups)
        return y

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        if r % self.groups:
            raise ValueError(
                f"rank {r} is not divisible by the {self.groups} groups of a grouped convolution; choose another rank for it "
                "with rank_pattern, or leave the layer out with exclude_modules"
            )
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        geometry = self.geometry | {"padding_mode": self.padding_mode, "bias": False}
        down = uninitialised(self.conv, self.in_channels, r, self.kernel_size, **geometry, **where)
        return down, uninitialised(
            self.conv, r, self.out_features, 1, groups=self.groups, bias=up_bias, **where
        )

    def flat(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return _block_diagonal(up.flatten(1), self.groups), down.flatten(1)

    def through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        y: Tensor = self.function(self._convolve(x, down, groups=1), up, groups=self.groups)
        return y


@layer_kind(lambda m, p: p == "weight" and isinstance(m, nn.Embedding))
class Embedding(LayerKind):
    """``nn.Embedding``. W[num, dim], canonically W[dim, num]: a linear map of one-hot tokens.

    Embeddings that scale their output (``embed_scale`` of Gemma, BART and others) scale the update as well.
    """

    layers = ("torch.nn.Embedding",)
    forward = (nn.Embedding.forward,)

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        assert isinstance(layer, nn.Embedding)
        self.in_features, self.out_features = layer.num_embeddings, layer.embedding_dim
        self.lookup: dict[str, Any] = {
            "padding_idx": layer.padding_idx,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
        }
        self.layer = layer

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT

    def native(self, m: Tensor) -> Tensor:
        return m.mT

    def apply(self, x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        return self.scaled(F.embedding(x, m.mT, **self.lookup))

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        if up_bias:
            raise ValueError("lora_bias=True is not supported on an embedding layer, which has no bias")
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return nn.Parameter(torch.empty(r, self.in_features, **where)), nn.Parameter(
            torch.empty(self.out_features, r, **where)
        )

    def through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return self.scaled(F.linear(F.embedding(x, down.mT, **self.lookup), up))

    def scaled(self, y: Tensor) -> Tensor:
        """Return looked-up rows as the layer puts them out."""
        scale = getattr(self.layer, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


@layer_kind(lambda m, p: isinstance(m, nn.MultiheadAttention) and p in ("weight", "in_proj_weight"))
class InProjection(LayerKind):
    """The fused query, key and value projection of ``nn.MultiheadAttention``. W[3 embed, embed]."""

    layers = ("torch.nn.MultiheadAttention",)
    direct = False
    bias = "in_proj_bias"

    def __init__(self, layer: nn.Module, param: str) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        if layer.in_proj_weight is None:
            raise ValueError(
                f"MultiheadAttention with kdim={layer.kdim} and vdim={layer.vdim} unlike embed_dim={layer.embed_dim} keeps three "
                "separate projections; adapt them with "
                "target_parameters=['...q_proj_weight', '...k_proj_weight', '...v_proj_weight']"
            )
        super().__init__(layer, "in_proj_weight")
        self.out_features, self.in_features = layer.in_proj_weight.shape


@layer_kind(lambda m, p: p != "weight" and _dimensions(m, p) == 3)
class Experts(LayerKind):
    """A 3-d parameter with one matrix per expert: [expert, out, in], or [expert, in, out] if ``layer.is_transposed``.

    The factors are flat, as in PEFT's files: ``down[(expert r), in]`` and ``up[out, (r expert)]``, expert last.
    """

    layers = ("any 3-d parameter (experts)",)
    direct = False

    def __init__(self, layer: nn.Module, param: str) -> None:
        super().__init__(layer, param)
        self.transposed = bool(getattr(layer, "is_transposed", False))
        self.experts, rows, columns = getattr(layer, param).shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.bias = ""

    def matrix(self, w: Tensor) -> Tensor:
        return w.mT if self.transposed else w

    def native(self, m: Tensor) -> Tensor:
        return m.mT if self.transposed else m

    def factors(self, r: int, up_bias: bool = False) -> tuple[Factor, Factor]:
        return super().factors(r * self.experts, up_bias)

    def add_product(self, w: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        return torch.add(w, self.product(up, down), alpha=scale)

    def product(self, up: Tensor, down: Tensor) -> Tensor:
        a = down.reshape(self.experts, -1, self.in_features)
        b = up.reshape(self.out_features, -1, self.experts)
        return torch.einsum("ore,eri->eoi", b, a)


def uninitialised(cls: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Return a module whose parameters have memory but no values yet: a method's ``init`` gives them theirs."""
    silent = type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    module: ModuleT = silent(*args, **kwargs)
    module.__class__ = cls
    return module


def _block_diagonal(m: Tensor, groups: int) -> Tensor:
    """Return ``m[out, in]`` of a grouped map as the dense ``[out, groups * in]`` with zeros between the groups."""
    if groups == 1:
        return m
    dense: Tensor = torch.block_diag(*m.chunk(groups))  # type: ignore[no-untyped-call]
    return dense
