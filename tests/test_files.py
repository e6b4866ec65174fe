"""Saving: all or nothing, the same bytes each time, and one line where it fails."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.files.folder import write_atomically, write_tensors

Files = dict[str, bytes]
SAVED = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def adapted(fill: float = 1.0) -> Any:
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=set("012345"), r=4))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.linspace(-fill, fill, p.numel()).reshape(p.shape))
    return model


def files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_another_process(
    script: str, *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=os.environ | paths | (environment or {}), timeout=300, check=False)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("safe", [True, False])
def test_the_same_adapter_gives_the_same_bytes(safe: bool, tmp_path: Path) -> None:
    model = adapted()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name, safe_serialization=safe)
    loaded = inlay.PeftModel.from_pretrained(adapted().unload(), tmp_path / "one")
    loaded.save_pretrained(tmp_path / "three", safe_serialization=safe)
    first = files(tmp_path / "one")
    assert set(first) == (SAVED if safe else {"README.md", "adapter_config.json", "adapter_model.bin"})
    assert files(tmp_path / "two") == first
    assert files(tmp_path / "three") == first


def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "here")
    script = "import sys; from test_files import adapted; adapted().save_pretrained(sys.argv[1])"
    for_sets = {
        "PYTHONHASHSEED": "1"
    }  # here it is another number, so sets of names are walked in another order
    in_another_process(script, tmp_path / "there", environment=for_sets).check_returncode()
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_saved_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    adapted().save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_an_adapter_can_be_saved_over_the_file_it_came_from(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    loaded = inlay.PeftModel.from_pretrained(adapted(2.0).unload(), tmp_path)
    before = files(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert files(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from test_files import adapted

model, when = adapted(fill=9.0), sys.argv[2]
if when == "while it writes":
    def write_bytes(self, content):
        self.write_text("half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    Path.write_bytes = write_bytes
else:
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("when", ["while it writes", "before it is moved"])
def test_a_killed_process_leaves_the_old_files(when: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    before = files(tmp_path)
    assert in_another_process(KILLED, tmp_path, when).returncode == -signal.SIGKILL
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    inlay.PeftModel.from_pretrained(adapted().unload(), tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_full_disk_is_told_and_leaves_the_old_files(safe: bool, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path, safe_serialization=safe)
    before = files(tmp_path)
    with pytest.raises(OSError, match="could not be written") as raised, small_disk(1000):
        adapted(fill=9.0).save_pretrained(tmp_path, safe_serialization=safe)
    assert str(tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == before


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"), small_disk(1000):
        write_atomically(tmp_path / "new", lambda path: path.write_bytes(bytes(2000)))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert files(tmp_path) == {"file": b"old"}


@contextmanager
def nobody() -> Iterator[None]:
    """Give up the rights of the superuser, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written_to_is_told() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapted().save_pretrained(folder)
        before = files(folder)
        folder.chmod(0o555)
        model = adapted(fill=9.0)
        for target, named in (
            (folder, folder / "adapter_model.safetensors"),
            (folder / "new", folder / "new"),
        ):
            with nobody(), pytest.raises(PermissionError) as raised:
                model.save_pretrained(target)
            assert str(named) in str(raised.value)
            assert "\n" not in str(raised.value)
        folder.chmod(0o755)
        assert files(folder) == before


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        adapted().save_pretrained(tmp_path / "file")
    assert files(tmp_path) == {"file": b"mine"}


def test_an_unknown_adapter_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        adapted().save_pretrained(tmp_path / "out", selected_adapters=["default", "other"])
    assert not (tmp_path / "out").exists()


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "same": whole, "row": whole[1], "transposed": whole.T}
    write_tensors(tmp_path, tensors)
    read = inlay.load_peft_weights(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
