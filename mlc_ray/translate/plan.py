"""What a translation will ask, and about what that costs, said before anything is asked.

Tokens are estimated: by the translator's own tokenizer on some of the texts, or for an endpoint, whose tokenizer is not
at hand, by four bytes of a request a token. Texts are taken to be half as long again in tokens once they are
translated. Every translation is taken to pass, so that it is translated back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlc_ray.config import TranslateConfig, TranslatorSection
from mlc_ray.generate.translate import translation_request
from mlc_ray.translate.drafts import Draft
from mlc_ray.translate.languages import named
from mlc_ray.translate.requests import OTHER, kind_request, twin_request
from mlc_ray.translate.texts import texts_of
from mlc_ray.types import Bundle

_COUNTED = 200  # of the bundles, evenly spaced
_GROWTH = 1.5
_MARKERS = 24
_TEMPLATE = 16
_BYTES_A_TOKEN = 4.0


@dataclass(frozen=True)
class Asked:
    """Requests to one model or endpoint, with their estimated tokens; `usd` is None where no price is known."""

    what: str
    model: str
    requests: int
    read: int
    written: int
    usd: float | None = None

    def __str__(self) -> str:
        cost = "" if self.usd is None else f", about ${self.usd:.2f} at the prices given"
        return (
            f"{self.what} by {self.model}: {self.requests:,} requests, about {self.read:,} tokens to read and "
            f"{self.written:,} to write{cost}"
        )


@dataclass(frozen=True)
class Plan:
    """What there is to do, for `bundles` bundles in `shards` shards."""

    bundles: int
    shards: int
    asked: tuple[Asked, ...]

    def lines(self) -> list[str]:
        """The plan in words."""
        return [f"{self.bundles} bundles in {self.shards} shards", *map(str, self.asked)]


def plan_of(config: TranslateConfig, drafts: Sequence[Draft]) -> Plan:
    """What is to be asked about bundles, by how much some of them take."""
    chosen = drafts[:: max(1, len(drafts) // _COUNTED)]
    scale = len(drafts) / len(chosen)
    found = []
    if config.translator is not None:
        count = _counter(config.translator)
        if config.twins is not None:
            of = config.twins.of
            twins = [draft.bundle for draft in chosen if draft.bundle.kind in of]
            requests = [twin_request(bundle.prompts["en"], OTHER[bundle.kind]) for bundle in twins]
            found.append(_asked("twins", config.translator, requests, _written(count, twins), scale, count))
            kinds = [kind_request(bundle.prompts["en"]) for bundle in twins]
            judge = config.twins.judge or config.translator
            found.append(_asked("kinds of twins", judge, kinds, _MARKERS * len(kinds), scale, _counter(judge)))
        if config.languages:
            requests, written = _texts(config, chosen, count)
            found.append(_asked("translations", config.translator, requests, written, scale, count))
    if config.answers is not None:
        found.append(_answers(config, drafts))
    return Plan(len(drafts), -(-len(drafts) // config.shard_bundles), tuple(each for each in found if each.requests))


class _Counter:
    """Counts tokens as a model does, or by bytes."""

    def __init__(self, model: str | None, *, trust_remote_code: bool) -> None:
        self._tokenizer = None
        if model is not None:
            from mlc_ray.data.tokens import load_tokenizer  # takes 4 s

            self._tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)

    def __call__(self, text: str) -> float:
        if self._tokenizer is None:
            return len(text.encode("utf-8", "surrogatepass")) / _BYTES_A_TOKEN
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _counter(settings: TranslatorSection) -> _Counter:
    return _Counter(settings.model, trust_remote_code=settings.engine.trust_remote_code)


def _written(count: _Counter, bundles: Sequence[Bundle]) -> float:
    return sum(count(bundle.prompts["en"]) + _MARKERS for bundle in bundles)


def _texts(config: TranslateConfig, drafts: Sequence[Draft], count: _Counter) -> tuple[list[str], float]:
    """The requests there and back, and about how many tokens the replies have; twins are translated too."""
    requests, written = list[str](), 0.0
    for bundle in _with_twins(config, drafts):
        for text in texts_of(Draft(bundle), config.languages, answers=config.translate_answers):
            length = count(text.source)
            requests.append(translation_request(text.source, "en", named(text.language)))
            written += _GROWTH * length + _MARKERS
            if config.checks.min_chrf:
                requests.append(translation_request(text.source, text.language))
                written += length + _MARKERS
    return requests, written


def _with_twins(config: TranslateConfig, drafts: Sequence[Draft]) -> Iterator[Bundle]:
    for draft in drafts:
        yield draft.bundle
        if config.twins is not None and draft.bundle.kind in config.twins.of:
            yield Bundle("", OTHER[draft.bundle.kind], {"en": draft.bundle.prompts["en"]})


def _asked(
    what: str, settings: TranslatorSection, requests: Sequence[str], written: float, scale: float, count: _Counter
) -> Asked:
    read = sum(count(request) + _TEMPLATE for request in requests)
    usd = None
    if (endpoint := settings.endpoint) is not None:
        prices = endpoint.usd_per_million_input_tokens, endpoint.usd_per_million_output_tokens
        if any(prices):
            usd = scale * (read * prices[0] + written * prices[1]) / 1e6
    model = settings.model if endpoint is None else f"{endpoint.model} at {endpoint.base_url}"
    return Asked(what, str(model), round(scale * len(requests)), round(scale * read), round(scale * written), usd)


def _answers(config: TranslateConfig, drafts: Sequence[Draft]) -> Asked:
    """The most that a model is to answer: every prompt, and to decline where no refusal is given."""
    assert config.answers is not None
    settings, prompts, requests, read = config.answers, 0, 0, 0.0
    for bundle in _with_twins(config, drafts):
        if bundle.kind in settings.kinds:
            codes = {"en", *bundle.prompts, *config.languages} if settings.languages == "all" else {"en"}
            declining = [code for code in codes if code not in settings.refusals] if settings.pairs else []
            prompts += len(codes)
            requests += len(codes) + len(declining)
            length = len(bundle.prompts["en"].encode()) / _BYTES_A_TOKEN
            read += len(codes) * (length + _TEMPLATE) + len(declining) * (length + 5 * _TEMPLATE)
    return Asked("own answers", settings.model, requests, round(read), requests * settings.max_new_tokens)
