"""The pipelines on real Ray Data with the real SmolLM2 tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlc_ray.config import PLAIN_CHAT, ChatSection, DataSection, ModelSection, SourceSection
from mlc_ray.data import contents, sources
from mlc_ray.data.bundles import KINDS, BundleFileError, make_bundle
from mlc_ray.data.given import as_source
from mlc_ray.data.prepare import (
    Tokenize,
    prepare_token_rows,
    read_bundles,
    token_fingerprint,
)
from mlc_ray.data.rejects import InvalidBundlesError
from mlc_ray.data.store import TokenArtifact, finish_artifact, rewrite_shard, shard_file, write_shard
from mlc_ray.data.tables import bundle_columns, keys_of, rows_to_table
from mlc_ray.data.tokens import ChatTemplate, TokenizationError, load_tokenizer, tokenize_bundle
from mlc_ray.storage import ArtifactError, IncompleteArtifactError, Place, read_manifest
from mlc_ray.types import TokenRow
from tests.data.files import write_rows

COUNT = 11


def record(number, **changes):
    prompts = {"en": f"How do I count to {number}?", "de": f"Wie zähle ich bis {number}?"}
    if number % 3 == 0:
        prompts["fr"] = f"Comment compter jusqu'à {number} ?"
    return {"kind": "benign", "prompts": prompts, "chosen": f"Say {number}.", "rejected": "No.", **changes}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return SourceSection(path=str(path))


def read(sources, tmp_path, on_invalid="fail", **settings):
    rejects_path = tmp_path / "rejects.jsonl"
    return read_bundles(sources, on_invalid=on_invalid, rejects_path=rejects_path, **settings).to_pylist()


def columns_of(rows):
    return [{name: value for name, value in row.items() if name not in ("file", "line")} for row in rows]


def ids_of(artifact):
    return [row.bundle_id for row in artifact.rows(range(len(artifact)))]


def rejects(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prepared(ray_local, smollm2, tmp_path_factory):
    """A prepared artefact with its sources, made once."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write(folder / "train.jsonl", [record(n) for n in range(COUNT)])
    data = DataSection(train=[source], max_prompt_tokens=45, max_response_tokens=3)
    model = ModelSection(path=str(smollm2))
    return data, model, folder / "cache", prepare_token_rows(data, model, cache_dir=folder / "cache")


# ------------------------------------------------------------------------------------------------- files -> bundles


def test_bundles_keep_the_order_of_sources_and_lines(ray_local, tmp_path):
    sources = [write(tmp_path / f"{name}.jsonl", [record(10 * i + n) for n in range(4)]) for i, name in enumerate("ba")]
    rows = read(sources, tmp_path)
    assert columns_of(rows) == [bundle_columns(make_bundle(record(n))) for n in (0, 1, 2, 3, 10, 11, 12, 13)]
    assert [(row["file"], row["line"]) for row in rows] == [(s.path, line) for s in sources for line in (1, 2, 3, 4)]
    assert not (tmp_path / "rejects.jsonl").exists()


def test_invalid_rows_are_written_counted_and_left_out_or_fatal(ray_local, tmp_path, caplog):
    a = write(tmp_path / "a.jsonl", [record(0), record(1, kind="harmles"), record(2)])
    b = write(tmp_path / "b.jsonl", [record(0), record(4, chosen=""), record(5), record(6, prompts={"en": "\ud83d"})])
    rows = read([a, b], tmp_path, "skip")
    assert columns_of(rows) == [bundle_columns(make_bundle(record(n))) for n in (0, 2, 5)]
    assert set(rows[0]) >= {"bundle_id", "languages", "texts", "file", "line"}
    assert "reason" not in rows[0]
    written = rejects(tmp_path)
    assert [(r["file"], r["line"]) for r in written] == [(a.path, 2), (b.path, 2), (b.path, 4), (b.path, 1)]
    assert "'harmles'" in written[0]["reason"]
    assert json.loads(written[0]["text"]) == record(1, kind="harmles")
    assert f"'{a.path}:1'" in written[3]["reason"]
    assert "4 invalid rows" in caplog.text

    with pytest.raises(InvalidBundlesError) as error:
        read([a, b], tmp_path, "fail")
    assert f"{a.path}:2: kind 'harmles'" in str(error.value)
    assert "4 of 7 rows" in str(error.value)
    assert str(tmp_path / "rejects.jsonl") in str(error.value)
    assert rejects(tmp_path) == written


