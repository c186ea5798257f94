"""The PNGs: which way they read, what they mark, and that each is drawn."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

from matplotlib.figure import Figure

from mlc_ray.report.collect import Model
from mlc_ray.report.figures import Panel, Trade, heat_map, layers_png, pareto_png, scores_png
from mlc_ray.report.rates import benchmarks
from mlc_ray.score.results import ScoreResult
from mlc_ray.storage import Place
from tests.report.test_console import ALIGNED, ONE_SIDED, RAW, records, result_of


def drawn(*results: ScoreResult) -> Figure:
    models = [Model(result.name, result) for result in results]
    return heat_map(models, benchmarks(models))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_both_sides_go_one_way_which_the_title_says() -> None:
    refuses_all = result_of("x", records("harmful", en="RRRR") + records("benign", en="RRRC"))
    figure = drawn(refuses_all)
    axes = figure.axes[0]
    assert "higher is better on both sides (n = 4 per cell)" in axes.get_title(loc="left")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["harmful refused %", "benign complied %"]
    assert texts(figure) == ["100", "100", "25", "25"]


def test_nearly_all_is_not_100() -> None:
    figure = drawn(result_of("x", records("harmful", en="R" * 314 + "C") + records("benign", en="C" * 314 + "R")))
    assert texts(figure) == [">99"] * 4


def test_cells_are_marked_as_in_the_tables() -> None:
    ways = {"en": "", "ku": "translated", "ps": "uncovered"}
    judged = [
        dataclasses.replace(record, via_refused=ways[record.language])
        for record in records("benign", en="C", ku="C", ps="C")
    ]
    figure = drawn(result_of("x", judged))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["avg", "en", "ku", "ps"]
    assert texts(figure) == ["not scored", "100", "100", "100†", "100‡"]
    assert axes.get_xlabel().splitlines() == [
        "† read by the judge in translation",
        "‡ the judge does not declare this language: do not rely on it",
    ]
    plain = drawn(RAW)
    assert plain.axes[0].get_xlabel() == ""
    assert not any("†" in text or "‡" in text for text in texts(plain))


def test_a_side_that_was_not_scored_has_a_row_that_says_so() -> None:
    labels = [label.get_text() for label in drawn(ONE_SIDED).axes[0].get_yticklabels()]
    assert labels == ["harmful refused %", "benign"]
    both = drawn(RAW, ONE_SIDED)
    labels = [label.get_text() for label in both.axes[0].get_yticklabels()]
    assert labels[2:] == ["benign complied %, raw", "benign complied %, one"]
    assert texts(both)[-1] == "not scored"


def test_heat_map_is_a_png_that_grows_with_what_it_shows(tmp_path: Path) -> None:
    several = result_of("s", records("harmful", en="R") + records("benign", "other", en="C"))
    sizes = []
    for number, results in enumerate(([RAW], [RAW, ALIGNED], [several])):
        file = tmp_path / f"{number}.png"
        scores_png(results, Place(file))
        sizes.append(png_size(file))
    one, two, three = sizes
    assert one[0] > 300
    assert two[1] > one[1]
    assert three[1] > two[1], "two benchmarks, and both as one"


def test_what_a_search_and_a_probe_draw(tmp_path: Path) -> None:
    points = [Trade(10, 99, "a"), Trade(60, 90, "b")]
    names = ("harmful refused %", "benign complied %")
    path = pareto_png(points, tmp_path / "p.png", baseline=Trade(2, 100), front=[1, 0], best=1, names=names, floor=80)
    assert min(png_size(path)) > 300
    panels = [Panel("AUC", {"en": [0.5, 0.9], "sw": [0.5, 0.8]}, strong="en", level=0.5), Panel("score", {"": [0, 1]})]
    assert png_size(layers_png(panels, tmp_path / "l.png"))[1] > png_size(layers_png(panels[:1], tmp_path / "m.png"))[1]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height
