"""What all tests share: no network, one thread, fixed seeds, and the folder of real models and data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

# Read once, when the libraries are imported; subprocesses that the tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads on two cores wait for each other

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with the real models and data sets, or skip the test."""
    folder = Path(os.environ.get("INLAY_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real models and data at {folder}; set INLAY_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def with_tokenizer(shared: Path) -> Callable[[str], Path]:
    """Return the folder of a real model by its name, or skip the test if this transformers cannot read its tokenizer."""
    import transformers

    def folder_of(name: str) -> Path:
        folder = shared / "models" / name
        made_by = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        if not hasattr(transformers, made_by):
            pytest.skip(
                f"the tokenizer of {name} is a {made_by}, unknown to transformers {transformers.__version__}"
            )
        return folder

    return folder_of