def test_the_same_file_twice_is_a_duplicate_of_every_row(ray_local, tmp_path):
    source = write(tmp_path / "a.jsonl", [record(0), record(1)])
    assert len(read([source, source], tmp_path, "skip")) == 2
    assert [r["line"] for r in rejects(tmp_path)] == [1, 2]


def test_a_file_fault_is_fatal_even_where_rows_are_skipped(ray_local, tmp_path):
    good = write(tmp_path / "a.jsonl", [record(0)])
    (tmp_path / "b.jsonl").write_bytes(b'{"kind": "\xff"}')
    with pytest.raises(BundleFileError, match=r"b\.jsonl:1: not UTF-8"):
        read([good, SourceSection(path=str(tmp_path / "b.jsonl"))], tmp_path, "skip")


def test_languages_and_emptiness_are_judged_row_by_row(ray_local, tmp_path):
    source = write(tmp_path / "a.jsonl", [record(0), record(1, prompts={"de": "x"}, chosen=None, rejected=None)])
    (row,) = read([source], tmp_path, "skip", languages=["en", "fr"])
    whole = make_bundle(record(0))
    assert (row["bundle_id"], row["languages"]) == (whole.bundle_id, ["en", "fr"])
    assert row["texts"] == [whole.prompts["en"], whole.prompts["fr"]]
    assert r"data.languages=['en', 'fr']" in rejects(tmp_path)[0]["reason"]
    with pytest.raises(InvalidBundlesError, match="No valid row is left"):
        read([source], tmp_path, "skip", languages=["sw"])


# ------------------------------------------------------------------------------------------------- bundles -> tokens


def test_bundles_in_memory_in_a_format_from_outside_are_prepared_like_files(ray_local, smollm2, tmp_path):
    questions = [
        {"question": {"en": f"How do I count to {n}?"}, "rating": 1, "answer": f"Say {n}.", "refusal": "No."}
        for n in range(3)
    ]
    cache, model, name = tmp_path / "cache", ModelSection(path=str(smollm2)), "examples.my_reader:Questions"
    source = as_source([*questions, {**questions[0], "rating": 9}, questions[1]], cache, format=name)
    data = DataSection(train=[source], on_invalid="skip")
    tokens = prepare_token_rows(data, model, cache_dir=cache)
    raw = [record(n, prompts={"en": f"How do I count to {n}?"}) for n in range(3)]
    assert ids_of(tokens) == [make_bundle(one).bundle_id for one in raw]
    assert tokens.rejected == {"rating … is not a whole number from … to …": 1, "repeats the bundle of …": 1}
    with pytest.raises(
        InvalidBundlesError, match=r"\n  row 4 of the bundles given: rating 9 .*\n  row 5 of the bundles"
    ):
        prepare_token_rows(data.model_copy(update={"on_invalid": "fail"}), model, cache_dir=cache)


def test_token_rows_on_disk_are_what_tokenising_gives(prepared):
    _, model, _, artifact = prepared
    template = ChatTemplate(load_tokenizer(model.path))
    expected = [
        tokenize_bundle(make_bundle(record(n)), template, languages=None, max_prompt_tokens=45, max_response_tokens=3)
        for n in range(COUNT)
    ]
    assert artifact.rows(range(COUNT)) == expected
    assert artifact.rows([7, 2, 7]) == [expected[7], expected[2], expected[7]]
    assert artifact.keys.tolist() == keys_of(row.bundle_id for row in expected).tolist()
    assert [KINDS[kind] for kind in artifact.kinds] == [row.kind for row in expected]
    assert artifact.counts.kinds.keys() == {"benign"}
    assert artifact.languages == ["de", "en", "fr"]
    counts = artifact.counts
    assert counts.rows == len(artifact) == COUNT
    assert sum(counts.prompt_tokens.values()) == sum(len(p) for row in expected for p in row.prompts)
    assert counts.response_tokens == sum(len(row.chosen) + len(row.rejected) for row in expected)
    assert sum(counts.truncated_prompt_tokens.values()) == sum(row.truncated_prompt_tokens for row in expected)
    assert counts.truncated_response_tokens == sum(row.truncated_response_tokens for row in expected) > 0
    with pytest.raises(IndexError, match="row 11 of 11"):
        artifact.rows([COUNT])


