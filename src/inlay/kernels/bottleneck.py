"""A bottleneck as one autograd function: h = c + gain * (narrow(norm(x) D' + b_D) U' + b_U).

    x[..., i p]  D[k, p]   x is i rows of p numbers, each of which goes through D: 1 row where D is dense, n where it is a
                           factor of Kronecker products                                                S[..., i k]
    narrow                 any function of S and of small tensors, such as an activation               M[..., o m]
    U[q, m]                M is o rows of m numbers                                                    h[..., o q]
    c[..., o q]            what is carried past the bottleneck: x itself, another tensor, or nothing
    norm                   an optional layer normalisation

Only what is wide costs memory and time here. Of wide tensors the function keeps x alone, from which it normalises again in its
backward pass, and of narrow ones S, from which it runs ``narrow`` again. Sums with c and with gradients are made by the
products themselves: one wide tensor is written in the forward pass and one in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import any_gradient, in_dtype, rows_of, scaled_product


class Norm(NamedTuple):
    """A layer normalisation over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Narrow(NamedTuple):
    """What stands between the two wide products: ``function(S, *tensors)``, which must not remember anything.

    Attributes:
        function: returns M.
        tensors: its parameters.
        derivative: ``derivative(dM, S)`` returns dS, for functions without tensors; None leaves it to autograd.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    derivative: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Form:
    """What of a call is not a tensor."""

    narrow: Callable[..., Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor] | None
    gain: float
    eps: float
    normalised: bool
    itself: bool
    """Whether x is carried past the bottleneck."""


def bottleneck(
    x: Tensor,
    carried: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    narrow: Narrow,
    up: Tensor,
    up_bias: Tensor | None,
    gain: float = 1.0,
    norm: Norm | None = None,
) -> Tensor:
    """Return ``carried + gain * (narrow(norm(x) D' + b_D) U' + b_U)``, in the dtype of x.

    ``carried`` must have the dtype of x; None is for nothing, x itself is noticed. The other tensors may be wider masters: they
    are cast, and their gradients come back in their own dtypes. It is not for autocast, ``torch.func`` or compilers.
    """
    itself = carried is x
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    form = _Form(narrow.function, narrow.derivative, gain, eps, norm is not None, itself)
    inputs: tuple[Any, ...] = (
        x,
        None if itself else carried,
        down,
        down_bias,
        up,
        up_bias,
        weight,
        bias,
        *narrow.tensors,
    )
    if not any_gradient(*inputs):
        return _values(form, *inputs)[0]
    h: Tensor = _Bottleneck.apply(form, *inputs)  # type: ignore[no-untyped-call]
    return h


def plain_bottleneck(
    form: _Form,
    x: Tensor,
    carried: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *between: Tensor,
) -> Tensor:
    """The same function in differentiable operations, for second derivatives."""
    n, rows, inner = x.numel() // max(x.shape[-1], 1), x.shape[-1] // down.shape[1], x
    if form.normalised:
        weight, bias = (None if t is None else in_dtype(t, x) for t in (weight, bias))
        inner = F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)
    s = F.linear(inner.reshape(-1, down.shape[1]), in_dtype(down, x)).reshape(n, rows * len(down))
    s = s if down_bias is None else s + in_dtype(down_bias, x)
    m = form.narrow(s, *(in_dtype(t, x) for t in between))
    width = m.shape[1] // up.shape[1] * len(up)
    out = F.linear(m.reshape(-1, up.shape[1]), in_dtype(up, x)).reshape(*x.shape[:-1], width)
    out = form.gain * (out if up_bias is None else out + in_dtype(up_bias, x))
    past = x if form.itself else carried
    return out if past is None else past + out


def _values(
    form: _Form,
    x: Tensor,
    carried: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *between: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output h, and S[n, i k]."""
    rows = rows_of(_normalised(form, x, weight, bias) if form.normalised else x)
    d, u = in_dtype(down, x), in_dtype(up, x)
    if down_bias is not None and d.shape[1] == rows.shape[1]:
        s = torch.addmm(in_dtype(down_bias, x), rows, d.T)
    else:
        s = (rows.view(-1, d.shape[1]) @ d.T).view(len(rows), rows.shape[1] // d.shape[1] * len(d))
        s = s if down_bias is None else s + in_dtype(down_bias, x)
    m = form.narrow(s, *(in_dtype(t, x) for t in between))
    width = m.shape[1] // u.shape[1] * len(u)
    m = m.reshape(-1, u.shape[1])
    past = x if form.itself else carried
    shift = None if up_bias is None else in_dtype(up_bias, x)
    if past is None:
        h = x.new_empty(*x.shape[:-1], width)
        if shift is not None:
            h.copy_(shift if form.gain == 1.0 else form.gain * shift)
        h.view(-1, u.shape[0]).addmm_(m, u.T, beta=float(shift is not None), alpha=form.gain)
        return h, s
    h = past.new_empty(past.shape)
    if shift is None:
        h.copy_(past)
    else:
        torch.add(past, shift, alpha=form.gain, out=h)
    h.view(-1, u.shape[0]).addmm_(m, u.T, alpha=form.gain)
    return h, s


def _normalised(form: _Form, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (None if t is None else in_dtype(t, x) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: _Form, x: Tensor, carried: Tensor | None, *others: Any) -> Tensor:
        h, s = _values(form, x, carried, *others)
        needed = ctx.needs_input_grad[1:]
        # A frozen bottleneck needs no x, unless its normalisation does.
        kept = x if needed[2] or (form.normalised and any(needed[i] for i in (0, 6, 7))) else None
        ctx.save_for_backward(kept, s, *others)
        ctx.form, ctx.x_shape = form, x.shape
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, s, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_differentiable(ctx.form, (x, None, *others), needed, dh)
        return None, *_grads(ctx.form, ctx.x_shape, x, s, others, needed, dh)


def _grads(
    form: _Form,
    x_shape: torch.Size,
    x: Tensor | None,
    s: Tensor,
    others: Sequence[Tensor | None],
    needed: Sequence[bool],
    dh: Tensor,
) -> list[Tensor | None]:
    """Gradients of all inputs, None where ``needed`` says so."""
    down, down_bias, up, up_bias, weight, bias, *between = others
    assert down is not None and up is not None
    grads: list[Tensor | None] = [None] * len(needed)
    dout = rows_of(dh)
    per_row, d = dout.view(-1, up.shape[0]), in_dtype(down, dout)
    dm = scaled_product(form.gain, per_row, in_dtype(up, dout))
    m, ds, grads[8:] = _through_narrow(form, s, between, needed, dm)
    if needed[4]:
        grads[4] = in_dtype(scaled_product(form.gain, per_row.T, m.reshape(-1, up.shape[1])), up)
    if needed[5] and up_bias is not None:
        grads[5] = in_dtype(form.gain * dout.sum(0), up_bias)
    grads[1] = dh if needed[1] else None
    if ds is None:
        grads[0] = dh if needed[0] and form.itself else None
        return grads
    if needed[3] and down_bias is not None:
        grads[3] = in_dtype(ds.sum(0), down_bias)
    ds = ds.reshape(-1, d.shape[0])
    if form.normalised and x is not None:
        w, b = (None if t is None else in_dtype(t, x) for t in (weight, bias))
        inner, mean, rstd = torch.native_layer_norm(x, x_shape[-1:], w, b, form.eps)
        mask = [needed[0], needed[6], needed[7]]
        given = ((ds @ d).view(x_shape), x, x_shape[-1:], mean, rstd, w, b, mask)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(*given)
        grads[0] = dx.add_(dh) if dx is not None and form.itself else dx
        grads[6], grads[7] = (
            None if g is None or t is None else in_dtype(g, t) for g, t in ((dw, weight), (db, bias))
        )
    elif needed[0]:
        dx = torch.addmm(dout.view(-1, d.shape[1]), ds, d) if form.itself else ds @ d
        grads[0] = dx.view(x_shape)
    if needed[2]:
        assert x is not None
        inner = inner if form.normalised else x
        grads[2] = in_dtype(ds.T @ rows_of(inner).view(-1, d.shape[1]), down)
    return grads


def _through_narrow(
    form: _Form, s: Tensor, between: Sequence[Tensor | None], needed: Sequence[bool], dm: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """M, the gradient of S (None where nothing needs it), and those of the narrow function's tensors."""
    wants_s = any(needed[i] for i in (0, 2, 3, 6, 7))
    if form.derivative is not None and not between:
        return form.narrow(s), form.derivative(dm, s) if wants_s else None, []
    tensors = [
        t.detach().requires_grad_(needs)
        for t, needs in zip(between, needed[8:], strict=True)
        if t is not None
    ]
    s = s.detach().requires_grad_(wants_s)
    wanted = [t for t in (s, *tensors) if t.requires_grad]
    with torch.enable_grad():
        m = form.narrow(s, *(in_dtype(t, s) for t in tensors))
    found = iter(torch.autograd.grad(m, wanted, dm.view(m.shape)) if wanted else ())
    ds = next(found) if wants_s else None
    return m.detach(), ds, [next(found) if t.requires_grad else None for t in tensors]


def _differentiable(
    form: _Form, inputs: Sequence[Tensor | None], needed: Sequence[bool], dh: Tensor
) -> list[Tensor | None]:
    """The same gradients, such that they can be differentiated themselves (create_graph=True).

    Raises:
        RuntimeError: x was not kept, because the projection down is frozen.
    """
    if inputs[0] is None:
        raise RuntimeError(
            "a second derivative through a bottleneck adapter needs its input, which is not kept while its projection down is "
            "frozen; let adapter_down require a gradient"
        )
    # Views, so that one tensor given as two inputs still gets two separate gradients.
    views: Any = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t, need in zip(views, needed, strict=True) if need and t is not None]
    h = plain_bottleneck(form, *views)
    found = iter(torch.autograd.grad(h, wanted, dh, create_graph=True) if wanted else ())
    grads = [next(found) if need and t is not None else None for t, need in zip(views, needed, strict=True)]
    grads[1] = dh if needed[1] else None  # its value is not kept: nothing depends on it
    return grads
