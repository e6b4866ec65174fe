"""The package as it is installed: what importing costs, the console script, and that the README's commands are run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import inlay

RUN_BY = {
    "inlay": "tests/cli/test_readme.py::test_the_command_line_of_the_readme",
    "make quickstart": "tests/test_quickstart.py::test_a_run_leaves_all_its_results",
    "make test": ".ci/run",
}
"""How the README's commands begin, and what runs them: a test, or a file."""

HEAVY = [
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "accelerate",
    "datasets",
    "matplotlib",
    "jsonargparse",
]


def test_importing_inlay_leaves_heavy_libraries_alone() -> None:
    program = f"import sys, inlay; print([name for name in {HEAVY} if name in sys.modules])"
    assert _output(sys.executable, "-c", program) == "[]"


def test_every_public_name_can_be_imported() -> None:
    missing = [name for name in inlay.__all__ if not hasattr(inlay, name)]
    assert missing == []


def test_type_checkers_see_the_names_that_are_loaded_lazily(repository: Path) -> None:
    tree = ast.parse((repository / "src" / "inlay" / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.asname: f"{n.module}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == inlay._MODULE_OF
    aliases = {
        target.id: n.value.id
        for n in block.body
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Name)
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    assert aliases == inlay._ALIASES


def test_the_version_is_the_installed_one() -> None:
    assert inlay.__version__ == version("inlay")


def test_the_types_are_shipped() -> None:
    assert (Path(inlay.__file__).parent / "py.typed").is_file()


def test_the_console_script_answers() -> None:
    (script,) = entry_points(group="console_scripts", name="inlay")
    assert script.value == "inlay.cli.main:main"
    script_file = Path(sys.executable).parent / "inlay"
    told = _output(script_file, "--help")
    for command in ("train", "evaluate", "predict", "merge", "inspect", "methods"):
        assert command in told


def test_every_command_in_the_readme_is_run(repository: Path) -> None:
    commands = readme_commands((repository / "README.md").read_text(encoding="utf-8"))
    begin = {
        command: [words for words in RUN_BY if f"{command} ".startswith(f"{words} ")] for command in commands
    }
    assert [command for command, found in begin.items() if not found] == [], (
        "shown in README.md, run by no test"
    )
    assert {words for found in begin.values() for words in found} == set(RUN_BY), "no longer in README.md"


@pytest.mark.parametrize(("words", "place"), RUN_BY.items())
def test_what_runs_a_command_of_the_readme_does(words: str, place: str, repository: Path) -> None:
    file, _, test = place.partition("::")
    assert (f"def {test}(" if test else words) in (repository / file).read_text(encoding="utf-8")


def test_commands_are_found_in_bash_blocks_only() -> None:
    text = "```bash\n# a comment\nmake   test\npip install -e . \\\n  --quiet  # why\n```\n\n```python\nnot_a_command()\n```\n"
    assert readme_commands(text) == ["make test", "pip install -e . --quiet"]


def readme_commands(markdown: str) -> list[str]:
    """Return the commands in fenced bash blocks, without comments and with single spaces."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (shlex.join(shlex.split(line, comments=True)) for line in lines)
    return [command for command in commands if command]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()
