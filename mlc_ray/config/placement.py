"""On which nodes of a cluster something runs, and which variables of the driver's environment it gets there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import AfterValidator, Field

_VALUE = re.compile(r"(?P<no>!?)(in\((?P<several>[\w.-]+(\s*,\s*[\w.-]+)*)\)|(?P<one>[\w.-]+))")
_NAME = re.compile(r"[A-Za-z_*?\[][\w*?!\[\]-]*")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one that `selector` asks for; a negated value takes nodes without that label."""
    return all(_takes(value, labels.get(name)) for name, value in selector.items())


def _takes(value: str, label: str | None) -> bool:
    found = _VALUE.fullmatch(value)
    assert found is not None, "checked by LabelSelector"
    values = re.split(r"\s*,\s*", found["several"]) if found["several"] else [found["one"]]
    return (label in values) != bool(found["no"])


def _selector(selector: dict[str, str]) -> dict[str, str]:
    for name, value in selector.items():
        if not name or _VALUE.fullmatch(value) is None:
            raise ValueError(
                f"label_selector {name!r}: {value!r} is not what Ray selects nodes by; write VALUE, !VALUE, "
                "in(VALUE,VALUE) or !in(VALUE,VALUE)"
            )
    return selector


def _names(names: list[str]) -> list[str]:
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise ValueError(
                f"env has {name!r}, which is no name of a variable; give names, or patterns such as "
                "WANDB_*, and no values: those are taken from the environment of this command"
            )
        if name.startswith(("RAY_", "*", "?", "[")) or fnmatchcase("RAY_ADDRESS", name):
            raise ValueError(f"env has {name!r}, which would take variables that Ray sets for itself; name others")
    return names


LabelSelector = Annotated[dict[str, str], AfterValidator(_selector)]
"""Labels that nodes must have, by name, as Ray selects them: VALUE, !VALUE, in(A,B) or !in(A,B)."""
VariableNames = Annotated[list[str], AfterValidator(_names)]
"""Names of environment variables; `*`, `?` and `[...]` stand for others as in a shell."""

ENV: Any = Field(
    [],
    description="Variables of this command's environment that all workers of a joined cluster get, by name or pattern: "
    "e.g. `[HF_TOKEN, WANDB_*, AWS_*, NCCL_*]`. Their values are written nowhere.",
)
"""The field that names them."""
