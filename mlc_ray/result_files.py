"""Files of results, and of what they are of: dataclasses as JSON, read back with every fault named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mlc_ray.storage import Place, library_versions

RESULT_FILE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
"""How pydantic reads a dataclass from a result file, and the dataclasses in it: no value is coerced, no field new."""

ResultT = TypeVar("ResultT")


class ResultFileError(ValueError):
    """A result file is missing, or does not hold what its dataclass says; the message names the file and the field."""


def read_result(file: Place, kind: TypeAdapter[ResultT], expected_format: int) -> ResultT:
    """What `asdict` and JSON made of a dataclass, with its `format` beside the fields.

    Args:
        file: The JSON file.
        kind: Adapter of a dataclass whose pydantic configuration is `RESULT_FILE`.
        expected_format: The format that this version writes.

    Raises:
        ResultFileError: The file is missing or no JSON, of another format, or a field is missing, unknown or wrong.
    """
    try:
        content = _read(file)
    except FileNotFoundError:
        raise ResultFileError(f"{str(file)!r} does not exist") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != expected_format:
        raise ResultFileError(f"{str(file)!r} has format {found!r}, expected {expected_format}")
    try:
        result = kind.validate_json(json.dumps(content))
    except ValidationError as error:
        raise _damaged(file, content, _fault(error.errors()[0])) from None
    # A field that has a default may not be missing either: the default would be read as what was measured.
    whole = kind.dump_python(result, mode="json", exclude={"folder"})
    if whole != content:
        raise _damaged(file, content, f"{next(_missing(whole, content), 'a field')} is missing")
    return result


def read_fields(file: Place, kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass as a JSON file has them, all of them and no other; their values are not checked.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such file.
        ResultFileError: It is no JSON, or a field is missing or unknown.
    """
    content, names = _read(file), [each.name for each in fields(kind)]
    if not isinstance(content, dict):
        raise _damaged(file, content, f"it holds {type(content).__name__}, expected an object")
    for name in names:
        if name not in content:
            raise _damaged(file, content, f"{name} is missing")
    for name in content:
        if name not in names:
            raise _damaged(file, content, f"{name} is unknown")
    return content


def _read(file: Place) -> Any:
    try:
        return file.read_json()
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ResultFileError(f"{str(file)!r} is damaged: not valid JSON ({error})") from None


def _damaged(file: Place, content: Any, fault: str) -> ResultFileError:
    """Where the file names another version of this package, that is why, and it is not called damaged."""
    versions = content.get("versions") if isinstance(content, dict) else None
    was = versions.get("mlc_ray") if isinstance(versions, dict) else None
    now = library_versions().get("mlc_ray")
    if was is None or was == now:
        return ResultFileError(f"{str(file)!r} is damaged: {fault}")
    return ResultFileError(f"{str(file)!r} was written by mlc_ray {was}, and this is {now}: {fault}")


def _missing(whole: Any, given: Any, place: str = "") -> Iterator[str]:
    """The places in `whole` that `given` lacks."""
    if isinstance(whole, Mapping):
        for name, inner in whole.items():
            at = f"{place}.{name}" if place else str(name)
            if name in given:
                yield from _missing(inner, given[name], at)
            else:
                yield at
    elif isinstance(whole, list):
        for number, (inner, other) in enumerate(zip(whole, given, strict=True)):
            yield from _missing(inner, other, f"{place}[{number}]")


def _fault(error: ErrorDetails) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{place} is unknown"
    message = error["msg"].removeprefix("Input should be ")
    return f"{place or 'the content'} is {error['input']!r}, expected {message}"
