"""The processes that are measured: this one, and that of AdapterHub, which take turns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measure import Bench
from .models import Size

Values = dict[str, Any]


class Here:
    """The cases of this process: Inlay, PEFT and the frozen model.

    Args:
        methods: names of those to measure; None for all.
    """

    where = "Inlay and PEFT"

    def __init__(self, methods: Sequence[str] | None) -> None:
        self.methods = methods
        self.bench: Bench | None = None

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries."""
        from .inlay_and_peft import versions

        return versions()

    def load(self, model: str, size: Size) -> None:
        """Make the cases of a model."""
        from .inlay_and_peft import builders

        self.bench = None  # before the new ones take memory
        self.bench = Bench(builders(), model, size, self.methods)

    def ask(self, what: str, /, **given: Any) -> Values:
        """Return what a method of ``Bench`` returns."""
        found: Values = getattr(self.bench, what)(**given)
        return found

    def close(self) -> None:
        """Let the cases go."""
        self.bench = None


class There:
    """The same for another Python, which runs ``adapterhub.py``; questions and answers are lines of JSON.

    Args:
        python: the interpreter of an environment that has ``adapters``.
        threads: how many it may use.
        methods: names of those to measure; None for all.

    Raises:
        RuntimeError: the process has ended before it answered.
    """

    where = "AdapterHub, in a process of its own that takes turns with the other"

    def __init__(self, python: Path, threads: int, methods: Sequence[str] | None) -> None:
        self.methods = methods
        command = [str(python), "-W", "ignore", "-m", "activation_cost.adapterhub", str(threads)]
        self.process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries."""
        return self.ask("versions")

    def load(self, model: str, size: Size) -> None:
        """Make the cases of a model."""
        self.ask("load", model=model, size=asdict(size), methods=self.methods)

    def ask(self, what: str, /, **given: Any) -> Values:
        """Return what a method of ``Bench`` returns."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended; so says the empty answer
            print(json.dumps([what, given]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"AdapterHub's process ended with status {self.process.wait()}; see its messages above"
            )
        found: Values = json.loads(answer)
        return found

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Together:
    """Several processes asked in turns.

    Args:
        sides: the processes.
        rounds: how many rounds are timed.
        clock: which clock.
    """

    def __init__(self, sides: Sequence[Here | There], rounds: int, clock: str) -> None:
        self.sides, self.rounds, self.clock = sides, rounds, clock

    def load(self, model: str, size: Size) -> None:
        """Make the cases of a model everywhere."""
        for side in self.sides:
            side.load(model, size)

    def ask(self, what: str) -> Values:
        """Return the answers of all."""
        return {name: value for side in self.sides for name, value in side.ask(what).items()}

    def time(self, what: str, names: Sequence[str] | None = None, times: int = 1) -> dict[str, list[float]]:
        """Return the milliseconds of each case in each round, after one that is not counted.

        Args:
            what: "step", "forward" or "generate".
            names: methods to time; None for all.
            times: how many times as many rounds as usual.
        """
        taken: dict[str, list[float]] = {}
        for turn in range(times * self.rounds + 1):
            for side in self.sides[:: 1 if turn % 2 else -1]:
                found = side.ask("time", what=what, methods=names, clock=self.clock, backwards=turn % 2 == 0)
                for name, milliseconds in found.items():
                    taken.setdefault(name, []).append(milliseconds)
        return {name: values[1:] for name, values in taken.items()}
