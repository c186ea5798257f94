"""Credentials in texts: what they look like, and texts without them. Settings, errors and logs all go by this module.

Folders of runs, scores and searches, logs and trackers keep what they are given, and are shown around. So settings that
carry a credential are refused (`credential_in`, `secret_fields`), and messages are written without any (`hide`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "..."

_NAMES = (
    r"(?:[\w.-]*[_.-])?(?:api[_-]?key|apikey|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?(?:access[_-]?)?key)?|"
    r"private[_-]?key|auth[_-]?token|access[_-]?token|security[_-]?token|session[_-]?token|token|password|passwd|"
    r"signature|credentials?|authorization|cookie)"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"(?:bos|cls|eos|mask|pad|sep|stop|unk)_token", re.IGNORECASE)  # a tokenizer's
# Behind the letters of a scheme, and without them in front: looked for from each letter, a long word would take the
# square of its length. AWS's secret keys have slashes, so one may follow a colon that no port does.
_USERINFO = re.compile(
    r"(?P<scheme>(?<=[A-Za-z0-9+.-]):/{1,2})"
    r"(?:[^\s/?#'\"]+|[^\s/?#'\":@]+:(?!\d+(?:[/?#\s'\"]|$))[^\s?#'\"]{1,256})@"
)
_URI_WITH_USER = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*{_USERINFO.pattern}")
_QUERY = re.compile(rf"(?P<name>[?&](?:{_NAMES}|sig|key)=)[^\s&#'\"]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(?P<name>\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?|\bbearer)\s+[^\s'\",;}]+", re.I
)
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![\w.-])(?!(?:bos|cls|eos|mask|pad|sep|stop|unk)_token){_NAMES}"
    r"(?:['\"]\s*[:=]\s*['\"]|\s*[:=]\s*['\"]?))[^\s'\",;&}]{8,}",  # 'NAME': WORD is prose about a name
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(?:.*_)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_ID)?", re.IGNORECASE)
_SHORTEST = 8  # characters of a value of the environment that is looked for: shorter ones occur in any text


def is_secret_name(name: str) -> bool:
    """Whether a field, header or variable of this name holds a credential: `api_key`, `hf_token`, `X-Api-Key`."""
    return _SECRET_NAME.fullmatch(name) is not None and _SPECIAL_TOKEN.fullmatch(name) is None


def credential_in(uri: str) -> str | None:
    """What of a URI or path is a credential, in words; None where nothing is."""
    if _URI_WITH_USER.match(uri):
        return "a user name or password"
    return "a signature or key in its query" if _QUERY.search(uri) else None


def secret_fields(value: Any, name: str = "") -> Iterator[str]:
    """The dotted names of fields in nested settings that hold a text, and are called as a credential is."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            dotted = f"{name}.{key}" if name else str(key)
            if isinstance(inner, str) and is_secret_name(str(key)):
                yield dotted
            else:
                yield from secret_fields(inner, dotted)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secret_fields(inner, f"{name}.{index}")


def hide(text: str) -> str:
    """`text` without credentials.

    Left out are user and password of a URI, signatures and keys in its query, authorization headers, what is written
    behind `api_key=`, `token:` and the like, and the value of every variable of this process's environment whose name
    ends in KEY, KEY_ID, TOKEN, SECRET, PASSWORD or CREDENTIALS, of 8 characters or more.
    """
    for value in _environment():
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<name> {HIDDEN}", text)
    return _ASSIGNED.sub(rf"\g<name>{HIDDEN}", text)


def _environment() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _VARIABLE.fullmatch(name) and not os.path.isabs(value)
    }
    return sorted(found, key=len, reverse=True)  # one may be a part of another
