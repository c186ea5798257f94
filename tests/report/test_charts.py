from __future__ import annotations

import itertools
import re

import pytest

from mlc_ray.report import palette
from mlc_ray.report.charts import WIDTH, Chart, Curve, Line, line_chart, nice_ticks, slope_chart, spread
from mlc_ray.report.languages import NAMES, language_name
from mlc_ray.report.page import environment
from tests.report.html_checks import Page
from tests.report.runs import THIRTY


def drawn(chart: Chart) -> str:
    """The SVG as the page's template writes it."""
    return str(environment().get_template("pieces.html.j2").module.svg(chart))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_step_and_steps_go_one_way(dark: bool) -> None:
    colours = palette.colours(dark=dark)
    assert len(colours) == palette.STEPS
    assert all(palette.contrast(background, text) >= 4.5 for background, text in colours)
    # One way in lightness: that is what every kind of colour sight has left.
    paper = (18, 22, 27) if dark else (255, 255, 255)
    away = [palette.contrast(background, paper) for background, _ in colours]
    assert all(before < after for before, after in itertools.pairwise(away))


def test_only_0_and_100_percent_have_the_outer_steps() -> None:
    assert palette.step(0) == 0
    assert palette.step(1) == palette.STEPS - 1
    inner = [palette.step(share / 1000) for share in range(1, 1000)]
    assert set(inner) == set(range(1, palette.STEPS - 1))
    assert inner == sorted(inner)
    with pytest.raises(ValueError, match=r"1\.01 is not a share"):
        palette.step(1.01)


def test_contrast_is_the_one_of_wcag() -> None:
    assert palette.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert palette.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)  # the well-known grey


def test_spread_keeps_order_and_distance_and_moves_little() -> None:
    places = spread([50, 50, 50, 10, 90], 10, 0, 100)
    assert all(b - a >= 10 for a, b in itertools.pairwise(sorted(places)))
    assert places[3:] == [10, 90]
    assert places[0] < places[1] < places[2]
    assert spread([100, 100], 10, 0, 100) == [90, 100]
    assert spread([], 10, 0, 100) == []
    crowded = spread([5.0] * 30, 10, 0, 100)
    assert min(crowded) > -1e-9
    assert max(crowded) <= 100


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.9, 0.98), (-4.4, 9.2), (3e-4, 0.7), (0, 1e6), (5, 5), (0, 0), (-2, -2), (1e-9, 2e-9)]
)
def test_ticks_are_round_few_and_cover_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    size = ticks[1] - ticks[0]
    assert ticks[0] <= low + 0.06 * size
    assert ticks[-1] >= high - 0.06 * size


def test_slopes_of_thirty_languages_have_a_label_each_that_no_other_covers() -> None:
    lines = [Line(code, [2.0 * i, 100.0 - i % 3]) for i, code in enumerate(THIRTY)]
    svg = drawn(slope_chart("Refused", ["before", "after"], lines))
    page = Page(svg)
    for code in THIRTY:
        assert svg.count(f">{code} ") == 2
    places = re.findall(r'<text class="name" x="([\d.-]+)" y="([\d.-]+)"', svg)
    for x in {x for x, _ in places}:
        ys = sorted(float(y) for at, y in places if at == x)
        assert len(ys) == 30
        assert all(b - a > 11 for a, b in itertools.pairwise(ys))
    height = float(page.all("svg")[0]["viewbox"].split()[3])  # type: ignore[union-attr]
    assert all(0 < float(y) < height and 0 < float(x) < WIDTH for x, y in places)


def test_lines_that_fall_are_told_apart_without_colour() -> None:
    svg = drawn(slope_chart("x", ["a", "b"], [Line("up", [1, 2]), Line("down", [2, 1]), Line("none", [None, 3])]))
    assert '<path class="slope up"' in svg
    assert '<path class="slope down"' in svg
    assert svg.count('<path class="slope') == 2, "a single value is a point"


def test_curves_break_where_there_is_no_value() -> None:
    svg = drawn(line_chart("loss", [Curve("run", [(1, 1.0), (2, 0.5), (3, None), (4, 0.25), (5, None)])]))
    Page(svg)
    assert svg.count('<path class="curve') == 1
    assert svg.count('<circle class="curve') == 1
    assert ">0.25</text>" in svg, "the last known value is written out"
    with pytest.raises(ValueError, match="no point"):
        line_chart("loss", [Curve("run", [(1, None)])])


def test_what_is_almost_100_is_not_labelled_100() -> None:
    svg = drawn(slope_chart("x", ["a", "b"], [Line("en", [0.3, 99.7]), Line("sw", [0.0, 100.0])]))
    assert all(f">{label}</text>" in svg for label in ("en &lt;1", "en &gt;99", "sw 0", "sw 100"))


def test_a_single_step_and_a_constant_are_drawn() -> None:
    assert "NaN" not in drawn(line_chart("x", [Curve("run", [(7, 0.0)])]))
    assert "nan" not in drawn(line_chart("x", [Curve("run", [(1, 2.0), (2, 2.0)])]))


def test_names_of_languages() -> None:
    assert language_name("sw") == "Swahili"
    assert language_name("zh-Hant") == "Chinese (traditional)"
    assert language_name("xx") == ""
    assert all(code == code.strip() and name == name.strip() and name for code, name in NAMES.items())
