"""ReFT in AdapterHub's files, both ways.

There an adapter has two interventions at each block, or one where weights are tied, also where one has no position to act on:
such a one is not read, and written as zeros. The orthonormal R is kept there as PyTorch's parametrisation has it::

    R' = base Q(original)       base[d, d] orthogonal, Q[d, r] a product of r reflections, signs by the diagonal of original[r, d]

It is read as R, and written with base's first r columns R' and an ``original`` that stands for the identity, which is how a fresh
one starts there. DiReFT's setting is lost in AdapterHub's files, which it reads as NoReFT; as NoReFT with W + R in place of W it
computes the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError, PeftWarning
from ..injection.walk import Place
from ..methods.reft import FIRST, LAST, columns_of, orthonormal
from ..methods.reft.config import ReftConfig
from .folder import Entry, other_than
from .paths import own_path

SAME_NAME = (
    "layers", "prefix_positions", "suffix_positions", "r", "orthogonality", "tied_weights", "dropout", "non_linearity",
)  # fmt: skip
"""Fields that mean the same under the same name."""
SUBTRACT = "subtract_projection"
FIXED = {"dtype": None, "output_reft": True}
ONLY_THERE = {"init_weights_seed": None}
HOLDER = ".reft_layer"
LINEAR = ("learned_source.weight", "learned_source.bias")
PLAIN, ORIGINAL, BASE = (
    f"projection.{name}"
    for name in ("weight", "parametrizations.weight.original", "parametrizations.weight.0.base")
)


def convert(
    told: Mapping[str, Any], entries: Sequence[Entry], known: Mapping[str, Place]
) -> tuple[ReftConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors by the keys of Inlay's files.

    Raises:
        ValueError: a field has a value that Inlay does not know.
        AdapterFileError: the model has no place for a tensor, or a part is missing.
    """
    unknown = sorted(told.keys() - {*SAME_NAME, SUBTRACT, *FIXED, *ONLY_THERE, "architecture"})
    wrong = other_than(told, FIXED)
    if unknown or wrong:
        raise ValueError(f"a ReFT of AdapterHub with {wrong or unknown} cannot be read by Inlay")
    if not told["orthogonality"] and SUBTRACT not in told:
        warnings.warn(
            "AdapterHub's files do not tell DiReFT from NoReFT; this one is read as NoReFT, as AdapterHub itself reads it. If it "
            f'was trained as DiReFT, add "{SUBTRACT}": false to "config" in its adapter_config.json',
            PeftWarning,
            stacklevel=2,
        )
    config = ReftConfig(
        **{name: told[name] for name in SAME_NAME if name in told},
        subtract_projection=told.get(SUBTRACT, True),
    )
    parts: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        unit, _, name = entry.rest.removeprefix("units.").partition(".")
        column = units_of(config).get(int(unit) if unit.isdigit() else -1, "")
        if column:
            block = own_path(entry.at.removesuffix(HOLDER), known)
            parts.setdefault(f"base_model.model.{block}.{column}", {})[name] = entry.tensor
    tensors: dict[str, Tensor] = {}
    for key, found in parts.items():
        lacking = {*LINEAR, *((ORIGINAL, BASE) if config.orthogonality else (PLAIN,))} - found.keys()
        if lacking:
            raise AdapterFileError(f"{key} lacks {sorted(lacking)}")
        tensors |= {f"{key}.{name}": found[name] for name in LINEAR}
        tensors[f"{key}.{PLAIN}"] = (
            parametrised(found[ORIGINAL], found[BASE]) if config.orthogonality else found[PLAIN]
        )
    return config, tensors


def units_of(config: ReftConfig) -> dict[int, str]:
    """Return which of AdapterHub's interventions is which column; those that act nowhere are left out."""
    columns = columns_of(config)
    if config.tied_weights:
        return {0: columns[0]}
    return {number: name for number, name in enumerate((FIRST, LAST)) if name in columns}


def parametrised(original: Tensor, base: Tensor) -> Tensor:
    """Return R[r, d] of PyTorch's orthogonal parametrisation.

    Raises:
        ValueError: r = d, where PyTorch has another form.
    """
    if original.shape[0] >= original.shape[1]:
        raise ValueError(
            f"an orthogonal R of AdapterHub with r={original.shape[0]} directions of {original.shape[1]} cannot be read by "
            "Inlay; it reads those with fewer"
        )
    free = original.mT.to(torch.promote_types(original.dtype, torch.float32))
    reflections = free.tril(-1)
    lengths = 2.0 / (1.0 + reflections.square().sum(0))
    turned = torch.linalg.householder_product(reflections, lengths) * free.diagonal().int()
    r: Tensor = (base.to(free.dtype) @ turned).mT
    return r.contiguous()


# ---------------------------------------------------------------------- writing


def fields_for(config: ReftConfig) -> dict[str, Any]:
    """Return AdapterHub's fields of a configuration.

    Raises:
        ValueError: AdapterHub cannot say it.
    """
    beyond = [name for name in ("target_modules", "exclude_modules") if getattr(config, name)]
    if not config.subtract_projection and config.non_linearity is not None:
        beyond.append("subtract_projection=False with non_linearity")
    if not config.subtract_projection and config.orthogonality:
        beyond.append("subtract_projection=False with orthogonality")
    if beyond:
        raise ValueError(
            f"AdapterHub has no word for {', '.join(beyond)}; such a ReFT cannot be written for it"
        )
    fields = {name: getattr(config, name) for name in SAME_NAME}
    return {"architecture": "reft", **fields, **FIXED, **ONLY_THERE}


def keys_for(tensors: Mapping[str, Tensor], config: ReftConfig, name: str) -> dict[str, Tensor]:
    """Return the tensors by AdapterHub's keys.

    Args:
        tensors: by the keys of Inlay's files.
        config: the configuration.
        name: the adapter's name, which is part of the keys.
    """
    blocks = dict.fromkeys(key.removeprefix("base_model.model.").partition(".reft_")[0] for key in tensors)
    units, renamed = units_of(config), dict[str, Tensor]()
    for block in blocks:
        at = f"{block}{HOLDER}.refts.{name}.units"
        for number in range(1 if config.tied_weights else 2):
            column = units.get(number)
            some = next(iter(units.values()))
            own = {
                part: tensors[f"base_model.model.{block}.{column or some}.{part}"]
                for part in (*LINEAR, PLAIN)
            }
            if column is None:
                own = {part: torch.zeros_like(tensor) for part, tensor in own.items()}
                own[PLAIN].fill_diagonal_(1)
            renamed |= {f"{at}.{number}.{part}": tensor for part, tensor in _written(own, config).items()}
    return renamed


def _written(own: dict[str, Tensor], config: ReftConfig) -> dict[str, Tensor]:
    weight, bias, free = (own[part] for part in (*LINEAR, PLAIN))
    if not config.subtract_projection:
        return {LINEAR[0]: weight + free, LINEAR[1]: bias, PLAIN: free}
    if not config.orthogonality:
        return own
    r = orthonormal(free)
    whole, _ = torch.linalg.qr(r.mT, mode="complete")
    base = torch.cat([r.mT, whole[:, len(r) :]], dim=1).to(free.dtype)
    return {
        LINEAR[0]: weight,
        LINEAR[1]: bias,
        ORIGINAL: -torch.eye(*r.shape, dtype=free.dtype),
        BASE: base.contiguous(),
    }
