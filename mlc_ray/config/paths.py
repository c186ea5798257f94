"""Paths in settings are text: a URL such as `s3://bucket/runs` must never become the folder `./s3:`.

`RealPath` is a file or folder that any program can open, or a hub name; `StoredPath` also a URL of some storage,
`SourcePath` also that, `sample:train` and a hub name with its split, `ConfigPath` also `recipe:NAME`.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from mlc_ray._registry import UnknownComponentError, resolve
from mlc_ray.secrets import credential_in

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # `s3:/b` too: what pathlib makes of s3://b
_LIKE_URL = re.compile(r"(\w[\w+.-]+):")  # `s3:b`; one letter alone may be a drive
_HUB_SPLIT = re.compile(r"[\w.-]+(@[\w.-]+)?:[\w.-]+(#[\w./-]+)?")  # owner/name:split is not like a URL


def scheme_of(path: str) -> str | None:
    """The scheme of a URL (`s3` of `s3://bucket/runs`); None for a plain path, a hub name or `sample:train`."""
    found = _URL.match(path)
    return found[1].lower() if found else None


def real_path(path: str) -> str:
    """`path`, if it is not a URL, is not like one (`s3:bucket`), and has no space before or after it.

    Raises:
        ValueError: it is or has; the message says what to give instead.
    """
    _refuse_credentials(path)
    if path != path.strip():
        raise ValueError("it begins or ends with white space; leave that out")
    scheme = scheme_of(path)
    if scheme is None:
        if like := _LIKE_URL.match(path):
            raise ValueError(
                f"it begins with {like[0]} as a URL does; give a path on storage that all nodes share, e.g. "
                f"/shared/runs, or ./{path} if it is called that here"
            )
        return path
    if scheme == "file":
        raise ValueError("write a plain path, without file://")
    if scheme in ("hf", "http", "https"):
        raise ValueError(
            f"nothing is downloaded from {scheme}://; give a local path, or the name of a model or data set on the "
            "hub alone, e.g. owner/name"
        )
    raise ValueError(
        f"{scheme}:// cannot be opened here; give a path on storage that all nodes share, e.g. /shared/runs (a bucket "
        "that is mounted on every node has one)"
    )


def stored_path(path: str) -> str:
    """`path`, if it is not a URL, or is one whose scheme a registered storage serves.

    Raises:
        ValueError: no storage is registered for its scheme, or it has not two slashes behind it; the message says what
            to give instead.
    """
    _refuse_credentials(path)
    scheme = scheme_of(path)
    if scheme in (None, "file"):
        return real_path(path)
    try:
        resolve("storage", str(scheme))
    except UnknownComponentError:
        return real_path(path)
    _, slashes, rest = path.partition("://")
    if not slashes or rest.startswith("/"):
        raise ValueError(f"write {path.partition(':')[0]}://{path.partition(':')[2].lstrip('/')}, with two slashes")
    return path


def source_path(path: str) -> str:
    """`path` as of `stored_path`; `sample:train` and hub names with a split (`NAME@CONFIG:SPLIT#REVISION`) are no URLs.

    Raises:
        ValueError: as `stored_path`.
    """
    return path if path.startswith("sample:") or _HUB_SPLIT.fullmatch(path) else stored_path(path)


def config_path(path: str) -> str:
    """`path`, if it is not a URL; `recipe:NAME` is none.

    Raises:
        ValueError: as `real_path`.
    """
    return path if path.startswith("recipe:") else real_path(path)


def _refuse_credentials(path: str) -> None:
    if scheme_of(path) is not None and (found := credential_in(path)) is not None:
        raise ValueError(
            f"it carries {found}, which folders and logs would keep; leave that out: credentials come from the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN, ...)"
        )


RealPath = Annotated[str, AfterValidator(real_path)]
StoredPath = Annotated[str, AfterValidator(stored_path)]
SourcePath = Annotated[str, AfterValidator(source_path)]
ConfigPath = Annotated[str, AfterValidator(config_path)]
