"""AdapterHub's ``adapter_setup.json``: a composition, beside one folder for each adapter and fusion in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..composition import Average, BatchSplit, Block, Child, Fuse, Parallel, Split, Stack, blocks_in
from ..errors import AdapterFileError
from ..files.folder import locate, write_atomically
from .write import VERSION

SETUP_NAME = "adapter_setup.json"
SETTINGS: dict[str, tuple[type[Block], str | None]] = {
    "Stack": (Stack, None),
    "Parallel": (Parallel, None),
    "Average": (Average, "weights"),
    "BatchSplit": (BatchSplit, "batch_sizes"),
    "Split": (Split, "splits"),
}
"""Blocks by their names there, and the one setting that each has; it has the same name here."""


def read_setup(origin: str | os.PathLike[str], **hub: Any) -> Child | None:
    """Return the composition that a folder names, None where it is no such folder.

    Raises:
        AdapterFileError: the file is no composition.
        ValueError: it is one that Inlay does not have.
    """
    try:
        path = locate(origin, SETUP_NAME, **hub)
    except ValueError:
        return None
    try:
        return _tree(json.loads(path.read_text(encoding="utf-8"))["adapter_setup"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"{path} is no setup of adapters ({type(error).__name__}: {error}); it may be truncated"
        ) from None


def write_setup(folder: Path, tree: Child) -> None:
    """Write a composition, for a folder that holds its adapters by their names."""
    root = Stack(tree) if isinstance(tree, str) else tree
    whole = {"adapter_setup": _told(root), "head_setup": None, "version": VERSION}
    text = json.dumps(whole, indent=2)
    write_atomically(folder / SETUP_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def differences(tree: Child, configs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what AdapterHub computes otherwise under a composition, on purpose here; ``configs`` are those of the adapters."""
    blocks = list(blocks_in(tree))
    if any(isinstance(block, Average) for block in blocks):
        yield "AdapterHub divides an Average by the number of its children once more"
    for own in [list(_in_order(block)) for block in blocks if isinstance(block, Stack)]:
        methods = [configs[name].method_name() for name in own]
        if methods.count("LORA") > 1:
            yield "AdapterHub feeds what one LoRA of a Stack adds into the next, Inlay adds them up"
        if methods.count("BOTTLENECK") > 1 and any(getattr(configs[name], "parallel", False) for name in own):
            yield "AdapterHub loses the layer's output in a Stack with parallel adapters"


def _in_order(stack: Stack) -> Iterator[str]:
    """Yield the adapters that act one after the other in a stack, without those in blocks of another kind."""
    for child in stack.children:
        if isinstance(child, Stack):
            yield from _in_order(child)
        elif isinstance(child, str):
            yield child


def _tree(told: Mapping[str, Any]) -> Child:
    kind, children, settings = told["type"], told["children"], told.get("kwargs") or {}
    if kind == "single":
        return _name(children[0])
    nodes = [_tree(child) for child in children]
    if kind == "Fuse":
        members = [node for node in nodes if isinstance(node, str)]
        if len(members) < len(nodes):
            raise ValueError(f"Inlay fuses single adapters, and the setup fuses {nodes}")
        return Fuse(*members, name=settings.get("name") or ",".join(members))
    if kind not in SETTINGS:
        raise ValueError(f"Inlay has no composition {kind!r}; it has {', '.join([*SETTINGS, 'Fuse'])}")
    block, setting = SETTINGS[kind]
    if unknown := sorted(settings.keys() - {setting}):
        raise ValueError(f"Inlay's {kind} has no {', '.join(unknown)}")
    return block(*nodes, **settings)


def _name(name: str) -> str:
    """Return an adapter's name, which is that of its folder."""
    if not name or any(sign in name for sign in "./\\"):
        raise ValueError(f"{name!r} cannot be the name of an adapter and of its folder")
    return name


def _told(node: Child) -> dict[str, Any]:
    if isinstance(node, str):
        return {"type": "single", "children": [node]}
    kind = type(node).__name__
    told = {"type": kind, "children": [_told(child) for child in node.children]}
    if isinstance(node, Fuse):
        usual = ",".join(map(str, node.children))
        return told if node.name in (None, usual) else told | {"kwargs": {"name": node.name}}
    setting = SETTINGS[kind][1]
    return told if setting is None else told | {"kwargs": {setting: list(getattr(node, setting))}}
