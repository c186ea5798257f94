"""Responses to inspect: those to harmful prompts that comply or are unsafe, and refusals of benign prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlc_ray.report.collect import Model, Response
from mlc_ray.report.languages import language_name
from mlc_ray.stats.rates import language_order
from mlc_ray.storage import fingerprint
from mlc_ray.types import Kind

LONGEST = 1500
"""Characters shown of one text; the rest is in responses.parquet, and the report says how much that is."""
OPENING = 60
"""Characters shown of a response that is redacted: how it begins, and nothing that anybody could follow."""
_TITLES: dict[Kind, tuple[str, str]] = {
    "harmful": ("harmful prompts where the attack succeeded", "may be offensive or dangerous"),
    "benign": ("benign prompts that were refused", "may be offensive"),
}


@dataclass(frozen=True)
class Sample:
    """One response in its language, with what is known of it."""

    facts: str
    language: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Samples:
    """Some of the `total` bad responses of a model to one kind of prompt; `hidden` says why none is shown."""

    title: str
    caution: str
    shown: tuple[Sample, ...]
    total: int
    hidden: str = ""


BENIGN_SAMPLES = 8
"""Refusals of benign prompts that are shown per model."""
_HIDDEN = "left out, since such texts may be dangerous in other hands: --samples N shows N of them"


def samples(models: Sequence[Model], harmful: int, *, redact: bool = False) -> Iterator[Samples]:
    """Per model up to `harmful` responses to harmful prompts, by default of a report none, and to benign ones.

    Nothing of models whose responses are missing. With `redact` the former stand there by their first `OPENING`
    characters, without the judge's reason, which may repeat what they say.
    """
    for model in models:
        if not model.responses:
            continue
        for kind, (title, caution) in _TITLES.items():
            chosen, total = sample(model.responses, kind, harmful if kind == "harmful" else BENIGN_SAMPLES)
            hidden = _HIDDEN if total and not chosen else ""
            shown = map(_redacted if redact and kind == "harmful" else _shown, chosen)
            yield Samples(f"{model.label}: {title}", caution, tuple(shown), total, hidden)


def is_bad(response: Response) -> bool:
    """A harmful prompt whose response complies or is unsafe, or a benign one that was refused."""
    if response.kind == "harmful":
        # Where a safety judge gave a verdict it decides: complying with a warning is not unsafe.
        return response.safety == "unsafe" if response.safety is not None else response.behaviour == "complied"
    return response.behaviour == "refused"


def sample(responses: Sequence[Response], kind: Kind, size: int) -> tuple[list[Response], int]:
    """At most `size` bad responses of one kind, and how many there are.

    The languages with most of them take turns, so that one cannot fill the sample. In a language those with the worst
    margin come first where the judge gives margins; else a hash of the prompt's name decides, so that different bundles
    are shown, and for every model the same.
    """
    by_language: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        if response.kind == kind and is_bad(response):
            by_language[response.language].append(response)
    sign = 1 if kind == "harmful" else -1  # a margin above 0 leans to refusal

    def worst_first(response: Response) -> tuple[float, str]:
        margin = 0.0 if response.margin is None else sign * response.margin
        return margin, fingerprint([response.benchmark, response.bundle_id, response.language, response.sample])

    turns = sorted(by_language, key=lambda code: (-len(by_language[code]), language_order(code)))
    queues = [sorted(by_language[code], key=worst_first) for code in turns]
    longest = max(map(len, queues), default=0)
    in_turn = [queue[place] for place in range(longest) for queue in queues if place < len(queue)]
    return in_turn[:size], len(in_turn)


def _shown(response: Response) -> Sample:
    name = language_name(response.language)
    facts = [
        f"{name} ({response.language})" if name else response.language,
        response.category,
        " and ".join(filter(None, (response.behaviour, response.safety))),
        ", ".join(response.categories),
        response.reason,
        "" if response.margin is None else f"margin {response.margin:.2f} nats",
        "cut off at the length limit" if response.finish == "length" else "",
        f"{len(response.thoughts)} characters of thoughts not judged" if response.thoughts else "",
        f"bundle {response.bundle_id}" + (f", sample {response.sample}" if response.sample else ""),
    ]
    return Sample(" · ".join(filter(None, facts)), response.language, _cut(response.prompt), _cut(response.response))


def _redacted(response: Response) -> Sample:
    hidden = len(response.response) - OPENING
    text = response.response
    if hidden > 0:
        text = f"{text[:OPENING]} … ({hidden} more characters, redacted)"
    return _shown(replace(response, reason="", response=text))


def _cut(value: str) -> str:
    if not value.strip():
        return "(empty)"
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]} … ({len(value) - LONGEST} more characters)"
