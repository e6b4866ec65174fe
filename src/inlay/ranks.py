"""The rank that each weight matrix has or ended with: as JSON, and as the heat map of the AdaLoRA paper (figure 3)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from torch import nn

from .files.folder import write_atomically
from .layers.layer import AdaptedLayer
from .method import Slot


def rank_report(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Return the rank of an adapter on each layer, by the layer's path, in the order of the model's modules.

    While AdaLoRA's schedule is running, it is the number of ranks that are not masked at the moment.

    Raises:
        ValueError: the model has no such adapter, or it has no ranks.
    """
    slots = [
        slot
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        and (slot := layer.slots.get(adapter_name)) is not None
        and slot.owner is None
        and "r" in slot.columns
    ]
    if not slots:
        raise ValueError(f"the model has no adapter {adapter_name!r} with ranks")
    live = [_live_ranks(slot) for slot in slots]
    untouched = not any(live)  # E is zero before the first step
    return {slot.path: slot["r"] if untouched else rank for slot, rank in zip(slots, live, strict=True)}


def _live_ranks(slot: Slot) -> int:
    if "lora_E" not in slot.columns:
        return int(slot["r"])
    e = slot["lora_E"].detach()
    return int((e != 0).flatten(0, -3).any(0).sum() if e.dim() > 2 else (e != 0).sum())


def write_rank_report(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> dict[str, int]:
    """Write ``ranks.json`` and ``ranks.png`` to a folder, and return the ranks.

    Raises:
        ValueError: as ``rank_report``.
        ImportError: matplotlib, which draws, is not installed; the JSON is written before.
    """
    ranks, target = rank_report(model, adapter_name), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"ranks": ranks, "total": sum(ranks.values())}, indent=2)
    write_atomically(target / "ranks.json", lambda path: path.write_text(text, encoding="utf-8"))
    draw_ranks(ranks, target / "ranks.png")
    return ranks


def draw_ranks(ranks: dict[str, int], target: str | os.PathLike[str]) -> None:
    """Draw ranks as a heat map, a column for each block of the model and a row for each matrix in it.

    Args:
        ranks: what ``rank_report`` returns.
        target: the picture's file; its ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing ranks needs matplotlib: pip install matplotlib") from error
    places = {path: _place(path) for path in ranks}
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = sorted({column for _, column in places.values()})
    grid = [[float("nan")] * len(columns) for _ in rows]
    figure = Figure(figsize=(2.5 + 0.5 * len(columns), 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for path, (row, column) in places.items():
        y, x = rows.index(row), columns.index(column)
        grid[y][x] = ranks[path]
        axes.text(x, y, str(ranks[path]), ha="center", va="center", color="tab:red")
    image = axes.imshow(grid, cmap="Greens", vmin=0, aspect="auto")
    axes.set_xticks(range(len(columns)), [str(c) if c >= 0 else "" for c in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="layer", ylabel="matrix", title=f"{sum(ranks.values())} ranks in {len(ranks)} matrices")
    figure.colorbar(image, label="rank")
    figure.savefig(target, dpi=120)


def _place(path: str) -> tuple[str, int]:
    """Return a layer's row and column: its name within its block, and the number of the block (-1: in none)."""
    block = re.match(r"(.*?)\.?\b(\d+)\.(.+)", path)
    if block is None:
        return path, -1
    stack = block.group(1).rsplit(".", 2)[0] if re.search(r"\b(en|de)coder\b", block.group(1)) else ""
    return f"{stack}.{block.group(3)}" if stack else block.group(3), int(block.group(2))