def test_fewer_languages_of_each_bundle_are_another_artefact(prepared):
    data, model, cache, whole = prepared
    fewer = prepare_token_rows(data.model_copy(update={"other_languages": 1}), model, cache_dir=cache)
    assert fewer.fingerprint != whole.fingerprint and len(fewer) == len(whole)
    rows = zip(fewer.rows(range(len(fewer))), whole.rows(range(len(whole))), strict=True)
    assert {(len(one.languages), len(all_.languages)) for one, all_ in rows} == {(2, 2), (2, 3)}


def test_an_artefact_is_used_again_wherever_its_source_lies(prepared, tmp_path):
    data, model, cache, artifact = prepared
    rows = Path(artifact.folder) / shard_file(0)
    before = rows.stat().st_mtime_ns
    moved = SourceSection(path=shutil.copy(data.train[0].path, tmp_path))
    again = prepare_token_rows(data.model_copy(update={"train": [moved]}), model, cache_dir=cache)
    assert (again.folder, rows.stat().st_mtime_ns) == (artifact.folder, before)
    changed = [
        {"max_response_tokens": 50},
        {"languages": ["en"]},
        {"train": [SourceSection(path=data.train[0].path, kind="benign")]},
    ]
    names = {token_fingerprint(data.model_copy(update=change), model) for change in changed}
    names |= {token_fingerprint(data, model, chat) for chat in (ChatSection(), ChatSection(date="2031-02-03"))}
    assert len(names | {artifact.fingerprint}) == 5


