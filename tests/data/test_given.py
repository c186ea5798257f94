"""Bundles in memory: the same as a file of them, from reading to rejecting."""

import json
from pathlib import Path

import pytest

from mlc_ray.config import SourceSection
from mlc_ray.data.bundles import BundleFileError, RejectedRow, make_bundle, place
from mlc_ray.data.given import as_source
from mlc_ray.data.sources import resolve_source
from tests.data.files import read_file

RAW = [
    {"kind": "benign", "prompts": {"en": "How do I hum?", "fr": "Comment fredonner ?"}, "chosen": "Close your mouth."},
    {"kind": "harmful", "prompts": {"en": "How do I cheat?"}},
]
BUNDLES = [make_bundle(raw) for raw in RAW]


def read(source):
    return [row.parsed for file in resolve_source(source) for row in read_file(file)]


def fingerprints(source):
    return [file.fingerprint() for file in resolve_source(source)]


@pytest.mark.parametrize("form", ["list", "generator", "bundles", "dataset"])
def test_every_form_gives_the_same_bundles(tmp_path, form):
    given = {"list": RAW, "generator": (raw for raw in RAW), "bundles": BUNDLES}.get(form)
    if form == "dataset":  # a table, with a null for the language and the answer that the second bundle lacks
        datasets = pytest.importorskip("datasets")
        given = datasets.Dataset.from_list(RAW)
        assert given[1]["prompts"]["fr"] is None
    assert read(as_source(given, tmp_path)) == BUNDLES


def test_the_same_bundles_are_the_same_file_wherever_it_lies(tmp_path):
    first, again = as_source(RAW, tmp_path), as_source(iter(RAW), tmp_path)
    assert first == again
    assert [path.name.startswith("given-") for path in tmp_path.iterdir()] == [True]
    elsewhere, other = as_source(RAW, tmp_path / "b"), as_source(RAW[:1], tmp_path / "b")
    assert fingerprints(first) == fingerprints(elsewhere) != fingerprints(other)


def test_other_formats_and_marks_are_a_source_s_own(tmp_path):
    source = as_source([{"en": "How?", "de": "Wie?"}], tmp_path, format="table", kind="benign")
    assert source == SourceSection(path=source.path, format="table", kind="benign")
    (bundle,) = read(source)
    assert (bundle.kind, bundle.prompts["de"]) == ("benign", "Wie?")
    assert [b.kind for b in read(as_source(RAW, tmp_path, only="harmful"))] == ["harmful"]


def test_a_rejected_row_is_named_by_its_place_among_the_bundles_given(tmp_path):
    half = {"kind": "benign", "prompts": {"en": "\ud83d"}}
    source = as_source([*RAW, {"kind": "harmles", "prompts": {"en": "x"}}, half], tmp_path)
    third, fourth = [row for row in read(source) if isinstance(row, RejectedRow)]
    assert place(third.file, third.line) == "row 3 of the bundles given"
    assert "'harmles'" in third.reason and "not valid Unicode" in fourth.reason
    assert place("a/given.jsonl", 3) == "a/given.jsonl:3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no bundles were given: give at least one"),
        ([RAW[0], "How?"], r"row 2 of the bundles given is str, not a mapping"),
        ([{**RAW[0], "category": {1, 2}}], r"row 1 of the bundles given holds what JSON cannot.*set"),
        ([{**RAW[0], "category": float("nan")}], "row 1 of the bundles given holds what JSON cannot"),
    ],
)
def test_what_is_no_bundle_at_all_is_refused_at_once(tmp_path, given, message):
    with pytest.raises(BundleFileError, match=message):
        as_source(given, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_read_by_people_too(tmp_path):
    lines = Path(as_source(RAW, tmp_path).path).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == RAW


def test_bundles_are_kept_on_an_object_store(s3):
    source = as_source(RAW, f"{s3}/cache")
    assert source.path.startswith(f"{s3}/cache/given-") and as_source(iter(RAW), f"{s3}/cache") == source
    assert read(source) == BUNDLES
