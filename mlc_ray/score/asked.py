"""What endpoints are asked, estimated beforehand: requests, tokens, and dollars at the prices that settings give.

A tokenizer of an endpoint is not at hand: four bytes count as a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from mlc_ray.config import EndpointSection, JudgeSettings
from mlc_ray.generate.translate import translation_request
from mlc_ray.judges.base import make_judge
from mlc_ray.judges.panel import PanelJudge
from mlc_ray.score.plan import plan_judging
from mlc_ray.types import Kind

BYTES_A_TOKEN = 4.0
MARKERS = 24
"""Tokens that a translation has beside its text."""
_JUDGED, _VERDICT = 500, 32  # tokens of an endpoint judge's instructions and of its reply


@dataclass(frozen=True)
class Asked:
    """Requests to one model or endpoint, with their estimated tokens; `usd` is None where no price is known.

    `cap` is `max_cost_usd` of the endpoint's section, which has a purse of its own.
    """

    what: str
    model: str
    requests: int
    read: int
    written: int
    usd: float | None = None
    cap: float | None = None

    def times(self, number: int) -> Asked:
        """The same so often."""
        usd = None if self.usd is None else number * self.usd
        counts = {name: number * getattr(self, name) for name in ("requests", "read", "written")}
        return replace(self, **counts, usd=usd)

    def __str__(self) -> str:
        cost = "" if self.usd is None else f", about ${self.usd:,.2f} at the prices given"
        return (
            f"{self.what} by {self.model}: {self.requests:,} requests, about {self.read:,} tokens to read and "
            f"{self.written:,} to write{cost}"
        )


def by_endpoint(what: str, endpoint: EndpointSection, requests: int, read: float, written: float) -> Asked:
    """So many requests with so many tokens, and what an endpoint takes for them."""
    prices = endpoint.usd_per_million_input_tokens, endpoint.usd_per_million_output_tokens
    usd = (read * prices[0] + written * prices[1]) / 1e6 if any(prices) else None
    name = f"{endpoint.model} at {endpoint.base_url}"
    return Asked(what, name, requests, round(read), round(written), usd, endpoint.max_cost_usd)


def endpoints_of(settings: JudgeSettings) -> list[EndpointSection]:
    """The endpoints that a judge asks, itself, in its panel, or to translate for it."""
    translator = settings.translator
    found = [getattr(settings, "endpoint", None), None if translator is None else translator.endpoint]
    if isinstance(settings, PanelJudge.Settings):
        found += [endpoint for member in settings.judges for endpoint in endpoints_of(member.judge)]
    return [endpoint for endpoint in found if endpoint is not None]


def asked_to_judge(
    settings: JudgeSettings, asked: Sequence[tuple[Kind, str, float]], most: int, *, what: str = "verdicts"
) -> Iterator[Asked]:
    """What a judge asks endpoints about answers: each is taken to be as long as it may be, and none asked twice.

    Args:
        settings: the judge's.
        asked: of each answer the kind, the language and the tokens of its prompt.
        most: tokens of an answer.
        what: the name of these verdicts.

    Raises:
        UncoveredLanguageError: No judge may be asked about a language.
    """
    if not asked or not endpoints_of(settings):
        return
    kinds, languages, _ = zip(*asked, strict=True)
    judging = plan_judging(make_judge(settings), pa.table({"kind": kinds, "language": languages}))
    translator, ways = settings.translator, judging.translated or {}
    if translator is not None and translator.endpoint is not None:
        texts = [n for _, code, length in asked if ways.get(code) == "translated" for n in (length, most)]
        read = sum(texts) + len(texts) * len(translation_request("", "en").encode()) / BYTES_A_TOKEN
        written = sum(texts) + len(texts) * MARKERS
        yield by_endpoint("translations for the judge", translator.endpoint, len(texts), read, written)
    for reader in judging.readers:
        endpoint = getattr(reader.judge.settings, "endpoint", None)
        if reader.judge.runs == "service" and endpoint is not None:
            lengths = [length for kind, code, length in asked if (kind, code) in reader.cells]
            read = sum(lengths) + len(lengths) * (most + _JUDGED)
            yield by_endpoint(what, endpoint, len(lengths), read, len(lengths) * _VERDICT)
