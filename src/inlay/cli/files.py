"""Where results go. What is there stays until the new result is complete: everything is written beside it and then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, told_as

TASK_FILE = "inlay_task.json"


def is_main_process() -> bool:
    """Return whether this is the process of a distributed run that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def check_new(path: str | Path, *, overwrite: bool, ways_out: str = "--overwrite") -> Path:
    """Return the path after making sure that results can be written there.

    Raises:
        UserError: there are results already, or nothing can be written.
    """
    target = Path(path)
    full = any(target.iterdir()) if target.is_dir() else target.exists()
    if full and not overwrite:
        raise UserError(f"{target} already exists; use {ways_out}, or another name")
    _check_writable(target)
    return target


def _check_writable(target: Path) -> None:
    folder = target if target.is_dir() else target.parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}") from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes the target's place when it is complete, and vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        old = fresh.with_name(f"{fresh.name}.old")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give the path of a file to write; it takes the target's place when it is complete, and vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}{target.suffix}")
    try:
        yield fresh
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def write_json(target: Path, values: Any) -> None:
    """Write values as JSON, atomically."""
    with new_file(target) as path:
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the values in a JSON file; UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def safetensors_header(adapter: Path) -> dict[str, Any]:
    """Return name, shape, dtype and place of each tensor in an adapter folder, without reading the tensors."""
    file = adapter / "adapter_model.safetensors"
    with told_as(f"cannot read {file}"), file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError("it is truncated, or no safetensors file")
        header: dict[str, Any] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
