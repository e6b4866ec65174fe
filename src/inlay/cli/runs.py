"""One training run on disk: ``checkpoints/`` while it goes on, then ``adapter/``, metrics, options and curves."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import check_new, is_main_process, new_file
from .options import Train

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""Files of a whole checkpoint; the state is written last, so a killed save lacks it, or has a part of it."""


def as_run(options: Train) -> dict[str, Any]:
    """Return the options as ``--config`` reads them, without those that only say where and whether to begin."""
    values = {key: value for key, value in asdict(options).items() if value is not None}
    method = values.pop("method")
    values["method"] = {"name": method["name"], **method["options"]}
    return {key: value for key, value in values.items() if key not in ("overwrite", "resume")}


class Run:
    """The output folder of a training run."""

    def __init__(self, options: Train) -> None:
        """Check that the run may write here.

        Raises:
            UserError: there are results already, nothing can be written, or another run is to be resumed.
        """
        if options.overwrite and options.resume:
            raise UserError("--overwrite begins anew and --resume goes on: give one of them")
        self.options, self.folder = options, Path(options.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        if is_main_process():
            check_new(
                self.folder, overwrite=options.overwrite or options.resume, ways_out="--overwrite or --resume"
            )
        if options.resume:
            self._check_same()

    def _check_same(self) -> None:
        noted = self.checkpoints / "config.yaml"
        if not noted.is_file():
            return
        before, now = yaml.safe_load(noted.read_text(encoding="utf-8")), _plain(as_run(self.options))
        for key in sorted({*before, *now} - {"output_dir"}):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"--resume: {key.replace('_', '-')} was {before.get(key)!r} in the interrupted run and is now"
                    f" {now.get(key)!r}; give the same options (--config {noted}), or begin anew with --overwrite"
                )

    def begin(self) -> str | None:
        """Make the folder ready to train and return the checkpoint to go on from, if there is one to resume."""
        checkpoint = last_whole_checkpoint(self.checkpoints) if self.options.resume else None
        if is_main_process():
            if not self.options.resume:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write_options(self.checkpoints / "config.yaml")
        return checkpoint

    def write_options(self, target: Path) -> None:
        """Write the options as run, to be used with ``--config``."""
        with new_file(target) as path:
            path.write_text(
                yaml.safe_dump(_plain(as_run(self.options)), sort_keys=False, allow_unicode=True),
                encoding="utf-8",
            )


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint in a folder whose save was not cut off, or None."""
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _is_whole(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in NEEDED):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run's numbers."""
    found = {}
    for name in ("inlay", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "source"
    return found
