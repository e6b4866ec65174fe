"""Real text that is on every machine: sentences from the docstrings of the installed numerical libraries.

The task is to tell from one sentence which library it documents. Source files are parsed, never imported, so a library
that does not run on this machine still gives its text. Nothing is copied into the repository.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SPLITS = ("train", "dev", "test")
MASK = "[LIB]"

_DISTRIBUTIONS = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch": "torch",
}

# Test code and copies of other projects would put a sentence under the wrong library.
_FOREIGN_FOLDER = re.compile(r"_?(tests?|testing|vendor(ed)?|externals?|extern|array_api\w*)")

# A sentence that names its library, or the usual short form of it, would give its label away.
_LIBRARY_NAME = re.compile(
    r"\w*(?:numpy|scipy|pandas|matplotlib|scikit|sklearn|sympy|networkx|torch|pyplot|pylab)[\w-]*"
    r"|(?<![a-z])(?:np|sp|pd|plt|mpl|nx)(?![a-z])",
    re.IGNORECASE,
)
_MARKUP = re.compile(r":[a-z:+-]+:(?=`)|[`*]+|~(?=\w)|\[\d+\]_?")
_NOT_PROSE = re.compile(r">>>|^\.\.|^[-=~^#+]{3,}|[{}<>\\|@$%=]|://|\s:\s|::", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SENTENCE = re.compile(r"[A-Z][^\n]*[a-z)]\.")
_MIN_WORDS, _MAX_WORDS = 8, 20
_MAX_PER_SOURCE = 6
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """One sentence, the library it documents (the label), and the class or function whose docstrings hold it."""

    text: str
    library: str
    source: str


def installed_libraries() -> dict[str, str]:
    """Return the versions of the libraries found on this machine, by import name, in alphabetical order."""
    return {
        name: version(dist) for name, dist in sorted(_DISTRIBUTIONS.items()) if find_spec(name) is not None
    }


def load_splits(per_library: dict[str, int], seed: int = 0) -> dict[str, list[Example]]:
    """Return shuffled examples for train, dev and test, with `per_library[split]` sentences of every library.

    A top-level class or function goes, with everything in it, to exactly one split. A sentence that occurs twice in a
    library is kept once; one that two libraries share is dropped.

    Raises:
        ValueError: fewer than two libraries are installed, or one of them has too few sentences.
    """
    libraries = list(installed_libraries())
    if len(libraries) < 2:
        raise ValueError(
            f"found {libraries}, but at least two libraries are needed: install the extra 'quickstart'"
        )
    # Half as much again leaves room for shared sentences and for the sources that straddle the end of a split.
    enough = 3 * sum(per_library.values()) // 2 + 2 * len(SPLITS) * _MAX_PER_SOURCE
    pools = [_read_library(name, enough, seed) for name in libraries]
    owners = Counter(key for pool in pools for key in pool)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for name, pool in zip(libraries, pools, strict=True):
        own = [example for key, example in pool.items() if owners[key] == 1]
        for split, examples in _split_by_source(name, own, per_library, seed).items():
            splits[split] += examples
    for examples in splits.values():
        random.Random(seed).shuffle(examples)
    return splits


def clean_sentences(docstring: str) -> Iterator[str]:
    """Yield the prose sentences of a docstring, without markup, code or the libraries' names."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if _NOT_PROSE.search(paragraph) or re.search(r"^\s", paragraph, re.MULTILINE):
            continue
        prose = _MARKUP.sub("", " ".join(paragraph.split()))
        for sentence in _SENTENCE_END.split(prose):
            if _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS and _SENTENCE.fullmatch(sentence):
                yield _LIBRARY_NAME.sub(MASK, sentence)


def _split_by_source(
    name: str, examples: list[Example], per_library: dict[str, int], seed: int
) -> dict[str, list[Example]]:
    by_source: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_source[example.source].append(example)
    groups = list(by_source.values())
    random.Random(seed).shuffle(groups)
    sources = iter(groups)
    chosen: dict[str, list[Example]] = {}
    for split in SPLITS:
        wanted = per_library[split]
        taken: list[Example] = []
        while len(taken) < wanted:
            source = next(sources, None)
            if source is None:
                raise ValueError(
                    f"{name} has only {len(examples)} usable sentences: ask for fewer than {per_library}"
                )
            taken += source
        chosen[split] = taken[:wanted]
    return chosen


def _read_library(name: str, enough: int, seed: int) -> dict[str, Example]:
    """Return at least `enough` examples, if the library has them, by their text without case, digits and signs."""
    pool: dict[str, Example] = {}
    for source, sentences in _sources(name, seed):
        fresh = {re.sub(r"[\W\d_]+", " ", text.lower()): Example(text, name, source) for text in sentences}
        fresh = {key: example for key, example in fresh.items() if key not in pool}
        pool.update(list(fresh.items())[:_MAX_PER_SOURCE])
        if len(pool) >= enough:
            break
    return pool


def _sources(name: str, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield (source, its sentences) for the top-level classes and functions of a library, file by file."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    files = [path for path in root.rglob("*.py") if not _is_foreign(path.relative_to(root))]
    # Alphabetical order would read one corner of a large library, and a hash is the same on every machine.
    files.sort(
        key=lambda path: hashlib.sha256(f"{seed}/{path.relative_to(root).as_posix()}".encode()).digest()
    )
    for path in files:
        for top in _parse(path).body:
            if isinstance(top, _DOCUMENTED) and not top.name.startswith("_"):
                nodes = [
                    node for node in ast.walk(top) if isinstance(node, _DOCUMENTED) and node.name[0] != "_"
                ]
                sentences = (
                    text for node in nodes for text in clean_sentences(ast.get_docstring(node) or "")
                )
                yield f"{name}/{path.relative_to(root).as_posix()}:{top.name}", sentences


def _is_foreign(relative: Path) -> bool:
    return any(_FOREIGN_FOLDER.fullmatch(folder) for folder in relative.parts[:-1])


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            return ast.parse(path.read_bytes())
        except SyntaxError:  # a file for another version of Python
            return ast.Module(body=[], type_ignores=[])
