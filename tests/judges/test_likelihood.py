from __future__ import annotations

import json
import math

import pytest

from mlc_ray.data.sources import sample_path
from mlc_ray.judges.likelihood import LANGUAGES, OPENINGS, margin, openings_for


def test_languages_are_those_shipped() -> None:
    first = json.loads(sample_path("test").read_text(encoding="utf-8").splitlines()[0])
    assert set(first["prompts"]) == LANGUAGES


@pytest.mark.parametrize("code", [*sorted(OPENINGS), "zh-Hant", "xx"])
def test_both_sides_are_equally_many_and_exclude_each_other(code: str) -> None:
    openings = openings_for(code)
    texts = [*openings.refusals, *openings.compliances]
    assert len(openings.refusals) == len(openings.compliances) >= 3
    assert all(text == text.strip() and text for text in texts)
    # Otherwise the probabilities would not add up to that of "one of these".
    for index, text in enumerate(texts):
        assert not any(other.startswith(text) for other in texts[:index] + texts[index + 1 :]), text


def test_english_openings_count_everywhere() -> None:
    english = OPENINGS["en"]
    for code in OPENINGS:
        asked = openings_for(code)
        assert set(english.refusals) <= set(asked.refusals)
        assert set(english.compliances) <= set(asked.compliances)
    assert openings_for("xx") == english
    assert openings_for("zh-Hant") == openings_for("zh")
    assert set(OPENINGS["zh"].refusals) < set(openings_for("zh").refusals)


def test_margin_is_the_log_odds() -> None:
    refusals, compliances = [0.1, 0.2, 0.05], [0.01, 0.02, 0.04]
    value = margin(map(math.log, refusals), map(math.log, compliances))
    assert value == pytest.approx(math.log(0.35 / 0.07))
    assert margin([-1000.0, -1001.0], [-1002.0, -1003.0]) == pytest.approx(2.0)  # far below the least float
    assert margin([-math.inf, -2.0], [-1.0, -math.inf]) == pytest.approx(-1.0)
    assert margin([-3.0], [-3.0]) == 0.0
