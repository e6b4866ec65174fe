"""Which modules a configuration names: name endings, one expression for whole paths, or "all-linear"; with did-you-mean."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import NoMatchingPeftModuleError, PeftWarning

ALL_LINEAR = "all-linear"
HEADS = ("classifier", "score")
"""Names under which transformers keeps the head of a sequence or token classifier."""
ANSWERERS = ("qa_outputs",)
"""The same of a question answerer."""

_DEFAULT_TARGETS: dict[str, str] = {
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 llama4_text mistral mixtral stablelm "
    "gemma gemma2 gemma3_text qwen2 qwen3",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "q v": "t5 mt5 umt5",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "q v q_proj v_proj": "blip-2",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
_FURTHER_TARGETS = {"vit": {"query", "value", "q_proj", "v_proj"}, "whisper": {"q_proj", "v_proj"}}
"""Model types for which PEFT has no default."""
DEFAULT_TARGETS: dict[str, Collection[str] | str] = {
    model: set(names.split()) for names, models in _DEFAULT_TARGETS.items() for model in models.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
"""The attention projections that LoRA adapts where the user names none, by ``config.model_type``."""


def default_targets(model: nn.Module, required: bool = True) -> Collection[str] | str | None:
    """Return the usual target modules for a model's type.

    Raises:
        ValueError: the type is unknown, and ``required``.
    """
    model_type = model_config(model).get("model_type")
    known = DEFAULT_TARGETS | _FURTHER_TARGETS if required else DEFAULT_TARGETS
    if model_type in known:
        targets = known[model_type]
        paths = [path for path, _ in model.named_modules()]
        return (
            targets
            if isinstance(targets, str)
            else {t for t in targets if any(matches(path, [t]) for path in paths)}
        )
    if not required:
        return None
    raise ValueError(
        "Please specify `target_modules` or `target_parameters` in `peft_config`: there is no default for "
        f"{type(model).__name__} (model_type={model_type!r}); 'all-linear' adapts every linear layer but the head"
    )


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return a model's configuration as a dictionary, empty where it has none."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return config or {}
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return values


def base_name(model: nn.Module) -> str | None:
    """Return the folder or hub id that a model was loaded from, or None."""
    return getattr(model, "name_or_path", None) or model_config(model).get("_name_or_path") or None


def find_targets(paths: Iterable[str], config: Any) -> list[str]:
    """Return the module paths that a configuration names, in the order given.

    Raises:
        NoMatchingPeftModuleError: none does, or all that do are excluded.
    """
    candidates, targets = list(paths), config.target_modules
    named = [path for path in candidates if matches(path, targets) and _in_layers(path, config)]
    found = [path for path in named if not matches(path, getattr(config, "exclude_modules", None))]
    if named and not found:
        raise NoMatchingPeftModuleError(
            f"No modules were targeted for adaptation: target_modules={_show(targets)} names {len(named)} modules and "
            f"exclude_modules={_show(config.exclude_modules)} leaves all of them out."
        )
    if not found and targets:
        raise NoMatchingPeftModuleError(
            f"Target modules {_show(targets)} not found in the base model. "
            f"Please check the target modules and try again{_suggestion(targets, candidates)}."
        )
    if isinstance(targets, (set, list, tuple)):
        unused = sorted(set(targets) - {ending for path in candidates for ending in _endings(path)})
        if unused:
            warnings.warn(
                f"no module matches target_modules entries {unused}{_suggestion(unused, candidates)}",
                PeftWarning,
                stacklevel=2,
            )
    return found


def matches(path: str, names: Collection[str] | str | None) -> bool:
    """Whether a module's path is named: it equals a name or ends in one after a dot, or an expression matches it whole."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(ending in names for ending in _endings(path))


def _endings(path: str) -> Iterator[str]:
    """Yield a path and what is left of it after each of its dots."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def warn_of_unused_names(paths: Collection[str], config: Any) -> None:
    """Warn of entries of ``modules_to_save`` that no module matches; the usual heads are named for models of all kinds."""
    names = set(getattr(config, "modules_to_save", None) or ()).difference(HEADS, ANSWERERS)
    if unused := sorted(name for name in names if not any(matches(path, [name]) for path in paths)):
        warnings.warn(
            f"no module matches modules_to_save entries {unused}, so they are not trained{_suggestion(unused, paths)}",
            PeftWarning,
            stacklevel=2,
        )


def warn_of_unused_patterns(paths: Collection[str], config: Any) -> None:
    """Warn of keys of ``rank_pattern`` and ``alpha_pattern`` that no target matches."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = [
            key.removesuffix(".lora_E") for key in getattr(config, field, None) or ()
        ]  # as AdaLoRA spells them
        if unused := [key for key in patterns if not any(pattern_matches(key, path) for path in paths)]:
            warnings.warn(
                f"no adapted module matches {field} entries {unused}{_suggestion(unused, paths)}",
                PeftWarning,
                stacklevel=2,
            )


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a key of ``rank_pattern`` is a path or an ending of it, as a name or an expression."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def embedding_ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return a transformers model's input embedding and output layer, None where it has none."""
    ends: list[nn.Module | None] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # models of images have the method, but it raises
            ends.append(None)
    return ends[0], ends[1]


def output_layers(model: nn.Module, task_type: Any) -> list[nn.Module]:
    """Return the modules that turn features into outputs: the language model's head, or a classifier."""
    _, output = embedding_ends(model)
    if output is not None:
        return [output]
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return [head for name in HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    return []


def _in_layers(path: str, config: Any) -> bool:
    """Whether a path lies in the blocks of ``layers_to_transform``; a path outside any list of blocks does not."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or isinstance(config.target_modules, str) or path in config.target_modules:
        return True
    names = config.layers_pattern or [r"[^.]*"]
    for name in [names] if isinstance(names, str) else names:
        if block := re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", path):
            return int(block.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def block_index(path: str) -> int | None:
    """Return the index of the model's block that a module is, or is in: that of the first named list on its path.

    Returns:
        the index, counted from 0 in an encoder and in a decoder, as ``layers_to_transform`` counts; None outside any list.
    """
    block = re.search(r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?:\.|$)", path)
    return None if block is None else int(block.group(1))


def _suggestion(targets: Any, paths: Iterable[str]) -> str:
    """Return a did-you-mean clause for names that match nothing."""
    known = sorted(
        {path.rsplit(".", 1)[-1] for path in paths if path and not path.rsplit(".", 1)[-1].isdigit()}
    )
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    near = list(
        dict.fromkeys(
            match
            for t in wanted
            for match in difflib.get_close_matches(t.rsplit(".", 1)[-1], known, n=2, cutoff=0.6)
        )
    )
    if near:
        return f"; did you mean {near}?"
    return f"; the model's modules end in {known[:20]}{' ...' if len(known) > 20 else ''}"


def _show(names: Any) -> str:
    return repr(names) if isinstance(names, str) else "{" + ", ".join(repr(n) for n in sorted(names)) + "}"
