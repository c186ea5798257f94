"""What a translation will ask, and about what that costs, said before anything is asked.

Tokens are estimated: by the translator's own tokenizer on some of the texts, or for an endpoint, whose tokenizer is not
at hand, by four bytes of a request a token. Texts are taken to be half as long again in tokens once they are
translated. Every translation is taken to pass, so that it is translated back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mlc_ray.config import TranslateConfig, TranslatorSection
from mlc_ray.config.translate import OnPolicySection
from mlc_ray.data.bundles import pair_number
from mlc_ray.generate.translate import translation_request
from mlc_ray.report.languages import name_and_code
from mlc_ray.score.asked import BYTES_A_TOKEN, MARKERS, Asked, asked_to_judge, by_endpoint
from mlc_ray.translate.answers import answered_in, unlike_openings
from mlc_ray.translate.drafts import Draft
from mlc_ray.translate.languages import named
from mlc_ray.translate.requests import OTHER, kind_request, twin_request
from mlc_ray.translate.texts import texts_of
from mlc_ray.types import Bundle, Kind

_COUNTED = 200  # of the bundles of a kind, evenly spaced
_GROWTH = 1.5
_TEMPLATE = 16


@dataclass(frozen=True)
class Plan:
    """What there is to do, for `bundles` bundles in `shards` shards, which are translated into `languages`."""

    bundles: int
    shards: int
    asked: tuple[Asked, ...]
    warnings: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan in words; languages by their names, which show a code of another one than was meant."""
        into = f", into {', '.join(map(name_and_code, self.languages))}" if self.languages else ""
        return [f"{self.bundles} bundles in {self.shards} shards{into}", *map(str, self.asked), *self.warnings]


def plan_of(config: TranslateConfig, drafts: Sequence[Draft]) -> Plan:
    """What is to be asked about bundles: requests are counted over all, tokens by what some of each kind take."""
    found = list[Asked]()
    if config.translator is not None:
        count = _counter(config.translator)
        if config.twins is not None:
            of, judge = config.twins.of, config.twins.judge or config.translator
            found.append(_asked("twins", config.translator, drafts, partial(_twin, of), count))
            found.append(_asked("kinds of twins", judge, drafts, partial(_kind, of), _counter(judge)))
        if config.languages:
            found.append(_asked("translations", config.translator, drafts, partial(_texts, config), count))
    if config.answers is not None:
        found += _answers(config, config.answers, drafts)
    shards = -(-len(drafts) // config.shard_bundles)
    unlike = [] if config.answers is None else unlike_openings(config.answers)
    warnings = tuple(text for text in (_english_twins(config, drafts), _too_long(config, drafts), *unlike) if text)
    asked = tuple(each for each in found if each.requests)
    return Plan(len(drafts), shards, asked, warnings, tuple(config.languages))


def _english_twins(config: TranslateConfig, drafts: Sequence[Draft]) -> str:
    """What is to be said of bundles with prompts in languages that their twins will not have."""
    of = [] if config.twins is None else config.twins.of
    lacked = {code for draft in drafts if draft.bundle.kind in of for code in draft.bundle.prompts}
    if not (lacked := lacked - {"en", *config.languages}):
        return ""
    return (
        f"bundles have prompts in {', '.join(sorted(lacked))} and their twins will have none, so that a model may tell "
        "the kinds by their languages: add these to languages, or translate what is written by a second command"
    )


def _too_long(config: TranslateConfig, drafts: Sequence[Draft]) -> str:
    """What is to be said of texts whose translation may be longer than the translator may write, by their bytes."""
    settings = config.translator
    if settings is None or not config.languages:
        return ""
    most = settings.max_new_tokens if settings.endpoint is None else settings.endpoint.max_reply_tokens
    assert most is not None, "decided by now (TranslatorSection.for_texts_of)"
    sources = [
        text.source
        for draft in drafts
        for text in texts_of(draft, config.languages, answers=bool(config.translate_answers))
    ]
    long = sum(_GROWTH * len(source.encode()) / BYTES_A_TOKEN + MARKERS > most for source in sources)
    if not long:
        return ""
    setting = "max_new_tokens" if settings.endpoint is None else "endpoint.max_reply_tokens"
    return (
        f"{long:,} of {len(sources):,} translations may be cut off at translator.{setting}={most}, and be rejected; "
        "raise it"
    )


class _Counter:
    """Counts tokens as a model does, or by bytes."""

    def __init__(self, model: str | None, *, trust_remote_code: bool) -> None:
        self._tokenizer = None
        if model is not None:
            from mlc_ray.data.tokens import load_tokenizer  # takes 4 s

            self._tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)

    def __call__(self, text: str) -> float:
        if self._tokenizer is None:
            return len(text.encode("utf-8", "surrogatepass")) / BYTES_A_TOKEN
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _counter(settings: TranslatorSection) -> _Counter:
    return _Counter(settings.model, trust_remote_code=settings.engine.trust_remote_code)


