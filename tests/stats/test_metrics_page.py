"""docs/metrics.md: its example is run, and it names every field that it has to define."""

from __future__ import annotations

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

from mlc_ray.stats.intervals import RESAMPLES
from mlc_ray.stats.paired import BenchmarkChange, ConsistencyChange, LanguageChange, SideChange
from mlc_ray.stats.rates import SideSummary, Summary, TwoSided
from mlc_ray.stats.significance import EXACT_BUNDLES, FEW_FLIPS, FLIPS, SMALL, SWAPS

FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a table of definitions need not repeat: names of the thing itself, and its containers.
PLAIN = {"kind", "measure", "benchmark", "sides", "language", "before", "after", "common", "harmful", "benign"}


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_example_gives_the_numbers_that_it_shows(page: str) -> None:
    code = "\n".join(FENCE.findall(page))
    example = doctest.DocTestParser().get_doctest(code, {}, "docs/metrics.md", "docs/metrics.md", 0)
    assert len(example.examples) > 20
    report: list[str] = []
    assert doctest.DocTestRunner().run(example, out=report.append).failed == 0, "".join(report)


@pytest.mark.parametrize(
    "kind", [SideSummary, TwoSided, Summary, SideChange, ConsistencyChange, LanguageChange, BenchmarkChange]
)
def test_every_field_is_defined(page: str, kind: type) -> None:
    names = {field.name for field in dataclasses.fields(kind)} - PLAIN
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_the_constants_are_those_of_the_code(page: str) -> None:
    assert f"{RESAMPLES:,} times" in page
    assert f"{SWAPS:,} random exchanges" in page
    flips = f"else {FEW_FLIPS:,} random ones, and where p is below {SMALL:g} by these, {FLIPS:,}"
    assert f"up to {EXACT_BUNDLES} bundles that differ, {flips}" in page
