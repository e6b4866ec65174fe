"""SHiRA's masks by the gradients of some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...injection.inject import plan, resolve
from ...kinds import LayerKind, kind_of
from ...peft_model import PeftModel
from . import ShiraConfig
from .masks import CALIBRATED, largest

Loss = Callable[[Any, Any], Tensor]


def calibrate_shira(
    model: nn.Module, config: ShiraConfig, batches: Iterable[Any], loss: Loss | None = None
) -> ShiraConfig:
    """Return a configuration whose masks are those of ``mask_type`` "grad" or "snip" for a model and some batches.

    The gradient is that of the summed losses, in eval mode. The model is left as it was; while this runs, it needs the memory
    of the gradients of the targeted weights.

    Args:
        model: the model that the configuration is for; it may carry adapters already.
        config: which layers, how many entries, and which of the two masks.
        batches: what the model takes: dictionaries of keyword arguments, tuples of positional ones, or single tensors.
        loss: ``loss(output, batch)``, 0-d; by default the ``loss`` of the output, which transformers' models compute of labels.

    Raises:
        ValueError: ``mask_type`` needs no calibration, there are no batches, an output has no loss, or a targeted weight has
            no gradient.

    Example::

        config = calibrate_shira(model, ShiraConfig(r=8, mask_type="snip"), loader)
        model = get_peft_model(model, config)
    """
    if config.mask_type not in CALIBRATED:
        raise ValueError(
            f"mask_type={config.mask_type!r} needs no calibration; choose one of {list(CALIBRATED)}"
        )
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [(place.path, place.module, param) for place, param in plan(bare, resolve(bare, config)).layers]
    weights = [cast("nn.Parameter", getattr(module, param)) for _, module, param in layers]
    masks = CalibratedMasks()
    with _only_these_learn(model, weights), torch.enable_grad():
        seen = False
        for batch in batches:
            torch.autograd.backward(_loss_of(model, batch, loss))
            seen = True
        if not seen:
            raise ValueError("there are no batches to calibrate the masks on; give at least one")
        for (path, module, param), weight in zip(layers, weights, strict=True):
            if weight.grad is None:
                raise ValueError(
                    f"no gradient has reached {path}.{param}, which the masks are for; leave it out of the targets"
                )
            kind = cast("LayerKind", kind_of(module, param))
            scores = (
                weight.grad.abs() if config.mask_type == "grad" else (weight.grad * weight.detach()).abs()
            )
            masks.add(module, kind, kind.matrix(scores), config.r)
    return replace(config, mask_fn=masks)


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    found = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model's output ({type(output).__name__}) has no loss: give batches with labels, or loss=..."
        )
    return found


@contextmanager
def _only_these_learn(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give these weights alone gradients of their own, in eval mode; everything is as before afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    grads = [(p, p.grad) for p in weights]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for p in weights:
            p.grad = None
            p.requires_grad_(True)
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


class CalibratedMasks:
    """A ``mask_fn`` that knows the masks of the layers of one model. Copies share them; pickles do not hold them."""

    def __init__(self) -> None:
        self.places: WeakKeyDictionary[nn.Module, dict[str, tuple[LayerKind, Tensor]]] = WeakKeyDictionary()

    def add(self, layer: nn.Module, kind: LayerKind, scores: Tensor, r: int) -> None:
        """Choose the entries of a layer with the largest scores[..., out, in], as many in each of its matrices."""
        count, size = r * (kind.in_features + kind.out_features), kind.in_features * kind.out_features
        matrices = scores.reshape(-1, size)
        places = torch.cat(
            [n * size + largest(matrix, min(count, size)) for n, matrix in enumerate(matrices)]
        )
        self.places.setdefault(layer, {})[kind.param] = (kind, places)

    def __call__(self, base_layer: nn.Module, r: int, parameter: str = "weight", **kwargs: Any) -> Tensor:
        """Return the mask of a layer, in the shape of its weight."""
        kind, places = self.places.get(base_layer, {}).get(parameter, (None, None))
        if kind is None or places is None:
            raise ValueError(
                f"the masks were calibrated on another model or other layers: a {type(base_layer).__name__} layer has none; "
                "call calibrate_shira with this model and the same targets"
            )
        shape = kind.matrix(getattr(base_layer, parameter)).shape
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[places] = True
        return kind.native(mask)

    def __deepcopy__(self, memo: Any) -> CalibratedMasks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (CalibratedMasks, ())
