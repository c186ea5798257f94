"""Every error that a user can cause and correct: `MlcRayError`, and by name all its subclasses, wherever they are.

    from mlc_ray.errors import ConfigError, RunError

imports the module that defines each, and nothing else; `dir(mlc_ray.errors)` lists them.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import ClassVar

from mlc_ray.secrets import hide


class MlcRayError(Exception):
    """Its message quotes the offending value and names the fix; the command line prints it without a traceback.

    Credentials are left out of the message (`secrets.hide`), wherever it is shown.

    Attributes:
        exit_status: of the command that it ends.
    """

    exit_status: ClassVar[int] = 2

    def __str__(self) -> str:
        return hide(super().__str__())


@cache
def places() -> dict[str, str]:
    """The module of each `MlcRayError` by name, read from the sources: no module is imported to find them."""
    root = Path(__file__).parent
    found: dict[str, tuple[str, set[str]]] = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join(["mlc_ray", *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for name, bases in re.findall(r"^class (\w+Error)\(([^)]*)\)", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = module, set(re.findall(r"\w+", bases))
    ours = {"MlcRayError"}
    while more := {name for name, (_, bases) in found.items() if bases & ours} - ours:
        ours |= more
    return {name: module for name, (module, _) in found.items() if name in ours}


def __getattr__(name: str) -> type[MlcRayError]:
    if name.endswith("Error") and name in places():
        found: type[MlcRayError] = getattr(importlib.import_module(places()[name]), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(places())
