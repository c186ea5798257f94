"""The example reader, from a file to bundles, as the settings would have it."""

import json

import pytest

from mlc_ray.config import ConfigError, DataSection, parse_config
from mlc_ray.data.bundles import BundleFileError, RejectedRow
from mlc_ray.data.sources import resolve_source
from tests.data.files import read_file

NAME = "examples.my_reader:Questions"
GOOD = {"id": 1, "question": {"en": "How do I knit?", "de": "Wie strickt man?"}, "rating": 1, "answer": "With needles."}
BAD = {"id": 2, "question": {"en": "How do I cheat?"}, "rating": 5, "answer": "Peek.", "refusal": "I would rather not."}


def rows(path, **source):
    data = parse_config(DataSection, {"train": [{"path": str(path), **source}]})
    return [row.parsed for file in resolve_source(data.train[0]) for row in read_file(file)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_of_ones_own_become_bundles(tmp_path):
    benign, harmful = rows(write(tmp_path / "x.jsonl", GOOD, BAD), format=NAME)
    assert (benign.kind, benign.prompts, benign.chosen, benign.rejected) == (
        "benign", {"de": "Wie strickt man?", "en": "How do I knit?"}, "With needles.", None,
    )  # fmt: skip
    assert (harmful.kind, harmful.chosen, harmful.rejected) == ("harmful", "I would rather not.", "Peek.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rating": 6}, "rating 6 is not a whole number from 1 to 5"),
        ({"id": 1}, "id '1' was given already"),
        ({"ratign": 1}, "unknown key 'ratign'"),
        ({"question": {"english": "x"}}, "'english' is not a language code"),
    ],
)
def test_what_is_wrong_with_a_record_is_found_as_for_any_format(tmp_path, change, reason):
    _, rejected = rows(write(tmp_path / "x.jsonl", GOOD, {**BAD, **change}), format=NAME)
    assert isinstance(rejected, RejectedRow) and reason in rejected.reason


def test_it_has_to_be_named(tmp_path):
    with pytest.raises(BundleFileError, match="cannot tell the format"):
        rows(write(tmp_path / "x.jsonl", GOOD))
    with pytest.raises(ConfigError, match="no class 'Question'"):
        rows(tmp_path / "x.jsonl", format="examples.my_reader:Question")
