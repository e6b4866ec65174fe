"""The cases of the law: methods x kinds of layers x dtypes, and the adapted weight written down a second time, in float64.

Nothing here asks Inlay for mathematics: a ``Spot`` says in the layer's own layout what ``B A`` is, a ``MethodCase`` says
what the adapted weight is, and ``law_reference`` runs the bare model with those weights. A new method is one more line in
``METHODS`` (and its formula), a new kind one more line in ``KINDS``; every test of the law then covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from inlay import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    ReftConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from law_models import MODELS, RANK, build, conv_delta, expert_delta, inputs_of

ALPHA = 5
VERA_SEED = 5
TOKENS = [1, 4]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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
        base: the bare model's own (W, b), which the reference fills in.
        largest: largest number of rows and of columns of a case's matrices W[out, in], which the reference fills in.
        padding: the token that an embedding keeps as it is, which the reference fills in.
    """

    layer: str = "layer"
    path: str = "layer"
    param: str = "weight"
    bias: str = "bias"
    delta: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    out_axes: tuple[int, ...] = (0,)
    token_axis: int = 0
    groups: int = 1
    base: Any = None
    largest: tuple[int, int] = (0, 0)
    padding: int | None = None

    def size(self, w: Tensor) -> tuple[int, int]:
        """Return the rows and columns of the matrix W[out, in] that a parameter is (of one group, of one expert)."""
        out = w.shape[self.out_axes[-1]]
        experts = w.shape[0] if len(self.out_axes) > 1 else 1
        return out, w.numel() // (out * experts)


@dataclass(frozen=True)
class KindCase:
    """A model with adapted layers of one kind; ``where`` are the fields of the configuration that name them."""

    name: str
    spots: tuple[Spot, ...] = (Spot(),)
    where: tuple[tuple[str, Any], ...] = (("target_modules", ["layer"]),)
    lora_bias: bool = True
    tokens: bool = False
    sub_batches: bool = True
    norm: bool = False

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
    mergeable: bool = True

    def can_name(self, kind: KindCase) -> bool:
        """Whether the configuration has the fields to name the layers of a kind."""
        return {f.name for f in fields(self.config(target_modules=["layer"]))} >= dict(kind.where).keys()

    def fits(self, kind: KindCase) -> bool:
        """Whether the method works on a kind and its configuration can say so."""
        return self.applies(kind) and self.can_name(kind)

    def on(self, kind: KindCase, **settings: Any) -> PeftConfig:
        """Return the configuration for a kind."""
        return self.config(**dict(kind.where), **settings)


