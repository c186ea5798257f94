"""What a translation will ask: requests are counted over all bundles, and nobody who is asked is left out."""

from __future__ import annotations

from typing import Any

from mlc_ray.config import TranslateConfig, parse_config
from mlc_ray.translate.drafts import Draft, remade
from mlc_ray.translate.plan import Asked, plan_of
from mlc_ray.types import Bundle, Kind

ENDPOINT = {"base_url": "http://localhost:1/v1", "model": "m", "usd_per_million_input_tokens": 1.0}


def planned(kinds: list[Kind], **fields: Any) -> dict[str, Asked]:
    """The plan for a bundle of each kind in order; every other one has a Spanish prompt already."""
    drafts = []
    for at, kind in enumerate(kinds):
        spanish = {"es": "¿Cómo?"} if at % 2 else {}
        drafts.append(Draft(remade(Bundle("", kind, {"en": f"How do I cook rice number {at}?", **spanish}))))
    raw = {"name": "n", "sources": [{"path": "sample:train"}], **fields}
    return {each.what: each for each in plan_of(parse_config(TranslateConfig, raw), drafts).asked}


def test_kinds_and_languages_that_alternate_are_counted_exactly() -> None:
    kinds: list[Kind] = ["harmful", "benign"] * 400
    asked = planned(kinds, languages=["es"], translator={"endpoint": ENDPOINT}, twins={"of": ["harmful"]})
    assert (asked["twins"].requests, asked["kinds of twins"].requests) == (400, 400)
    assert asked["translations"].requests == 2 * (400 + 400)  # the harmful ones lack Spanish, and so do their twins
    swapped = planned(kinds, languages=["es"], translator={"endpoint": ENDPOINT}, twins={"of": ["benign"]})
    assert swapped["twins"].requests == 400 and swapped["translations"].requests == 2 * (400 + 400)


def test_own_answers_come_with_refusals_and_verdicts() -> None:
    judge = {"name": "endpoint", "endpoint": ENDPOINT}
    section = {"model": "m", "kinds": ["harmful", "benign"], "pairs": False, "judge": judge}
    asked = planned(["harmful", "benign"], answers=section)
    assert asked["own answers"].requests == 3  # a harmful prompt is declined whatever pairs says
    assert asked["verdicts on own answers"].requests == 3 and (asked["verdicts on own answers"].usd or 0) > 0
    assert planned(["benign"], answers={"model": "m"}).keys() == {"own answers"}
    given = {**section, "refusals": {"en": "I can't help with that."}}
    assert planned(["harmful", "benign"], answers=given)["own answers"].requests == 1  # the benign prompt


def test_a_judges_translator_is_asked_about_languages_that_the_judge_does_not_know() -> None:
    judge = {"name": "refusal", "translate": {"endpoint": ENDPOINT}}
    section = {"model": "m", "languages": "all", "judge": judge}
    more = {"languages": ["fi", "es"], "translator": {"endpoint": ENDPOINT}}
    asked = planned(["benign"], answers=section, **more)
    assert asked["own answers"].requests == 6
    assert asked["translations for the judge"].requests == 4  # Finnish: two prompts, an answer and a refusal


def test_twins_without_the_languages_of_their_bundles_are_warned_of() -> None:
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "translator": {"endpoint": ENDPOINT}}
    spanish = Bundle("", "harmful", {"en": "How?", "es": "¿Cómo?"})
    drafts = [Draft(spanish), Draft(Bundle("", "benign", {"en": "Why?"}))]
    given: list[tuple[dict[str, Any], bool]] = [
        ({"twins": {}}, True),
        ({"twins": {}, "languages": ["es"]}, False),
        ({"languages": ["fr"]}, False),
        ({"twins": {"of": ["benign"]}}, False),
    ]
    for more, told in given:
        found = plan_of(parse_config(TranslateConfig, {**raw, **more}), drafts)
        assert any("prompts in es and their twins will have none" in text for text in found.warnings) == told
        assert found.lines()[-1:] == list(found.warnings) or not told


def test_the_plan_names_the_languages() -> None:
    """`kr` is a language, and not that of Korea."""
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "translator": {"endpoint": ENDPOINT}}
    config = parse_config(TranslateConfig, {**raw, "languages": ["zh-Hant", "kr"]})
    drafts = [Draft(Bundle("", "benign", {"en": "How?"}))]
    assert plan_of(config, drafts).lines()[0] == (
        "1 bundles in 1 shards, into Chinese (traditional) (zh-Hant), Kanuri (kr)"
    )
    answers = parse_config(TranslateConfig, {"name": "n", "sources": raw["sources"], "answers": {"model": "m"}})
    assert plan_of(answers, drafts).lines()[0] == "1 bundles in 1 shards"


def test_refusals_that_begin_with_no_opening_are_warned_of() -> None:
    given = {
        "en": "I'm sorry, but I can't help with that.",
        "es": "lo siento, pero no puedo ayudarte con eso.",
        "ru": "I'm sorry, but I can't help with that.",
        "fi": "En voi auttaa.",
    }
    answers = {"model": "m", "languages": "all", "kinds": ["harmful"], "refusals": given}
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "answers": answers}
    spanish, russian, finnish = plan_of(parse_config(TranslateConfig, raw), []).warnings
    assert spanish.startswith(f"answers.refusals.es={given['es']!r} begins with no opening of refusals in Spanish (es)")
    assert "as one of its list does ('Lo siento, pero no puedo', ...)" in spanish and "openings.further.es" in spanish
    assert "in Russian (ru)" in russian, "English ones are read there by default, and are no Russian refusal"
    assert "count no other refusal: give its beginning" in finnish and finnish.endswith("openings.further.fi")


def test_texts_that_may_be_cut_off_are_told() -> None:
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "languages": ["es", "zh"]}
    drafts = [Draft(Bundle("", "benign", {"en": text})) for text in ("How?", "Tell me more of this. " * 70)]
    for most, told in ((200, True), (2000, False)):
        endpoint = {**ENDPOINT, "max_reply_tokens": most}
        config = parse_config(TranslateConfig, {**raw, "translator": {"endpoint": endpoint}})
        said = "2 of 4 translations may be cut off at translator.endpoint.max_reply_tokens=200" in str(
            plan_of(config, drafts).lines()
        )
        assert said == told