@dataclass(frozen=True)
class _Request:
    """A request that is made only where its tokens are counted: its reply has `growth` of the tokens of `text`."""

    text: str
    made: Callable[[], str]
    growth: float


def _twin(of: Sequence[Kind], draft: Draft) -> list[_Request]:
    prompt, kind = draft.bundle.prompts["en"], draft.bundle.kind
    return [_Request(prompt, partial(twin_request, prompt, OTHER[kind]), 1)] if kind in of else []


def _kind(of: Sequence[Kind], draft: Draft) -> list[_Request]:
    prompt = draft.bundle.prompts["en"]
    return [_Request(prompt, partial(kind_request, prompt), 0)] if draft.bundle.kind in of else []


def _texts(config: TranslateConfig, draft: Draft) -> list[_Request]:
    """The requests there and back; twins are translated too."""
    found = list[_Request]()
    for bundle in _with_twins(config, [draft]):
        for text in texts_of(Draft(bundle), config.languages, answers=bool(config.translate_answers)):
            there = partial(translation_request, text.source, "en", named(text.language))
            found.append(_Request(text.source, there, _GROWTH))
            if config.checks.min_chrf:
                found.append(_Request(text.source, partial(translation_request, text.source, text.language), 1))
    return found


def _with_twins(config: TranslateConfig, drafts: Sequence[Draft]) -> Iterator[Bundle]:
    for draft in drafts:
        yield draft.bundle
        if config.twins is not None and draft.bundle.kind in config.twins.of:
            yield Bundle("", OTHER[draft.bundle.kind], {"en": draft.bundle.prompts["en"]})


def _asked(
    what: str,
    settings: TranslatorSection,
    drafts: Sequence[Draft],
    requests_of: Callable[[Draft], list[_Request]],
    count: _Counter,
) -> Asked:
    requests, read, written = 0, 0.0, 0.0
    for kind in OTHER:
        asking = [(draft, n) for draft in drafts if draft.bundle.kind == kind and (n := len(requests_of(draft)))]
        if not asking:
            continue
        step = max(1.0, len(asking) / _COUNTED)
        chosen = [asking[int(at * step)][0] for at in range(min(_COUNTED, len(asking)))]
        counted = [request for draft in chosen for request in requests_of(draft)]
        asked = sum(n for _, n in asking)
        scale = asked / len(counted)
        requests += asked
        read += scale * sum(count(request.made()) + _TEMPLATE for request in counted)
        written += scale * sum(request.growth * count(request.text) + MARKERS for request in counted)
    if (endpoint := settings.endpoint) is None:
        return Asked(what, str(settings.model), requests, round(read), round(written))
    return by_endpoint(what, endpoint, requests, read, written)


def _answers(config: TranslateConfig, settings: OnPolicySection, drafts: Sequence[Draft]) -> Iterator[Asked]:
    """The most that a model is to answer, and its judging: prompts that are asked, and to decline without a refusal.

    Every answer is taken to be as long as it may be.
    """
    asked = list[tuple[Kind, str, float]]()  # of each request: of what kind and language its prompt is, and how long
    read = 0.0
    among = {code for draft in drafts for code in draft.bundle.prompts} | {*config.languages}
    for bundle in _with_twins(config, drafts):
        if bundle.kind in settings.kinds:
            codes = answered_in(settings, pair_number(bundle), {*bundle.prompts, *config.languages}, among)
            declining = codes - settings.refusals.keys() if settings.needs_refusal(bundle.kind) else set[str]()
            length = len(bundle.prompts["en"].encode()) / BYTES_A_TOKEN
            plainly = [code for code in codes if settings.asks(bundle.kind, code)]
            asked += [(bundle.kind, code, length) for code in (*plainly, *declining)]
            read += len(plainly) * (length + _TEMPLATE) + len(declining) * (length + 5 * _TEMPLATE)
    if not asked:
        return
    most = settings.max_new_tokens
    yield Asked("own answers", settings.model, len(asked), round(read), len(asked) * most)
    yield from asked_to_judge(settings.judge, asked, most, what="verdicts on own answers")
