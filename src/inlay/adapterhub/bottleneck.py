"""Bottleneck adapters in AdapterHub's files: fields and keys, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterFileError
from ..injection.walk import Place
from ..methods.bottleneck.config import BottleneckConfig
from ..methods.bottleneck.invertible import embedding_sites
from ..methods.bottleneck.sublayers import find_sublayers
from .folder import Entry, other_than
from .paths import exit_of, holder_of

SAME_NAME = (
    "reduction_factor", "non_linearity", "original_ln_before", "original_ln_after", "ln_before", "ln_after", "init_weights",
    "scaling", "use_gating", "residual_before_ln", "adapter_residual_before_ln", "leave_out", "dropout", "phm_layer", "phm_dim",
    "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "phm_c_init", "phm_init_range", "learn_phm",
    "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "stochastic_depth", "inv_adapter", "inv_adapter_reduction_factor",
)  # fmt: skip
"""Fields that mean the same under the same name."""
FIXED = {"cross_adapter": False, "factorized_phm_rule": False}
"""Fields that Inlay does not have, with the only value that it can read."""
ONLY_THERE = {"init_weights_seed": None, "output_adapter": True, "mh_adapter": False, "is_parallel": False}
PLACEMENTS = {(True, True): "both", (True, False): "attention", (False, True): "feedforward"}
SHARED = re.compile(r"W_(down|up)(?:_(left|right))?")


def config_of(told: Mapping[str, Any]) -> BottleneckConfig:
    """Return the configuration of AdapterHub's fields.

    Raises:
        ValueError: a field has a value that Inlay does not know.
    """
    unknown = sorted(told.keys() - {*SAME_NAME, *FIXED, *ONLY_THERE, "architecture"})
    wrong = other_than(told, FIXED)
    if unknown or wrong:
        raise ValueError(
            f"a bottleneck adapter of AdapterHub with {wrong or unknown} cannot be read by Inlay"
        )
    where = (bool(told.get("mh_adapter")), bool(told.get("output_adapter", True)))
    if where not in PLACEMENTS:
        raise ValueError("a bottleneck adapter with mh_adapter and output_adapter False sits nowhere")
    fields = {name: told[name] for name in SAME_NAME if name in told}
    if told.get("phm_layer") and fields.get("init_weights") == "houlsby":
        fields["init_weights"] = "bert"  # AdapterHub draws the factors of such layers in one way only
    return BottleneckConfig(
        placement=PLACEMENTS[where],  # type: ignore[arg-type]
        parallel=bool(told.get("is_parallel")),
        **fields,
    )


def behind_embeddings(config: BottleneckConfig, model: nn.Module, known: Mapping[str, Place]) -> str:
    """Return the module behind which an invertible adapter sits, empty where the configuration has none.

    Raises:
        ValueError: the model does not tell its embeddings, or AdapterHub puts such an adapter somewhere else.
    """
    if config.inv_adapter is None:
        return ""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "AdapterHub's invertible adapters change the embeddings of an encoder alone, Inlay's those of the decoder as well; "
            f"files of {type(model).__name__} cannot be exchanged"
        )
    return embedding_sites(config, model, known)[0].place.path


def tensors_of(
    entries: Sequence[Entry], config: BottleneckConfig, known: Mapping[str, Place], behind: str
) -> dict[str, Tensor]:
    """Return the tensors by the keys of Inlay's files.

    Args:
        entries: the tensors of the file.
        config: the configuration.
        known: every module of the bare model by its path.
        behind: the module behind which an invertible adapter sits.

    Raises:
        AdapterFileError: the model has no place for one of them.
    """
    found = list(find_sublayers(known))
    names = {(entry.at, entry.rest) for entry in entries}
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.holder == "adapters" and not _is_second_norm(entry, names):
            path = exit_of(entry.at, found)
            tensors[f"base_model.model.{path}.{_part(entry.rest)}"] = entry.tensor
    paths = [key.partition(".adapter_")[0] for key in tensors]
    first = next(
        (f"base_model.model.{f.exit.path}" for f in found if f"base_model.model.{f.exit.path}" in paths), ""
    )
    for entry in (e for e in entries if e.holder == "invertible_adapters"):
        tensors[f"base_model.model.{behind}.invertible_{entry.rest}"] = entry.tensor
    for entry in (e for e in entries if e.holder == "shared_parameters"):
        if entry.rest == "phm_rule":
            tensors[f"{first}.adapter_rule"] = entry.tensor
        elif factor := SHARED.fullmatch(entry.rest):
            side = f"_{factor[2]}" if factor[2] else ""
            tensors[f"{first}.adapter_{factor[1]}.W{side}"] = entry.tensor
        else:
            raise AdapterFileError(f"shared parameter {entry.rest!r} is not known")
    return tensors


def _is_second_norm(entry: Entry, names: set[tuple[str, str]]) -> bool:
    """Whether an entry is the normalisation before the adapter, which AdapterHub keeps under two names."""
    twin = entry.rest.replace("adapter_down.0.", "adapter_norm_before.")
    return twin != entry.rest and (entry.at, twin) in names


def _part(rest: str) -> str:
    """Return a tensor's name in Inlay's files."""
    name = re.sub(r"^adapter_down\.[01]\.", "adapter_down.", rest)
    name = re.sub(r"\.b$", ".bias", name)
    name = re.sub(r"^(adapter_(?:down|up))\.phm_rule$", r"\1_rule", name)
    return re.sub(r"^(scaling|gate\b)", r"adapter_\1", name)


# ---------------------------------------------------------------------- writing


def fields_for(config: BottleneckConfig, width: int) -> dict[str, Any]:
    """Return AdapterHub's fields of a configuration.

    Raises:
        ValueError: AdapterHub cannot say it.
    """
    beyond = [name for name in ("target_modules", "exclude_modules", "low_rank") if getattr(config, name)]
    if beyond:
        raise ValueError(
            f"AdapterHub has no word for {', '.join(beyond)}; such an adapter cannot be written for it"
        )
    fields = {name: getattr(config, name) for name in SAME_NAME} | FIXED | {"init_weights_seed": None}
    if config.bottleneck_size is not None:
        sizes = config.bottleneck_size
        fields["reduction_factor"] = (
            {key: width / size for key, size in sizes.items()} if isinstance(sizes, dict) else width / sizes
        )
    attention, feedforward = next(
        where for where, name in PLACEMENTS.items() if name == (config.placement or "both")
    )
    if config.init_weights == "lora":
        fields["init_weights"] = "mam_adapter"  # the same start under another name
    return fields | {
        "mh_adapter": attention, "output_adapter": feedforward, "is_parallel": config.parallel,
    }  # fmt: skip


def keys_for(
    tensors: Mapping[str, Tensor],
    config: BottleneckConfig,
    name: str,
    known: Mapping[str, Place],
    top: str,
    behind: str = "",
) -> dict[str, Tensor]:
    """Return the tensors by AdapterHub's keys.

    Args:
        tensors: by the keys of Inlay's files.
        config: the configuration.
        name: the adapter's name, which is part of the keys.
        known: every module of the bare model by its path.
        top: path of the model without its head, where shared parameters are kept.
        behind: the module behind which an invertible adapter sits.
    """
    found = {f.exit.path: f for f in find_sublayers(known)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        invertible = f"base_model.model.{behind}.invertible_"
        if key.startswith(invertible):
            renamed[f"{top}invertible_adapters.{name}.{key.removeprefix(invertible)}"] = tensor
            continue
        path, _, rest = key.removeprefix("base_model.model.").partition(".adapter_")
        rest = f"adapter_{rest}"
        if rest == "adapter_rule":
            renamed[f"{top}shared_parameters.{name}.phm_rule"] = tensor
            continue
        if config.shared_W_phm and (factor := re.fullmatch(r"adapter_(down|up)\.W(_left|_right)?", rest)):
            renamed[f"{top}shared_parameters.{name}.W_{factor[1]}{factor[2] or ''}"] = tensor
            continue
        if path not in found:
            raise AdapterFileError(
                f"the model has no sub-layer that ends in {path!r}: is it another model or class?"
            )
        at = f"{holder_of(found[path])}.adapters.{name}"
        for there in _parts_there(rest, config):
            renamed[f"{at}.{there}"] = tensor
    return renamed


def _parts_there(rest: str, config: BottleneckConfig) -> list[str]:
    """Return the names that AdapterHub gives a tensor: two where the adapter has a normalisation before it."""
    name = re.sub(r"^adapter_(scaling|gate\b)", r"\1", rest)
    name = re.sub(r"^adapter_(down|up)_rule$", r"adapter_\1.phm_rule", name)
    if config.phm_layer:
        name = re.sub(r"^(adapter_(?:down|up))\.bias$", r"\1.b", name)
    place = 1 if config.ln_before else 0
    name = re.sub(r"^adapter_down\.", f"adapter_down.{place}.", name)
    if name.startswith("adapter_norm_before."):
        return [name, name.replace("adapter_norm_before.", "adapter_down.0.")]
    return [name]
