"""The entry point: parse, run one command, tell mistakes in one line."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import UserError, one_line

BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``inlay`` and return its exit code: 0, 2 for a mistake of the user's, 130 when interrupted."""
    from .parser import parse

    try:
        with _quiet():
            command, options = parse(sys.argv[1:] if argv is None else argv)
            importlib.import_module(f"inlay.cli.{command}").run(options)
    except SystemExit as left:  # after help
        return int(left.code or 0)
    except UserError as error:
        return _failed(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(_told(error))
    except KeyboardInterrupt:
        print("inlay: interrupted; --resume continues a training run", file=sys.stderr)
        return INTERRUPTED
    return 0


def _failed(message: str) -> int:
    print(f"inlay: error: {message}", file=sys.stderr)
    return BAD_INPUT


def _told(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"no space left on the disk{where}; nothing of the earlier results was changed"
    return one_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to Inlay's own lines: of libraries, only errors are heard."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
