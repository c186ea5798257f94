"""The command line and its exit status; `parser` has its arguments, `commands` (imported on demand) what they do."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mlc_ray.cli.parser import SCHEMAS as SCHEMAS
from mlc_ray.cli.parser import build_parser as build_parser
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import command_line

BROKEN_PIPE = 141  # what shells report for a process that SIGPIPE ended
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
DIED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake that the message explains, 130 interrupted.

    70 is an error of the program's own, with its traceback; 75 that a worker of Ray's died, which the same command may
    survive; 141 that nobody reads the output any more.

    `compare` also has 1, a rule failed; 3 is that scores cannot be compared, or too much of one has no verdict.
    A run that ended by SIGTERM after a checkpoint is 143, as shells report that signal.
    """
    arguments = build_parser().parse_args(argv)
    try:
        commands = importlib.import_module("mlc_ray.cli.commands")
        command: Callable[[argparse.Namespace], None] = getattr(commands, arguments.command)
        with command_line(), _modules_of_the_current_folder():
            command(arguments)
    except MlcRayError as error:
        cause = getattr(error, "cause", error)  # Ray hands on a worker's error wrapped in one of the same type
        print(f"mlc-ray: error: {cause}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interrupt:  # it may say how to go on
        print("mlc-ray: interrupted" + (f"; {interrupt}" if interrupt.args else ""), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `mlc-ray config --schema | head`
        sys.stderr.close()
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        if (fix := _extra_that_lacks(error.name, arguments.command)) is None:
            traceback.print_exc()
            return UNEXPECTED
        print(f"mlc-ray: error: this needs {error.name}, which is not installed: {fix}", file=sys.stderr)
        return MlcRayError.exit_status
    except Exception as error:  # Python's own status would be 1, which says that a gate failed
        if "ray.train" in sys.modules and (died := _death_of(error)) is not None:
            print(f"mlc-ray: error: {died}; what is saved stays: --resume FOLDER goes on with it", file=sys.stderr)
            return DIED
        traceback.print_exc()
        return UNEXPECTED
    return 0


_EXTRAS = {
    "train": "train", "export": "train", "openings": "search", "score": "score", "judge": "score",
    "utility": "utility", "translate": "translate", "report": "report", "compare": "report", "show": "report",
}  # fmt: skip
"""Of a command: the extra of this package that brings what it needs; `all` of any other."""


def _extra_that_lacks(module: str | None, command: str) -> str | None:
    """How to install what a command needs, where a whole package of others is missing; None for all else."""
    if not module or "." in module or module in sys.modules or module == "mlc_ray":  # a part of one that is there
        return None
    return f"pip install 'mlc_ray[{_EXTRAS.get(command.removesuffix('_command'), 'all')}]'"


def _death_of(error: BaseException) -> str | None:
    from mlc_ray.train.failures import death_of

    return death_of(error)


@contextmanager
def _modules_of_the_current_folder() -> Iterator[None]:
    """Components in the folder that the command is run from can be imported, as with `python -m mlc_ray`.

    The folder is put last, so that it shadows nothing that is installed, and not at all where Python was told to leave
    it out (`PYTHONSAFEPATH`). Ray's workers get it from Ray, which hands on the driver's current folder.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        here = ""
    if not here or sys.flags.safe_path or here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