def test_a_damaged_artefact_is_made_anew_and_rejected_rows_travel_with_it(ray_local, smollm2, tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", [record(0), record(1, kind="x")])
    data, model = DataSection(train=[source], on_invalid="skip"), ModelSection(path=str(smollm2))
    cache = tmp_path / "cache"
    damaged = cache / f"tokens-{token_fingerprint(data, model)}"
    damaged.mkdir(parents=True)
    (damaged / shard_file(0)).write_bytes(b"half")
    artifact = prepare_token_rows(data, model, cache_dir=cache)
    assert artifact.folder == damaged
    assert ids_of(artifact) == [make_bundle(record(0)).bundle_id]
    assert "manifest.json is missing" in caplog.text
    assert sum(artifact.rejected.values()) == 1
    assert json.loads(artifact.rejects_path.read_text())["line"] == 2
    assert list(cache.iterdir()) == [damaged]
    with pytest.raises(InvalidBundlesError):
        prepare_token_rows(data.model_copy(update={"on_invalid": "fail"}), model, cache_dir=cache)
    assert len(list(cache.glob("*.rejects.jsonl"))) == 1


def test_a_limit_that_the_template_exceeds_stops_before_anything_is_read(prepared, tmp_path):
    data, model, _, _ = prepared
    with pytest.raises(TokenizationError, match=r"data\.max_prompt_tokens=5 "):
        prepare_token_rows(data.model_copy(update={"max_prompt_tokens": 5}), model, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def token_row(number):
    return TokenRow(f"id{number:03}", "benign", ["en"], [[1, number]], [1], 0, [2, number], [3])


@pytest.fixture
def stored(tmp_path):
    rows = [token_row(n) for n in range(10)]
    tables = [rows_to_table(part) for part in (rows[:4], rows[4:5], rows[5:])]
    write_rows(tmp_path, tables, fingerprint="x", rejected={})
    return tmp_path


def test_rows_are_found_across_pieces_of_the_file(stored):
    artifact = TokenArtifact.open(stored)
    assert artifact.rows([9, 0, 4, 5, 3]) == [token_row(n) for n in (9, 0, 4, 5, 3)]


def test_a_manifest_lists_what_was_written_and_no_leftovers(tmp_path):
    shard = write_shard(Place(tmp_path), shard_file(0), [rows_to_table([token_row(0)])])
    (tmp_path / ".rows-00000.arrow.tmp-7-0a").write_bytes(b"of a killed task")
    (tmp_path / ".once-00000.arrow.tmp-7-0b").write_bytes(b"of one that left out repeated bundles")
    (tmp_path / "rows-00001.arrow").write_bytes(b"what no task reported")
    finish_artifact(Place(tmp_path), [shard], fingerprint="x", rejected={})
    assert read_manifest(tmp_path)["files"] == {shard.file: (tmp_path / shard.file).stat().st_size}
    assert not list(tmp_path.glob(".*"))


def test_damaged_or_foreign_folders_do_not_open(stored):
    rows = stored / shard_file(0)
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(IncompleteArtifactError, match=r"'rows-00000\.arrow' is short"):
        TokenArtifact.open(stored)
    (stored / "manifest.json").write_text('{"artifact": "checkpoint", "files": {}}')
    with pytest.raises(ArtifactError, match="'checkpoint'"):
        TokenArtifact.open(stored)


# ----------------------------------------------------------------------------------------------------------- in parts


def in_parts(monkeypatch, size):
    """Parts of `size` bytes: the driver cuts, so its constants decide."""
    monkeypatch.setattr(contents, "BLOCK_BYTES", size)
    monkeypatch.setattr(sources, "BLOCK_BYTES", size)


def test_nothing_is_tokenised_once_a_row_was_rejected_where_that_is_fatal(smollm2, tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", [record(n)] + [record(n, kind="x")] * (n == 1)).path for n in range(3)]
    folder, work = Place(tmp_path / "shards"), Place(tmp_path / "work")

    def shards(on_invalid):
        data = DataSection(train=[SourceSection(path=path) for path in files], on_invalid=on_invalid)
        stage = Tokenize(data, ModelSection(path=str(smollm2)), PLAIN_CHAT, folder, work)
        for number, path in enumerate(files):
            said = stage({"number": number, "reading": sources.Reading(sources.SourceFile(path))})
            bundles = sum(map(len, said["read"].keys))
            yield said["made"].counts.rows, bundles, said["read"].reasons.total(), said["seen"].records

    assert list(shards("skip")) == [(1, 1, 0, 1), (1, 1, 1, 2), (1, 1, 0, 1)]
    assert list(folder.sizes()) == [shard_file(n) for n in range(3)]  # nothing else that two runs would both write
    assert list(shards("fail")) == [(1, 1, 0, 1), (0, 1, 1, 2), (0, 1, 0, 1)]


def test_runs_that_make_the_same_artefact_both_leave_out_repeats(tmp_path):
    folder = Place(tmp_path)
    write_shard(folder, shard_file(0), [rows_to_table([token_row(n) for n in (0, 1, 0)])])
    one, other = (rewrite_shard(folder, 0, np.array([2]), ["a.jsonl"] * 3, [1, 2, 3]) for _ in range(2))
    assert one == other
    assert one.counts.rows == 2


def test_a_file_that_is_read_in_parts_gives_the_rows_that_it_gives_whole(ray_local, smollm2, tmp_path, monkeypatch):
    records = [record(n) for n in range(40)]
    records[7] = record(7, kind="harmles")
    records[12] = {**record(12), "chosen": None, "rejected": None}
    records[21] = record(3)  # a repeat in another part
    records[33] = {**record(33), "rejected": None}
    source = write(tmp_path / "a.jsonl", records)
    data, model = DataSection(train=[source], on_invalid="skip"), ModelSection(path=str(smollm2))
    whole = prepare_token_rows(data, model, cache_dir=tmp_path / "whole")
    in_parts(monkeypatch, 1000)
    parts = prepare_token_rows(data, model, cache_dir=tmp_path / "parts")
    assert len(parts.manifest.shards) > 5 and len(whole.manifest.shards) == 1
    for one in (whole, parts):
        assert [row.bundle_id for row in one.rows(range(len(one)))] == [
            make_bundle(each).bundle_id for n, each in enumerate(records) if n not in (7, 21)
        ]
        rejected = [json.loads(line) for line in one.rejects_path.read_text().splitlines()]
        assert [row["line"] for row in rejected] == [8, 22]
        assert rejected[1]["reason"] == f"repeats the bundle of '{source.path}:4'"
        assert {name: one.counts.lacking[name] for name in ("chosen", "rejected")} == {"chosen": 1, "rejected": 2}
        assert [each.place for each in one.lacking["rejected"]] == [f"{source.path}:{line}" for line in (13, 34)]
    assert parts.table(range(38)) == whole.table(range(38))
    assert (parts.counts, parts.head, parts.rejected) == (whole.counts, whole.head, whole.rejected)
    with pytest.raises(
        InvalidBundlesError, match=rf"2 of 40 rows .*\n  {source.path}:8: kind 'harmles'.*\n  .*:22: rep"
    ):
        prepare_token_rows(data.model_copy(update={"on_invalid": "fail"}), model, cache_dir=tmp_path / "parts")
