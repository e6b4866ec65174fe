"""The tables of the report."""

from __future__ import annotations

from statistics import median
from typing import Any

from instruments import ratios, spread

from .measure import FROZEN, GENERATED
from .models import Size

Counts = dict[str, dict[str, Any]]
Times = dict[str, list[float]]
PEERS = ("peft", "adapters")
NOTES = [
    '- "saved", "peak" and "allocated" are what a method takes beyond the frozen model\'s step: what is kept for the backward '
    "pass, the largest sum of allocations at a time, and the sum of all that is allocated in the course of a step (so a measure "
    "of the memory traffic beside the products).",
    '- "/ peer" is the ratio of the two ratios to the frozen model, each in its own process, as the median over rounds.',
    "- The fixed cost is that of a model so small that the processor is busy with Python and with calling operations: "
    "what a method adds to the frozen model's forward pass, in microseconds, dispatched operations and Python calls.",
]


def step_table(counts: Counts, taken: Times) -> list[str]:
    """Return the table of a training step."""
    lines = [
        "| method | ms, median | / frozen (quartiles) | / peft | / adapters | FLOP / frozen | trained | saved +MB | peak +MB "
        "| allocated +MB |",
        "|--|--|--|--|--|--|--|--|--|--|",
    ]
    for name, values in _ordered(taken):
        own, base = counts[name], counts[_frozen_of(name)]
        more = " | ".join(f"{(own[key] - base[key]) / 1e6:.2f}" for key in ("saved", "peak", "allocated"))
        lines.append(
            f"| {name} | {median(values):.1f} | {_against_frozen(taken, name)} | {_against_peers(taken, name)} "
            f"| {own['flops'] / base['flops']:.4f} | {own['trained']:,d} | {more} |"
        )
    frozen = counts[FROZEN]
    absolute = ", ".join(f"{key} {frozen[key] / 1e6:.1f} MB" for key in ("saved", "peak", "allocated"))
    return [
        *lines,
        "",
        f"The frozen model: {frozen['flops'] / 1e9:.2f} GFLOP, {absolute}.",
        *worse_than_a_peer(counts),
    ]


def worse_than_a_peer(counts: Counts) -> list[str]:
    """Return a line that names each count in which a peer has less, beyond a thousandth of the frozen model's."""
    found = []
    for name in counts:
        for peer in _peers_of(counts, name):
            for key in ("flops", "saved", "peak"):
                more = counts[name][key] - counts[peer][key]
                if more > counts[FROZEN][key] / 1000:
                    found.append(
                        f"{name} {key} +{more / counts[FROZEN][key]:.1%} of the frozen model's ({peer})"
                    )
    return ["", f"More than a peer needs: {'; '.join(found) if found else 'nothing'}."]


def forward_table(taken: Times) -> list[str]:
    """Return the table of a forward pass."""
    lines = ["| method | ms, median | / frozen (quartiles) | / peft | / adapters |", "|--|--|--|--|--|"]
    for name, values in _ordered(taken):
        lines.append(
            f"| {name} | {median(values):.1f} | {_against_frozen(taken, name)} | {_against_peers(taken, name)} |"
        )
    return lines


def generation_table(taken: Times) -> list[str]:
    """Return the table of generation with a cache."""
    lines = [
        "| method | ms a token, median | / frozen (quartiles) | / peft | / adapters |",
        "|--|--|--|--|--|",
    ]
    for name, values in _ordered(taken):
        lines.append(
            f"| {name} | {median(values) / GENERATED:.2f} | {_against_frozen(taken, name)} | {_against_peers(taken, name)} |"
        )
    return lines


def overhead_table(counts: Counts, taken: Times, size: Size) -> list[str]:
    """Return the table of what a forward pass costs where there is next to nothing to compute."""
    frozen = counts[FROZEN]
    lines = [
        f"{size.layers} layer, d {size.width}, {size.batch} x {size.length} tokens; the frozen model takes "
        f"{median(taken[FROZEN]) * 1e3:.0f} us, {frozen['operations']} operations, {frozen['calls']} Python calls.",
        "",
        "| method | us more, median | operations more | Python calls more |",
        "|--|--|--|--|",
    ]
    for name, values in _ordered(taken):
        base = _frozen_of(name)
        more = median(a - b for a, b in zip(values, taken[base], strict=True)) * 1e3
        own = counts[name]
        lines.append(
            f"| {name} | {more:.0f} | {own['operations'] - counts[base]['operations']} | {own['calls'] - counts[base]['calls']} |"
        )
    return lines


def _ordered(taken: Times) -> list[tuple[str, list[float]]]:
    """Return the cases by method, and those of one method by library: Inlay's before its peers'."""
    libraries = {library: place for place, library in enumerate(("inlay", *PEERS), start=1)}
    methods = [name.partition(" ")[2] for name in taken if name.startswith("inlay")]

    def place(name: str) -> tuple[int, int]:
        library, _, method = name.partition(" ")
        return (methods.index(method) if method in methods else -1, libraries.get(library, 0))

    return sorted(taken.items(), key=lambda item: place(item[0]))


def _frozen_of(name: str) -> str:
    return "adapters frozen" if name.startswith("adapters") else FROZEN


def _against_frozen(taken: Times, name: str) -> str:
    return spread(ratios(taken[name], taken[_frozen_of(name)]))


def _peers_of(found: dict[str, Any], name: str) -> list[str]:
    library, _, method = name.partition(" ")
    return [f"{peer} {method}" for peer in PEERS if library == "inlay" and f"{peer} {method}" in found]


def _against_peers(taken: Times, name: str) -> str:
    cells = []
    peers = _peers_of(taken, name)
    own = ratios(taken[name], taken[_frozen_of(name)])
    for library in PEERS:
        peer = next((p for p in peers if p.startswith(library)), None)
        if peer is None:
            cells.append("")
        else:
            cells.append(f"{median(ratios(own, ratios(taken[peer], taken[_frozen_of(peer)]))):.3f}")
    return " | ".join(cells)