def lora(scale: float) -> Formula:
    """W' = W + s B A, b' = b + s bias of B."""

    def formula(
        spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
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


def ia3(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = diag(l) W, b' = l b."""
    gain = p["ia3_l"].flatten()
    shape = [len(gain) if axis in spot.out_axes else 1 for axis in range(w.dim())]
    return w * gain.reshape(shape), None if b is None else b * gain


def ia3_inputs(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W diag(l)."""
    axis = 1 if spot.out_axes == (0,) else 0
    return w * p["ia3_l"].reshape([-1 if i == axis else 1 for i in range(w.dim())]), b


def bitfit(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """b' = b + d."""
    return w, p["bitfit_bias"] if b is None else b + p["bitfit_bias"]


def ln_tuning(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + (v - W0), b' = b + (c - b0)."""
    w0, b0 = spot.base
    return w + (p["ln_tuning_layers.weight"] - w0), None if b is None else b + (
        p["ln_tuning_layers.bias"] - b0
    )


def adalora(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + s B diag(E) A as matrices: of a convolution each group for itself, of experts each expert."""
    delta = p["lora_B"] @ (p["lora_E"] * p["lora_A"])
    return _added(spot, w, ALPHA / (RANK + 1e-5) * delta), b


def vera(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + diag(b) B diag(d) A, with parts of a pair that is drawn for the largest layer."""
    generator = torch.Generator().manual_seed(VERA_SEED)
    rows, columns = spot.largest
    down = (2 * torch.rand(RANK, columns, generator=generator) - 1) * math.sqrt(6 / columns)
    up = (2 * torch.rand(rows, RANK, generator=generator) - 1) * math.sqrt(6 / RANK)
    if spot.padding is not None:
        down[:, spot.padding] = 0
    gain_b, gain_d = p["vera_lambda_b"], p["vera_lambda_d"]
    native = w[:, : w.shape[1] // spot.groups] if spot.groups > 1 else w
    rows, columns = spot.size(native)
    scaled_up = gain_b[..., :, None] * up[:rows].double() * gain_d[..., None, :]
    return _added(spot, w, scaled_up @ down[:, :columns].double()), b


def loha(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + s (A1 B1) * (A2 B2), each with a factor for a convolution's kernel."""
    products = [_with_core(p.get(f"hada_t{n}"), p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]) for n in (1, 2)]
    return _added(spot, w, ALPHA / RANK * products[0] * products[1]), b


def lokr(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + s (C kron D)."""
    c = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    d = p["lokr_w2"] if "lokr_w2" in p else _with_core(p.get("lokr_t2"), p["lokr_w2_a"], p["lokr_w2_b"])
    d = d.flatten(1)
    blocks = [torch.cat([number * d for number in row], 1) for row in c]
    return _added(spot, w, 3 / 2 * torch.cat(blocks)), b


def oft(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W R^T with R = (I - Q)(I + Q)^-1, one block; of an embedding E' = E R."""
    (upper,) = next(iter(p.values()))
    size = int((1 + math.sqrt(1 + 8 * len(upper))) / 2)
    q = torch.zeros(size, size, dtype=w.dtype).masked_scatter(torch.ones(size, size).triu(1).bool(), upper)
    q = q - q.mT
    turn = (torch.eye(size) - q) @ torch.linalg.inv(torch.eye(size) + q)
    if "oft_embedding_R.weight" in p:
        return w @ turn, b
    if spot.out_axes[-1] == w.dim() - 1:
        return turn @ w, b
    return (w.flatten(1) @ torch.block_diag(*[turn.mT] * spot.groups)).reshape(w.shape), b


def _with_core(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if core is None else torch.einsum("pqk,po,qi->oik", core.flatten(2), a, b).flatten(1)


def _added(spot: Spot, w: Tensor, delta: Tensor) -> Tensor:
    """Return W with a matrix[out, in] added to it: of a convolution each group for itself."""
    if spot.groups > 1:
        delta = torch.block_diag(*delta.chunk(spot.groups))
    delta = delta.mT if spot.out_axes[-1] == w.dim() - 1 else delta
    return w + delta.reshape(w.shape)


def _factors(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in p:
        return p["lora_embedding_B"], p["lora_embedding_A"]
    return p["lora_B.weight"], p["lora_A.weight"]


def _lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": RANK, "lora_alpha": ALPHA} | settings))


def shira(spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W' = W + S, with the values in the order of the entries of W[..., out, in]."""
    native = (w.shape[0], w.shape[1] // spot.groups, *w.shape[2:])
    mask = _spread_out(native, len(p["shira_weight"]))
    turned = spot.out_axes[-1] == w.dim() - 1
    mask = mask.mT if turned else mask
    delta = torch.zeros(mask.shape, dtype=w.dtype).masked_scatter(mask, p["shira_weight"])
    delta = delta.mT if turned else delta
    if spot.groups > 1:
        delta = torch.block_diag(*delta.flatten(1).chunk(spot.groups))
    return w + delta.reshape(w.shape), b


def shira_mask(base_layer: nn.Module, r: int, parameter: str = "weight", **kwargs: Any) -> Tensor:
    """A mask of r (in + out) entries for each matrix."""
    w = getattr(base_layer, parameter)
    experts, matrix = (w.shape[0], w[0]) if w.dim() == 3 and not isinstance(base_layer, nn.Conv1d) else (1, w)
    count = r * (matrix.shape[0] + matrix[0].numel()) * experts
    return _spread_out(tuple(w.shape), count)


def _spread_out(shape: tuple[int, ...], count: int) -> Tensor:
    size = math.prod(shape)
    step = next(n for n in range(size // 3 + 2, 2 * size) if math.gcd(n, size) == 1)
    return (torch.arange(size) * step % size < count).view(shape)


def _adalora_config(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**({"init_r": RANK, "target_r": 2, "total_step": 9, "lora_alpha": ALPHA} | settings))


def _tokens_config(**settings: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=TOKENS, **settings)


def _without_a_merged_form(
    spot: Spot, w: Tensor, b: Tensor | None, p: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    raise AssertionError("there is no merged weight")


# ---------------------------------------------------------------------- one line for each method and each kind

METHODS = [
    MethodCase("lora", _lora_config, lora(ALPHA / RANK), lambda k: not k.norm, additive=True),
    MethodCase(
        "rslora",
        lambda **s: _lora_config(use_rslora=True, **s),
        lora(ALPHA / math.sqrt(RANK)),
        lambda k: not k.norm,
        additive=True,
    ),
    MethodCase(
        "lora_bias",
        lambda **s: _lora_config(lora_bias=True, **s),
        lora(ALPHA / RANK),
        lambda k: k.lora_bias and not k.norm,
        additive=True,
    ),
    MethodCase("dora", lambda **s: _lora_config(use_dora=True, **s), dora, lambda k: not k.norm),
    MethodCase("adalora", _adalora_config, adalora, lambda k: not k.norm, additive=True),
    MethodCase(
        "vera",
        lambda **s: VeraConfig(r=RANK, projection_prng_key=VERA_SEED, **s),
        vera,
        lambda k: not k.norm,
        additive=True,
    ),
    MethodCase("trainable_tokens", _tokens_config, tokens, lambda k: k.tokens),
    MethodCase(
        "shira",
        lambda **s: ShiraConfig(r=1, mask_fn=shira_mask, **s),
        shira,
        lambda k: not k.norm,
        additive=True,
    ),
    MethodCase("ia3", lambda **s: IA3Config(feedforward_modules=[], **s), ia3, lambda k: not k.norm),
    MethodCase(
        "ia3_inputs",
        lambda **s: IA3Config(feedforward_modules=".*", **s),
        ia3_inputs,
        lambda k: not k.norm,
    ),
    MethodCase("bitfit", BitFitConfig, bitfit, lambda k: all(s.bias for s in k.spots), additive=True),
    MethodCase("ln_tuning", LNTuningConfig, ln_tuning, lambda k: k.norm),
    MethodCase(
        "loha",
        lambda **s: LoHaConfig(r=RANK, alpha=ALPHA, use_effective_conv2d=True, **s),
        loha,
        lambda k: not k.norm,
        additive=True,
    ),
    MethodCase(
        "lokr",
        lambda **s: LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, **s),
        lokr,
        lambda k: not k.norm,
        additive=True,
    ),
    MethodCase(
        "oft",
        lambda **s: OFTConfig(r=1, oft_block_size=0, use_cayley_neumann=False, **s),
        oft,
        lambda k: not k.norm,
    ),
]

_LAST_AXIS = {"linear", "linear_no_bias", "gpt2_conv1d", "embedding", "embedding_bart", "mha", "mha_batch_first", "encoder_layer", "encoder_stack_padded", "layer_norm"}  # fmt: skip
"""Kinds of layer whose output has its features last."""
ON_OUTPUTS = [
    MethodCase(
        "bottleneck",
        lambda **s: BottleneckConfig(bottleneck_size=3, **s),
        _without_a_merged_form,
        lambda k: k.name in _LAST_AXIS,
        mergeable=False,
    ),
    MethodCase(
        "bottleneck_parallel",
        lambda **s: BottleneckConfig(bottleneck_size=3, parallel=True, ln_before=True, ln_after=True, **s),
        _without_a_merged_form,
        lambda k: k.name in _LAST_AXIS and "embedding" not in k.name,
        mergeable=False,
    ),
    MethodCase(
        "reft",
        lambda **s: ReftConfig(r=2, prefix_positions=1, suffix_positions=1, dropout=0.0, **s),
        _without_a_merged_form,
        lambda k: k.name in _LAST_AXIS - {"mha"},  # whose rows come second
        mergeable=False,
    ),
]
"""Methods that act on a layer's output by a function of their own: they have a life, but no merged layer to be held to."""

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
    KindCase(
        "encoder_layer_linear", _ENCODER[2:], _modules("linear1", "linear2"), tokens=True, sub_batches=False
    ),
    KindCase("encoder_stack_padded", _STACK, _modules("self_attn", "linear1", "linear2"), sub_batches=False),
    KindCase("experts", (_EXPERTS,), _parameters("layer.up"), lora_bias=False, sub_batches=False),
    KindCase("experts_transposed", (_TURNED,), _parameters("layer.up"), lora_bias=False, sub_batches=False),
    KindCase("experts_two", _TWO, _parameters("layer.up", "layer.down"), lora_bias=False, sub_batches=False),
    KindCase("layer_norm", norm=True),
    KindCase("batch_norm", norm=True, sub_batches=False),
    KindCase("rms_norm", (Spot(bias=""),), norm=True),
    KindCase(
        "matrix",
        (Spot(param="matrix", bias=""),),
        _parameters("layer.matrix"),
        lora_bias=False,
        sub_batches=False,
    ),
]
assert {kind.name for kind in KINDS} == set(MODELS)

SCALE_ONLY = {"rslora"}
"""Methods that differ from another in one number; one kind of layer is enough for them."""
PAIRS = [
    (m, k) for m in METHODS for k in KINDS if m.fits(k) and (m.name not in SCALE_ONLY or k.name == "linear")
]
LIVES = PAIRS + [(m, k) for m in ON_OUTPUTS for k in KINDS if m.fits(k)]
LIFE_IDS = [f"{method.name}-{kind.name}" for method, kind in LIVES]
REFUSED = [(m, k) for m in METHODS for k in KINDS if not m.applies(k) and m.can_name(k)]
PAIR_IDS = [f"{method.name}-{kind.name}" for method, kind in PAIRS]
