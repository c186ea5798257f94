"""What the documentation site takes from the code: pages of all commands, settings and errors; and plain outer links.

Run by mkdocs. Nothing here is written by hand twice: commands come from the argument parser, settings from the schemas,
errors from their classes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlc_ray import errors
from mlc_ray._registry import names, resolve
from mlc_ray.cli import build_parser
from mlc_ray.config import (
    CalibrationConfig,
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    SimulationConfig,
    StudyConfig,
    TrainConfig,
    TranslateConfig,
    UtilityConfig,
)
from mlc_ray.config.base import Section
from mlc_ray.config.component import ComponentSettings
from mlc_ray.config.objective import TapSection

FILES = {
    "A training run": ("train --config FILE", TrainConfig),
    "A score": ("score --config FILE", ScoreConfig),
    "A search": ("search --config FILE", SearchConfig),
    "A study": ("study --config FILE", StudyConfig),
    "A scaling study": ("scale --config FILE", ScaleConfig),
    "A translation": ("translate --config FILE", TranslateConfig),
    "A utility measurement": ("utility --config FILE", UtilityConfig),
    "A simulated run": ("plan --simulate FILE", SimulationConfig),
    "A calibration of a judge": ("judge --calibrate LABELLED --config FILE", CalibrationConfig),
}
SNIPPET = re.compile(r'--8<-- "[^"]+"')
OUTER_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    files.append(File.generated(config, "reference/errors.md", content=errors_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Name a file of the repository outside docs/ instead of linking it: it is no page of the site.

    Raises:
        PluginError: a line is meant to include a file, but is not written so that mkdocs does it.
    """
    for line in markdown.splitlines():
        if line.startswith("--8") and not SNIPPET.fullmatch(line):
            raise PluginError(f'{page.file.src_uri}: {line!r} includes nothing; write --8<-- "path"')
    here = Path(page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        inside = files.get_file_from_path((here / target).as_posix())
        repository = re.sub(r"^(\.\./)+", "", target)
        named = text if text.strip("`") == repository else f"{text} (`{repository}` of the repository)"
        return match[0] if inside is not None else named

    return OUTER_LINK.sub(plain, markdown)


# ------------------------------------------------------------------------------------------------------------ commands


def commands_page() -> str:
    """Every command with its own help text."""
    parser = build_parser()
    (action,) = [item for item in parser._actions if isinstance(item, argparse._SubParsersAction)]
    lines = ["# Commands", "", "`mlc-ray COMMAND --help` prints the same.", ""]
    for name, sub in action.choices.items():
        sub.formatter_class = _Wide
        lines += [f"## mlc-ray {name}", "", "```text", sub.format_help().strip(), "```", ""]
    return "\n".join(lines)


class _Wide(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


# -------------------------------------------------------------------------------------------------------------- errors


def errors_page() -> str:
    """Every error of the package: what it means, and the module that defines it, which is not imported."""
    lines = [
        "# Errors",
        "",
        "Every error that you can cause is an `MlcRayError`. Its message quotes what it is about and names the fix;",
        "the command line prints it without a traceback. `from mlc_ray.errors import NAME` imports any of them.",
        "",
        "| error | means | in |",
        "|---|---|---|",
    ]
    for name, module in sorted(errors.places().items()):
        (file,) = (f for f in (_file(module), _file(f"{module}.__init__")) if f.is_file())
        classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
        said = _first_paragraph(ast.get_docstring(next(node for node in classes if node.name == name)) or "")
        lines.append(f"| `{name}` | {_in_table(said)} | `{module}` |")
    return "\n".join([*lines, ""])


def _file(module: str) -> Path:
    return Path(errors.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")


# ------------------------------------------------------------------------------------------------------------ settings


def settings_page() -> str:
    """Every setting of every config file: name, type, default, and what it does."""
    lines = [
        "# Settings",
        "",
        "A config file is YAML; `--set section.field=value` changes one field of it, and may be repeated. Unknown",
        "fields are refused, and so are fields of a component that was not chosen. In a dotted name `N` is the number",
        "of an item of a list, from 0, and `NAME` a name that you give. `mlc-ray config --schema` prints the JSON",
        "schema.",
        "",
    ]
    for title, (command, schema) in FILES.items():
        lines += [f"## {title}", "", f"`mlc-ray {command}`. {_summary(schema)}", ""]
        lines += _section(schema, "")
    return "\n".join(lines)


def _section(schema: type[Section], prefix: str) -> list[str]:
    rows, nested = [], []
    for name, field in schema.model_fields.items():
        dotted = f"{prefix}{name}"
        component = next((m for m in field.metadata if isinstance(m, ComponentSettings)), None)
        inner = _inner(field.annotation)
        if component is not None:
            rows.append(_row(dotted, f"a {component.kind}", field))
            if ".N." not in dotted:  # a component in a list of another one has the settings shown above
                nested += list(_components(component, dotted, inner))
        elif inner is not None:
            nested += [f"**`{dotted}`**: {field.description or _summary(inner)}", ""]
            nested += _section(inner, f"{dotted}.{_repeated(field.annotation)}")
        else:
            rows.append(_row(dotted, _type(field.annotation), field))
    table = ["| field | type | default | |", "|---|---|---|---|", *rows, ""] if rows else []
    return [*table, *nested]


def _components(component: ComponentSettings, dotted: str, base: type[Section] | None) -> Iterator[str]:
    """The settings of each component that can stand at `dotted`: its own extend `base`, the type of the field."""
    for name in names(component.kind):
        found = resolve(component.kind, name)
        if component.by_key:  # the tap stands under `mlc` alone
            if issubclass(found.Settings, TapSection):
                continue
            yield f"**`{dotted}.{name}`**: {_summary(found.Settings)}"
        elif base is not None and not issubclass(found.Settings, base):
            continue
        else:
            told = found.Settings if component.kind in ("loss", "term") else found  # a class there wraps a function
            yield f"**`{dotted}`** with `{component.by}: {name}`: {_summary(told)}"
        yield ""
        yield from _section(found.Settings, f"{dotted}.{name}." if component.by_key else f"{dotted}.")


def _row(name: str, kind: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "" if value is PydanticUndefined else f"`{_yaml(value)}`"
    cells = [f"`{name}`", kind, default, field.description or ""]
    return "| " + " | ".join(map(_in_table, cells)) + " |"


def _in_table(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _yaml(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _inner(annotation: Any) -> type[Section] | None:
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return annotation
    return next((found for item in getattr(annotation, "__args__", ()) if (found := _inner(item)) is not None), None)


def _repeated(annotation: Any) -> str:
    """What stands before the fields of a section that a list (its number) or a mapping (its name) has many of."""
    origin = get_origin(annotation)
    if origin in (list, dict, Mapping):
        return "N." if origin is list else "NAME."
    return next((found for item in get_args(annotation) if (found := _repeated(item))), "")


def _type(annotation: Any) -> str:
    """A type as users write values of it: `int`, `"a" or "b"`, `list of str`."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(item) for item in arguments)
    if origin in (list, dict, tuple):
        inner = [_type(item) for item in arguments]
        return {list: f"list of {inner[0]}", dict: f"mapping to {inner[-1]}"}.get(origin, f"[{', '.join(inner)}]")
    return "null" if annotation in (None, NoneType) else getattr(annotation, "__name__", str(annotation))


def _summary(documented: Any) -> str:
    return _first_paragraph(inspect.getdoc(documented) or "")


def _first_paragraph(text: str) -> str:
    return text.split("\n\n")[0].replace("\n", " ")
