"""The cases of the law: methods x kinds of layers x dtypes, and the adapted weight written down a second time, in float64.

Nothing here asks Inlay for mathematics: a ``Spot`` says in the layer's own layout what ``B A`` is, a ``MethodCase`` says
what the adapted weight is, and ``reference`` runs the bare model with those weights. A new method is one more line in
``METHODS`` (and its formula), a new kind one more line in ``KINDS``; every test of the law then covers it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from law_models import MODELS, RANK, build, conv_delta, expert_delta, inputs_of
from torch import Tensor, nn
from torch.func import functional_call

from inlay import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model

ALPHA = 5
TOKENS = [1, 4]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}
"""Largest deviation allowed, relative to the largest number of the reference."""


@dataclass(frozen=True)
class Spot:
    """One parameter of the bare model that a case adapts.

    Attributes:
        layer: path of the adapted layer in the adapted model, below ``base_model.model``.
        path: path of the module in the bare model.
        param, bias: names of its parameters.
        delta: (B, A) -> the product in the layout of ``param`` (grouped convolutions: of the dense weight).
        out_axes: axes of ``param`` that DoRA's length runs over.
        token_axis: axis of ``param`` whose entries belong to single tokens.
        groups: groups of a convolution.
    """

    layer: str = "layer"
    path: str = "layer"
    param: str = "weight"
    bias: str = "bias"
    delta: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    out_axes: tuple[int, ...] = (0,)
    token_axis: int = 0
    groups: int = 1


@dataclass(frozen=True)
class KindCase:
    """A model with adapted layers of one kind; ``where`` are the fields of the configuration that name them."""

    name: str
    spots: tuple[Spot, ...] = (Spot(),)
    where: tuple[tuple[str, Any], ...] = (("target_modules", ["layer"]),)
    lora_bias: bool = True
    tokens: bool = False
    sub_batches: bool = True

    @property
    def native(self) -> bool:
        """Whether PyTorch has a native kernel for the bare layer in eval mode, whose last bits differ."""
        return self.name.startswith(("mha", "encoder"))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the bare model, the same one at every call."""
        return build(self.name, dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return an input of the model; the first axis is the batch."""
        return inputs_of(self.name, dtype, seed)


Formula = Callable[[Spot, Tensor, Tensor | None, dict[str, Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class MethodCase:
    """A method's configuration and its formula ``(spot, W, b, parameters) -> (W', b')`` in the layout of the layer."""

    name: str
    config: Callable[..., PeftConfig]
    formula: Formula
    applies: Callable[[KindCase], bool] = lambda kind: True
    additive: bool = False

    def can_name(self, kind: KindCase) -> bool:
        """Whether the configuration has the fields to name the layers of a kind."""
        return {f.name for f in fields(self.config(target_modules=["layer"]))} >= dict(kind.where).keys()

    def on(self, kind: KindCase, **settings: Any) -> PeftConfig:
        """Return the configuration for a kind."""
        return self.config(**dict(kind.where), **settings)


def lora(scale: float) -> Formula:
    """W' = W + s B A, b' = b + s bias of B."""

    def formula(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        w = w + scale * spot.delta(*_factors(p))
        if (shift := p.get("lora_B.bias")) is not None:
            b = scale * shift if b is None else b + scale * shift
        return w, b

    return formula


def dora(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = m V / ||V||, V = W + s B A, the norm a constant for the gradient."""
    v = w + ALPHA / RANK * spot.delta(*_factors(p))
    rest = [axis for axis in range(v.dim()) if axis not in spot.out_axes]
    norm = v.detach().square().sum(rest, keepdim=True).sqrt()
    return p["lora_magnitude_vector.weight"].reshape(norm.shape) * v / norm, b


def tokens(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The trained rows stand in place of the rows of their tokens."""
    rows = p["trainable_tokens_delta"]
    rows = rows if spot.token_axis == 0 else rows.mT
    return w.index_copy(spot.token_axis, torch.tensor(TOKENS), rows), b


def _factors(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in p:
        return p["lora_embedding_B"], p["lora_embedding_A"]
    return p["lora_B.weight"], p["lora_A.weight"]


def _lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": RANK, "lora_alpha": ALPHA} | settings))


def _tokens_config(**settings: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=TOKENS, **settings)


# ---------------------------------------------------------------------- one line for each method and each kind

METHODS = [
    MethodCase("lora", _lora_config, lora(ALPHA / RANK), additive=True),
    MethodCase("rslora", lambda **s: _lora_config(use_rslora=True, **s), lora(ALPHA / math.sqrt(RANK)), additive=True),
    MethodCase("lora_bias", lambda **s: _lora_config(lora_bias=True, **s), lora(ALPHA / RANK), lambda k: k.lora_bias, additive=True),
    MethodCase("dora", lambda **s: _lora_config(use_dora=True, **s), dora),
    MethodCase("trainable_tokens", _tokens_config, tokens, lambda k: k.tokens),
]

_GPT2 = Spot(delta=lambda b, a: (b @ a).mT, out_axes=(1,), token_axis=1)
_CONV = Spot(delta=conv_delta(1))
_GROUPED = Spot(delta=conv_delta(2), groups=2)
_TABLE = Spot(delta=lambda b, a: (b @ a).mT, out_axes=(1,), bias="")
_IN = Spot(param="in_proj_weight", bias="in_proj_bias")
_OUT = Spot("layer.base_layer.out_proj", "layer.out_proj")
_ENCODER = (
    Spot("layer.self_attn", "layer.self_attn", "in_proj_weight", "in_proj_bias"),
    Spot("layer.self_attn.base_layer.out_proj", "layer.self_attn.out_proj"),
    Spot("layer.linear1", "layer.linear1"),
    Spot("layer.linear2", "layer.linear2"),
)
_STACK = tuple(Spot(s.layer.replace("layer", f"layer.layers.{n}", 1), s.path.replace("layer", f"layer.layers.{n}", 1), s.param, s.bias) for n in (0, 1) for s in _ENCODER)  # fmt: skip
_EXPERTS = Spot(param="up", bias="", delta=expert_delta(False), out_axes=(0, 1))
_TURNED = Spot(param="up", bias="", delta=expert_delta(True), out_axes=(0, 2))
_TWO = (
    Spot("layer.base_layer", "layer", "up", "", expert_delta(False), (0, 1)),
    Spot("layer", "layer", "down", "", expert_delta(False), (0, 1)),
)


def _modules(*names: str) -> tuple[tuple[str, Any], ...]:
    return (("target_modules", list(names)),)


def _parameters(*names: str) -> tuple[tuple[str, Any], ...]:
    return (("target_modules", []), ("target_parameters", list(names)))


KINDS = [
    KindCase("linear", tokens=True),
    KindCase("linear_no_bias", tokens=True),
    KindCase("gpt2_conv1d", (_GPT2,), tokens=True),
    KindCase("conv1d", (_CONV,)),
    KindCase("conv1d_same", (_CONV,)),
    KindCase("conv2d", (_CONV,)),
    KindCase("conv2d_stride_dilation", (_CONV,)),
    KindCase("conv2d_circular", (_CONV,)),
    KindCase("conv2d_reflect", (_CONV,)),
    KindCase("conv2d_groups", (_GROUPED,)),
    KindCase("conv3d", (_CONV,)),
    KindCase("embedding", (_TABLE,), lora_bias=False, tokens=True),
    KindCase("embedding_padding", (_TABLE,), lora_bias=False, tokens=True),
    KindCase("embedding_gemma", (_TABLE,), lora_bias=False, tokens=True),
    KindCase("embedding_bart", (_TABLE,), lora_bias=False, tokens=True),
    KindCase("mha", (_IN, _OUT), sub_batches=False),
    KindCase("mha_batch_first", (_IN, _OUT), sub_batches=False),
    KindCase("mha_no_bias", (_IN, _OUT), sub_batches=False),
    KindCase("encoder_layer", _ENCODER, _modules("self_attn", "linear1", "linear2"), sub_batches=False),
    KindCase("encoder_layer_linear", _ENCODER[2:], _modules("linear1", "linear2"), tokens=True, sub_batches=False),
    KindCase("encoder_stack_padded", _STACK, _modules("self_attn", "linear1", "linear2"), sub_batches=False),
    KindCase("experts", (_EXPERTS,), _parameters("layer.up"), lora_bias=False, sub_batches=False),
    KindCase("experts_transposed", (_TURNED,), _parameters("layer.up"), lora_bias=False, sub_batches=False),
    KindCase("experts_two", _TWO, _parameters("layer.up", "layer.down"), lora_bias=False, sub_batches=False),
    KindCase("matrix", (Spot(param="matrix", bias=""),), _parameters("layer.matrix"), lora_bias=False, sub_batches=False),
]
assert {kind.name for kind in KINDS} == set(MODELS)

SCALE_ONLY = {"rslora"}
"""Methods that differ from another in one number; one kind of layer is enough for them."""
PAIRS = [(m, k) for m in METHODS for k in KINDS if m.applies(k) and (m.name not in SCALE_ONLY or k.name == "linear")]
REFUSED = [(m, k) for m in METHODS for k in KINDS if not m.applies(k) and m.can_name(k)]
PAIR_IDS = [f"{method.name}-{kind.name}" for method, kind in PAIRS]


# ---------------------------------------------------------------------- adapted models and their references


def adapted(method: MethodCase, kind: KindCase, dtype: torch.dtype = torch.float32, trained: bool = True, **settings: Any) -> PeftModel:
    """Return a model with one adapter, "default", whose values are as after some training."""
    with seeded():
        model = get_peft_model(kind.build(dtype), method.on(kind, **settings))
    model.eval()
    if trained:
        train(model, "default")
    return model


def add(model: PeftModel, name: str, method: MethodCase, kind: KindCase, **settings: Any) -> None:
    """Add another trained adapter, which is not active."""
    with seeded():
        model.add_adapter(name, method.on(kind, **settings))
    train(model, name)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from the default generator as if it were fresh, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def train(model: nn.Module, name: str) -> None:
    """Move an adapter's parameters to where training could have left them; each name has values of its own."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for key, p in model.named_parameters():
        if name in key.split("."):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if "lora_embedding_A" in key:
                p[:, 0] = 0  # a padding token's column starts at zero and never gets a gradient


def parameters_of(model: nn.Module, spot: Spot, name: str = "default") -> dict[str, nn.Parameter]:
    """Return an adapter's parameters at a spot by column, read off their names in memory."""
    found = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        head, separator, tail = key.removeprefix("base_model.model.").rpartition(f".{name}")
        path, _, column = head.rpartition(".")
        if separator and path == spot.layer and (not tail or tail.startswith(".")):
            found[column + tail] = p
    return found


def reference(
    kind: KindCase, stack: Sequence[tuple[MethodCase, Sequence[dict[str, Tensor]]]], x: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return in float64 what the model computes with adapters in this order; each gives its parameters spot by spot."""
    bare = kind.build(dtype).double()
    tensors: dict[str, Tensor] = {}
    for index, spot in enumerate(kind.spots):
        module = bare.get_submodule(spot.path)
        w = getattr(module, spot.param).detach()
        b = getattr(module, spot.bias).detach() if spot.bias and getattr(module, spot.bias) is not None else None
        if spot.groups > 1:
            w, module.groups = torch.block_diag(*w.flatten(1).chunk(spot.groups)).unflatten(1, (-1, *w.shape[2:])), 1
        for method, parameters in stack:
            w, b = method.formula(spot, w, b, parameters[index])
        tensors[f"{spot.path}.{spot.param}"] = w
        if b is not None:
            setattr(module, spot.bias, nn.Parameter(torch.zeros_like(b)))
            tensors[f"{spot.path}.{spot.bias}"] = b
    y: Tensor = functional_call(bare, tensors, (x,))
    return y


def exact_copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return parameters as float64 leaves of their own."""
    return {key: p.detach().double().requires_grad_() for key, p in parameters.items()}


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """Fail unless two tensors agree within the tolerance of a dtype, relative to the largest number wanted."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    scale = max(float(wanted.detach().abs().max()), 1e-3)
    error = float((got.detach().double() - wanted.detach().double()).abs().max()) / scale
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e} in {dtype}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that must not change: names, identities, bytes and flags of parameters and buffers, classes of modules."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    state = {key: (id(t), t.detach().clone(), t.requires_grad) for key, t in tensors.items()}
    modules = {path: (id(m), type(m), m.training, len(m._forward_pre_hooks)) for path, m in model.named_modules(remove_duplicate=False)}
    geometry = {path: m.groups for path, m in model.named_modules() if hasattr(m, "groups")}
    return {"tensors": state, "modules": modules, "geometry": geometry, "attributes": sorted(vars(model))}


def assert_unchanged(before: dict[str, Any], model: nn.Module, flags: bool = True) -> None:
    """Fail unless a model is what it was, bit for bit (``flags=False``: whatever requires a gradient)."""
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["geometry"] == before["geometry"]
    assert after["attributes"] == before["attributes"]
    assert list(after["tensors"]) == list(before["tensors"])
    for key, (identity, value, flag) in before["tensors"].items():
        now, now_value, now_flag = after["tensors"][key]
        assert now == identity, f"{key} is another tensor"
        assert now_value.dtype == value.dtype and torch.equal(now_value, value), f"{key} has other values"
        assert not flags or now_flag == flag, f"{key}: requires_grad is {now_flag}, not {flag}"


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares nothing."""
    return copy.deepcopy(model)
