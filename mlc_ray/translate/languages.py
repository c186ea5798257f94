"""How a language is named: to a model, and to people."""

from __future__ import annotations

from mlc_ray.generate.translate import Language
from mlc_ray.report.languages import NAMES, language_name

_MEANT = {
    # Codes of countries and outdated ones that are of no language; `kr`, `se` and `si` are, and are taken.
    "al": "sq", "by": "be", "cn": "zh", "cz": "cs", "dk": "da", "ge": "ka", "gr": "el", "il": "he", "ir": "fa",
    "iw": "he", "jp": "ja", "kz": "kk", "rs": "sr", "ua": "uk", "vn": "vi",
    # What ISO 639-2 has for bibliographers.
    "alb": "sq", "arm": "hy", "baq": "eu", "bur": "my", "chi": "zh", "cze": "cs", "dut": "nl", "fre": "fr",
    "geo": "ka", "ger": "de", "gre": "el", "ice": "is", "mac": "mk", "mao": "mi", "may": "ms", "per": "fa",
    "rum": "ro", "slo": "sk", "tib": "bo", "wel": "cy",
}  # fmt: skip


def named(code: str) -> Language:
    """A language as requests name it; one without a known name is named by its code."""
    return Language(language_name(code) or f"the language {code!r}", code)


def meant(code: str) -> str:
    """What a code without a known name was probably meant for; empty where that is not sure.

    One of three letters is that of ISO 639-3, of the languages that lingua knows.
    """
    from lingua import IsoCode639_3
    from lingua import Language as Known

    primary, *more = code.split("-")
    near = _MEANT.get(primary, "")
    if not near and (known := getattr(IsoCode639_3, primary.upper(), None)) is not None:
        near = Known.from_iso_code_639_3(known).iso_code_639_1.name.lower()
    return "-".join([near, *more]) if near in NAMES else ""
