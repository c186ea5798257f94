"""The HTML of what may offend: responses that should not have been given, or refusals that should not. Folded away."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.report import markup
from mlc_ray.report.collect import Model, Response
from mlc_ray.report.languages import language_name
from mlc_ray.report.markup import text
from mlc_ray.report.samples import sample
from mlc_ray.types import Kind

LONGEST = 1500
"""Characters shown of one text; the rest is in responses.parquet, and the report says how much that is."""
_TITLES: dict[Kind, str] = {
    "harmful": "harmful prompts that got what they asked for",
    "benign": "benign prompts that were refused",
}


def samples(models: Sequence[Model], size: int) -> str:
    """Per model and side up to `size` responses; empty if no responses are at hand."""
    parts = [_side(model, kind, size) for model in models if model.responses for kind in _TITLES]
    if not parts:
        return ""
    warning = (
        '<p class="soft">Chosen so that languages take turns, those with most failures first; in each the worst margin '
        "first, else by a hash. Translations are not shown: the texts are what was sent and answered.</p>"
    )
    return warning + "".join(parts)


def _side(model: Model, kind: Kind, size: int) -> str:
    chosen, total = sample(model.responses, kind, size)
    title = f"{text(model.label)}: {_TITLES[kind]}"
    if not total:
        return f"<p><strong>{title}</strong>: none</p>"
    caution = "may be offensive or dangerous" if kind == "harmful" else "may be offensive"
    intro = f"<p><strong>Caution:</strong> model output, shown as it is; it {caution}.</p>"
    summary = f"{title} <small>{len(chosen)} of {total}, {caution}</small>"
    return markup.details(summary, intro + "".join(map(_answer, chosen)))


def _answer(response: Response) -> str:
    name = language_name(response.language)
    facts = [
        f"{name} ({response.language})" if name else response.language,
        response.category,
        " and ".join(filter(None, (response.behaviour, response.safety))),
        ", ".join(response.categories),
        response.reason,
        "" if response.margin is None else f"margin {response.margin:.2f} nats",
        "cut off at the length limit" if response.finish == "length" else "",
        f"bundle {response.bundle_id}",
    ]
    prompt, answer = (_cut(value) for value in (response.prompt, response.response))
    return (
        f'<article class="answer"><p class="soft">{text(" · ".join(filter(None, facts)))}</p>'
        f"{markup.spoken(prompt, response.language, 'p')}{markup.spoken(answer, response.language, 'blockquote')}"
        "</article>"
    )


def _cut(value: str) -> str:
    if not value.strip():
        return "(empty)"
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]} … ({len(value) - LONGEST} more characters)"
