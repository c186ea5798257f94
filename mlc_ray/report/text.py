"""Formatting of numbers and texts: the one place that rounds, and the one that removes control characters."""

from __future__ import annotations

import math
import os
import re
from ipaddress import IPv6Address

ABSENT = "·"
"""Shown where there is no value."""

_SAME = 1e-9  # rates are quotients of whole numbers: what is nearer than this is the same
# What HTML and terminals cannot hold, and what turns text around (marks, embeddings, overrides, isolates).
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


# A URL, or a path: in quotation marks, from a drive, ~ or /, of two slashes or more, or of one behind a name that
# folders have and nobody on the hub. Else what has one slash is a path if it is there: "and/or", "Qwen/Qwen3-8B" stay.
_FOLDERS = (
    "models?|checkpoints?|ckpts?|weights|adapters?|runs?|scores?|exports?|outputs?|results?|data|datasets|artifacts|"
    "experiments|mnt|tmp|scratch|workspace|projects"
)
_END = r"[^\s'\"<>,;)]"
_PATH = re.compile(
    rf"(?P<quote>['\"])(?=[^'\"\n]*[/\\])(?P<quoted>[^'\"\n]+)(?P=quote)"
    rf"|\b[a-zA-Z][a-zA-Z0-9+.-]{{0,30}}://{_END}+|\b[A-Za-z]:\\{_END}+|(?<![\w.])(?:~|\.{{1,2}})?/{_END}+"
    rf"|(?<![\w/.-])[\w.-]+(?:/[\w.@-]+){{2,}}/?|(?<![\w/.-])(?:{_FOLDERS})/[\w.@-]*\w/?"
    r"|(?<![\w/.-])(?P<may>[\w.-]+/[\w.-]*\w)"
)
# Addresses; a name with a port; who is at one ("ASR@k" and "pass@10" are none); names under a domain. One of two
# letters may be a file's ending, so it counts behind two parts alone. A setting (`engine.dtype`) is none of these.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAINS = (
    "internal|local|localdomain|localhost|lan|corp|intranet|intra|home|private|svc|cluster|com|org|net|edu|gov|mil|int|"
    "io|ai|dev|cloud|app|tech"
)
_HOST = re.compile(
    r"\[(?:[0-9A-Fa-f]{0,4}:){2,}[0-9A-Fa-f:.]*(?:%[\w.-]+)?\](?::\d+)?"
    r"|(?<![\w:.%])(?P<v6>(?:[0-9A-Fa-f]{0,4}:){2,}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}))(?:%\w+)?(?![\w:])"
    r"|\b(?:\d{1,3}(?:\.\d{1,3}){3}|localhost)\b(?::\d+)?"
    rf"|(?<![\w.+-])[\w.+-]{{1,64}}@[A-Za-z][\w-]+(?:\.[\w-]+)*(?::\d+)?"
    rf"|\b(?:{_LABEL}\.){{1,9}}(?=[A-Za-z]){_LABEL}:\d+|\b[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?:(?:\d{{4,5}}|80|443)\b"
    rf"|\b(?:{_LABEL}\.){{1,9}}(?:{_DOMAINS})\b(?![\w.-]*[\w])"
    rf"|\b(?:{_LABEL}\.){{2,9}}(?!py|md|sh|so|gz|js|ts|db|h5|pt)[a-z]{{2}}\b(?![\w.-]*[\w])"
)


def without_paths(value: str) -> str:
    """`value` with of each URL and path the last part alone, `…/name`, and of a host, or a URL without a path, `…`.

    A host that is a bare word is like any other word, and stays.
    """
    return _HOST.sub(_no_host, _PATH.sub(_last_part, value))


def _no_host(match: re.Match[str]) -> str:
    address = match["v6"]
    if address is None:
        return "…"
    try:
        IPv6Address(address)
    except ValueError:  # a time of day, or an IPv4 address behind more than that
        return "…" if "." in address else match[0]
    return "…" if re.search(r"\d", address) else match[0]  # "a::b" is a name of C++


def _last_part(match: re.Match[str]) -> str:
    if match["may"] and not os.path.exists(match["may"]):
        return match[0]
    found, quote = (match["quoted"], match["quote"]) if match["quoted"] else (match[0], "")
    _, separator, rest = found.rpartition("://")
    path = re.split(r"[?#]", rest)[0].replace("\\", "/").rstrip("/")
    if separator and "/" not in path:  # a host, or a bucket
        return f"{quote}…{quote}"
    return f"{quote}…/{path.rpartition('/')[2]}{quote}"


def clean(value: str) -> str:
    """`value` with a replacement character for each control character, those of text direction among them."""
    return _FORBIDDEN.sub("\ufffd", value)


def percent(value: float | None, digits: int = 1) -> str:
    """A rate in %: `98.1`. Only an exact 0 or 100 is shown as such; what rounds to it is `<0.1` or `>99.9`."""
    if value is None:
        return ABSENT
    for end in (0, 100):
        if abs(value - end) < _SAME:
            return f"{end:.{digits}f}"
    # Halves away from 0: 12.5 is 13, where Python's own rounding says 12.
    shown = math.floor(value + 0.5) if digits == 0 else round(value, digits)
    unit = 10.0**-digits
    if value > 0 >= shown:
        return f"<{unit:.{digits}f}"
    if value < 100 <= shown:
        return f">{100 - unit:.{digits}f}"
    return f"{shown:.{digits}f}"


def whole(value: float | None) -> str:
    """A rate in % without digits: `98`, and `>99` or `<1` where it would be rounded to 100 or 0."""
    return percent(value, 0)


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points: `+12.0`, with a real minus sign; a dot where there is none.

    As with rates only an exact 0 or 100 is shown as such; else it is `+<0.1` or `−>99.9`.
    """
    return ABSENT if value is None else f"{'−' if value < -_SAME else '+'}{percent(abs(value), digits)}"


def fraction(value: float | None) -> str:
    """A number from 0 to 1: `0.981`, and `<0.001` or `>0.999` where it would be rounded to 0 or 1."""
    if value is None:
        return ABSENT
    if 0 < value < 1 and not 0.0005 <= value < 0.9995:
        return "<0.001" if value < 0.5 else ">0.999"
    return f"{value:.3f}"


def variance(value: float | None) -> str:
    """A `var`: `13.14`, and `<0.01` where it would be rounded to 0."""
    return ABSENT if value is None else percent(value, 2)


def p_value(p: float) -> str:
    """`p < 0.001`, `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def short(value: float) -> str:
    """Any number in about three digits: `0.0833`, `1e−06`."""
    if value == 0:
        return "0"
    digits = f"{value:.0e}" if abs(value) >= 1e5 or abs(value) < 1e-4 else f"{value:.3g}"
    return digits.replace("-", "−")
