"""Names in tagged text (B-, I-, O) and how many of them were found: exact match of border and type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return (type, first word, word after the last) of each entity. An I- without its B- begins an entity too."""
    found: set[Entity] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.add((kind, start, place))
            kind = ""
        if mark in ("B", "I") and not goes_on:
            start, kind = place, name
    return found


def entity_metrics(rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Return precision, recall and F1 over all entities of (predicted tags, true tags) rows."""
    hits = guessed = real = 0
    for predicted, truth in rows:
        ours, theirs = entities(predicted), entities(truth)
        hits, guessed, real = hits + len(ours & theirs), guessed + len(ours), real + len(theirs)
    precision, recall = hits / guessed if guessed else 0.0, hits / real if real else 0.0
    return {
        "f1": 2 * hits / (guessed + real) if guessed + real else 0.0,
        "precision": precision,
        "recall": recall,
    }
