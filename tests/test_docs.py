"""What the documents show works: their Python is run, their table is made anew, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md")),
]


def python_of(document: Path) -> str:
    """Return the Python blocks of a document as one program, each line where it stands there."""
    lines, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        lines.append(line if inside and not line.startswith("```") else "")
        if line.startswith("```"):
            inside = line == "```python"
    return "\n".join(lines)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_python_of_a_document_runs(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = repository / name
    exec(compile(python_of(document), str(document), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str, repository: Path) -> None:
    document = repository / name
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def capability_table(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "capability_table", repository / "docs" / "capability_table.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::inlay.errors.PeftWarning")
def test_the_readme_shows_what_works_today(repository: Path) -> None:
    script = capability_table(repository)
    assert (repository / "README.md").read_text(encoding="utf-8") == script.readme_with(script.table())
