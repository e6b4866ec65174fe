"""Adapter files: where they are (a folder or the hub), reading them without surprises, writing them all or not at all."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import AdapterFileError

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
STATE_NAME = "adapter_state.safetensors"
"""What a method remembers in the middle of training. PEFT does not know this file and does not read it."""


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return a path as a folder's path.

    Raises:
        ValueError: it is a file.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    return folder


def adapter_folder(folder: str | os.PathLike[str], name: str) -> Path:
    """Return where in a saved model's folder an adapter is: "default" in the folder itself, others in one of their name."""
    return Path(folder) if name == "default" else Path(folder) / name


def write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(path)`` for a temporary file beside the target and move it there: a killed process leaves old or new.

    Raises:
        OSError: it could not be written, for example for lack of space or permission; what was there before is unchanged.
    """
    path: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        path = Path(name)
        write(path)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        path.replace(target)
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):  # with the same errno, and so of the same class
            reason = error.strerror or _first_line(error)
            raise OSError(error.errno, f"{target} could not be written and is as it was: {reason}") from error
        raise


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are not spread over several devices, as FSDP spreads them.

    Raises:
        ValueError: one is.
    """
    if spread := [key for key, tensor in tensors.items() if hasattr(tensor, "full_tensor")]:
        raise ValueError(
            f"{len(spread)} of {len(tensors)} tensors, such as {spread[0]}, are spread over several devices; gather them in all "
            "processes, state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), and call save_pretrained(folder, state_dict=state)"
        )


def write_tensors(folder: Path, tensors: dict[str, Tensor], safe_serialization: bool = True) -> None:
    """Write an adapter's tensors; the same tensors give the same bytes. Tensors that share memory are written apart."""
    plain = {key: value.detach().cpu().contiguous() for key, value in sorted(tensors.items())}
    seen: set[int] = set()
    for key, value in plain.items():
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            plain[key] = value.clone()
        seen.add(storage.data_ptr())
    # Made in memory first: where a disk is full, Python's own error says so, and those of the two libraries do not.
    if safe_serialization:
        target, content = folder / SAFETENSORS_WEIGHTS_NAME, save(plain, metadata={"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        target, content = folder / WEIGHTS_NAME, buffer.getvalue()
    write_atomically(target, lambda path: path.write_bytes(content))


def write_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Write what a method remembers in the middle of training; where that is nothing, no file is left."""
    target = folder / STATE_NAME
    if not state:
        target.unlink(missing_ok=True)
        return
    content = save({key: value.detach().cpu().contiguous() for key, value in sorted(state.items())})
    write_atomically(target, lambda path: path.write_bytes(content))


def read_state(
    model_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Return what ``write_state`` wrote, empty where there is no such file.

    Raises:
        AdapterFileError: the file is truncated.
    """
    try:
        path = locate(model_id, STATE_NAME, subfolder=subfolder, **hub)
    except ValueError:
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} cannot be read ({_first_line(error)}); delete it to go on without what it remembers"
        ) from error


def locate(model_id: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the local path of a file in an adapter's folder, or of the copy the hub client keeps of it.

    Args:
        model_id: a local folder, or a repository on the hub.
        filename: the file's name.
        subfolder: a folder inside it.
        **hub: passed to ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, local_files_only, ...

    Raises:
        ValueError: the file is in neither.
    """
    path = Path(model_id) / (subfolder or "") / filename
    if path.is_file():
        return path
    if Path(model_id).is_dir() or not is_hub_id(str(model_id)):
        raise ValueError(f"Can't find '{filename}' at '{path.parent}'")
    return _from_hub(str(model_id), filename, subfolder, **hub)


def is_hub_id(name: str) -> bool:
    """Whether a string can name a repository on the hub: "name" or "user/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None


def _from_hub(repository: str, filename: str, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename, subfolder=subfolder or None, **hub))
    except Exception as error:  # the HTTP library and so its errors differ between versions of the client
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "there is no such folder or cached file, and the hub was not asked (offline) or did not answer"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is no such folder, and no such repository on the hub that you may read; pass token= if it is private"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"the repository has no revision {hub['revision']!r}"
        elif isinstance(error, errors.EntryNotFoundError):
            reason = (
                f"the repository has no such file in {subfolder!r}"
                if subfolder
                else "the repository has no such file"
            )
        else:
            reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"Can't find '{filename}' at '{repository}': {reason}") from error


def read_tensors(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter by their keys on disk: safetensors first, else a pickle of weights only.

    Raises:
        ValueError: there is no such file.
        AdapterFileError: the file is truncated or is not an adapter.
    """
    try:
        path = locate(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    except ValueError as no_safetensors:
        try:
            path = locate(model_id, WEIGHTS_NAME, subfolder=subfolder, **hub)
        except ValueError:
            raise no_safetensors from None
    return read_file(path, device)


def read_file(path: Path, device: str | torch.device | None = None) -> dict[str, Tensor]:
    """Return the tensors of one file: safetensors, or a pickle of weights only.

    Raises:
        AdapterFileError: the file is truncated or holds something else.
    """
    where = str(device) if device is not None else "cpu"
    try:
        tensors = (
            load_file(path, device=where)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location=where, weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as an adapter ({_first_line(error)}); it may be truncated"
        ) from error
    except Exception as error:  # the unpickler's own class is not a subclass of any of the above
        raise AdapterFileError(
            f"{path} holds more than tensors, which could run code, and was not loaded"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{path} does not hold a dictionary of tensors")
    return tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
