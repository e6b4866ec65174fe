"""Where the modules of a file are in a model, which may be wrapped in another class than the one it was trained in."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import AdapterFileError
from ..injection.walk import Place
from ..methods.bottleneck.sublayers import Found

PARTS = {
    ".attention.output": "attention",
    ".attention_adapters": "attention",
    ".output_adapters": "feedforward",
    ".output": "feedforward",
}
"""Endings of the modules that hold bottleneck adapters, and which part of a block they follow."""


def own_path(path: str, known: Mapping[str, Place]) -> str:
    """Return the path that a module of the file has in the model: the same, or with another beginning.

    Raises:
        AdapterFileError: the model has no such module.
    """
    shorter = path
    while shorter not in known and "." in shorter:
        shorter = shorter.partition(".")[2]
    if shorter in known:
        return shorter
    longer = [name for name in known if name.endswith(f".{path}")]
    if len(longer) == 1:
        return longer[0]
    raise AdapterFileError(f"the model has no module {path!r}: is it an adapter of another base model?")


def exit_of(at: str, found: list[Found]) -> str:
    """Return the module of the model on whose output the adapters of a module of the file act.

    Raises:
        AdapterFileError: the model has no such sub-layer.
    """
    ending = next((ending for ending in PARTS if at.endswith(ending)), None)
    if ending is None:
        raise AdapterFileError(
            f"adapters at {at!r} are not known; known are modules ending in {sorted(PARTS)}"
        )
    block, part = at.removesuffix(ending), PARTS[ending]
    while "." in block:  # a number alone says nothing
        for sublayer in found:
            path = sublayer.exit.path
            if sublayer.part == part and (path.startswith(f"{block}.") or f".{block}." in path):
                return path
        block = block.partition(".")[2]
    raise AdapterFileError(
        f"the model has no {part} block for {at!r}: is it an adapter of another base model?"
    )


def holder_of(sublayer: Found) -> str:
    """Return the module that holds the adapters of a sub-layer in AdapterHub's own classes.

    BERT and its kin keep them in the modules ``attention.output`` and ``output``, T5 in its numbered sub-layers, all others
    in the block itself.
    """
    parent, _, last = sublayer.exit.path.rpartition(".")
    if last == "dropout" and parent.endswith("output"):
        return parent
    ending = "attention_adapters" if sublayer.part == "attention" else "output_adapters"
    if last == "dropout" and parent.rpartition(".")[2].isdigit():
        return f"{parent}.{ending}"
    while not parent.rpartition(".")[2].isdigit():
        parent = parent.rpartition(".")[0]
    return f"{parent}.{ending}"
