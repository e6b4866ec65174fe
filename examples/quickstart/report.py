"""The report of a run: one page for people, and the curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docstrings import Example

NAMES = {"head": "frozen encoder + head", "lora": "LoRA", "full": "full fine-tuning"}

_QUICK = "**A quick run on a handful of sentences: it shows that all works, not how well.**\n\n"

_PAGE = """# Quickstart: which library does this sentence document?

{quick}A pretrained sentence encoder (all-MiniLM-L6-v2: BERT, 6 layers, {total:,} parameters) learns to tell from one
sentence of a docstring which of {classes} libraries it stands in. The libraries' names are masked in the text. Each row
was trained on the same {train:,} sentences (epochs: {epochs:g}) and tested on {test:,} others, of other functions and
classes. Guessing would score {chance:.3f}.

| | accuracy | macro-F1 | trained parameters | of all | saved bytes | seconds | learning rate |
|---|---|---|---|---|---|---|---|
{rows}

How to read this:

- One run each, one seed. The standard error of an accuracy is about {error:.3f} here; smaller differences mean nothing.
- The learning rates are usual ones for each row, not found by a search. With others, or with more epochs, the rows may
  change places.
- The head reads the encoder's first token, as BERT's classifiers do. Only the adapter is saved of LoRA, the whole model
  of the others.
- Seconds are for loading, training and the evaluations on dev, on {cores} CPU cores.
- Other versions of the libraries have other docstrings: expect scores to differ by a few points.

![training loss and accuracy on dev](curves.png)

## What the saved adapter promises

{checks}

## The text

From {libraries}. Some sentences of the test:

{examples}
## Versions and time

{versions}. The whole run took {seconds:.0f} seconds.
"""


def write_report(metrics: dict[str, Any], tested: list[Example], path: Path) -> None:
    """Write a run's numbers as a Markdown page, with some of the sentences it was tested on."""
    methods, libraries = metrics["methods"], metrics["data"]["libraries"]
    lora = methods["lora"]
    accuracy = lora["test"]["accuracy"]
    path.write_text(
        _PAGE.format(
            quick=_QUICK if metrics["quick"] else "",
            total=methods["full"]["parameters"]["total"],
            classes=len(libraries),
            train=metrics["data"]["sentences_per_library"]["train"] * len(libraries),
            test=len(tested),
            epochs=lora["train"]["epochs"],
            chance=1 / len(libraries),
            rows="\n".join(_row(NAMES[name], method) for name, method in methods.items()),
            error=math.sqrt(accuracy * (1 - accuracy) / len(tested)),
            cores=metrics["cores"],
            checks="\n".join(map(_promise, metrics["checks"])),
            libraries=_listed(libraries),
            examples="\n".join(f"> {example.text} ({example.library})\n" for example in tested[:4]),
            versions=_listed(lora["versions"]),
            seconds=metrics["seconds"],
        ),
        encoding="utf-8",
    )


def _promise(check: dict[str, Any]) -> str:
    return f"- {'kept' if check['kept'] else '**BROKEN**'}: {check['promise']} ({check['found']})"


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _row(name: str, method: dict[str, Any]) -> str:
    test, parameters = method["test"], method["parameters"]
    return (
        f"| {name} | {test['accuracy']:.3f} | {test['macro_f1']:.3f} | {parameters['trainable']:,} "
        f"| {parameters['percent']:.2f} % | {parameters['bytes']:,} | {method['seconds']:.0f} "
        f"| {method['train']['learning_rate']:g} |"
    )


def draw_curves(runs: dict[str, Path], path: Path) -> None:
    """Draw training loss and accuracy on dev over the epochs, one line for each training folder."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, folder in runs.items():
        log = _training_log(folder)
        losses = [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry]
        scores = [(entry["epoch"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry]
        left.plot(*zip(*losses, strict=True), label=NAMES[name])
        right.plot(*zip(*scores, strict=True), "o-", label=NAMES[name])
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="accuracy on dev")
    left.legend()
    figure.savefig(path, dpi=120)


def _training_log(folder: Path) -> list[dict[str, float]]:
    states = folder.glob("checkpoints/checkpoint-*/trainer_state.json")
    histories = [json.loads(state.read_text(encoding="utf-8"))["log_history"] for state in states]
    return max(histories, key=len)
