"""Parts of files: together they give what the whole file gives, line numbers and messages included, without Ray."""

import json
import os
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.config import SourceSection
from mlc_ray.data import contents, sources
from mlc_ray.data.bundles import BundleFileError, RejectedRow, make_bundle
from mlc_ray.data.contents import contents_of
from mlc_ray.data.rejects import InvalidBundlesError, KeyCollisionError, Ledger, PartRead, count
from mlc_ray.data.sources import readings_of, resolve_source
from mlc_ray.data.tables import BUNDLES, keys_of
from mlc_ray.storage import Place
from tests.data.files import read_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))


def cut(monkeypatch, size):
    monkeypatch.setattr(contents, "BLOCK_BYTES", size)
    monkeypatch.setattr(sources, "BLOCK_BYTES", size)


def record(number):
    return {"kind": "benign", "prompts": {"en": f"Number {number}?", "de": "ü" * (number % 7 + 1)}}


def both_ways(path, blocks=1, **settings):
    """Rows of the whole file, and of its parts."""
    (file,) = resolve_source(SourceSection(path=str(path), **settings))
    parts = readings_of(file, contents_of(file.files()), blocks=blocks)
    return list(read_file(file)), [list(part.rows()) for part in parts]


@pytest.mark.parametrize("size", [1, 7, 64, 100, 240])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_belong_to_the_part_that_they_start_in(tmp_path, monkeypatch, size, end):
    lines = [json.dumps(record(n), ensure_ascii=False) for n in range(12)]
    lines[3:3] = ["", "   "]
    lines[8] = "{"
    text = (end or "\n").join(lines) + end
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    cut(monkeypatch, size)
    for blocks in (1, 3):
        whole, parts = both_ways(path, blocks)
        assert len(parts) == -(-os.path.getsize(path) // (size * blocks)) > 1
        assert [row for part in parts for row in part] == whole
    assert [row.line for row in whole if isinstance(row.parsed, RejectedRow)] == [9]


def test_row_groups_and_rows_of_datasets_are_parts(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = pa.Table.from_pylist([record(n) for n in range(20)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    cut(monkeypatch, 100)
    for name in ("a.parquet", "saved"):
        whole, parts = both_ways(tmp_path / name)
        assert len(parts) > 3
        assert [row for part in parts for row in part] == whole
        assert [row.line for row in whole] == list(range(1, 21))


def test_what_a_record_alone_does_not_tell_is_read_in_one_go(tmp_path, monkeypatch):
    cut(monkeypatch, 10)
    (tmp_path / "array.json").write_text(json.dumps([record(1), record(2)]))
    (tmp_path / "table.csv").write_text("id,en\n1,a\n2,b\n")  # two rows may not share an id
    (tmp_path / "utf16.jsonl").write_text(json.dumps(record(1)), encoding="utf-16")
    for name, settings in (("array.json", {}), ("table.csv", {"kind": "benign"})):
        whole, (part,) = both_ways(tmp_path / name, **settings)
        assert part == whole
    with pytest.raises(BundleFileError, match="UTF-16"):
        both_ways(tmp_path / "utf16.jsonl")


def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path, monkeypatch):
    lines = [json.dumps(record(n), ensure_ascii=False).encode() for n in range(9)]
    lines[6] = lines[6].replace(b"Number", b"N\xfcmber")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    (file,) = resolve_source(SourceSection(path=str(path)))
    with pytest.raises(BundleFileError) as whole:
        list(read_file(file))
    cut(monkeypatch, 150)
    with pytest.raises(BundleFileError, match=re.escape(str(whole.value))):
        both = [list(part.rows()) for part in readings_of(file, contents_of([Place(path)]), blocks=1)]
        assert not both


def test_contents_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\nthree")
    asked = []

    def counting(blocks):
        asked.append(len(blocks))
        return contents.read_blocks(blocks)

    cut(monkeypatch, 6)
    first = contents_of([Place(path)], counting)  # just written: it may change again within a tick of the clock
    assert contents_of([Place(path)], counting) == first and asked == [3, 3]
    assert first[Place(path)].line_breaks == [1, 1, 0]
    os.utime(path, ns=(10**18, 10**18))
    assert contents_of([Place(path)], counting) == contents_of([Place(path)], counting) == first and asked == [
        3,
        3,
        3,
        0,
    ]
    path.write_bytes(b"one\ntwo\nTHREE")
    os.utime(path, ns=(10**18 + 10**6, 10**18 + 10**6))
    changed = contents_of([Place(path)], counting)
    assert changed[Place(path)].digests[0] == first[Place(path)].digests[0] and changed != first


def test_an_object_of_the_same_size_and_time_is_known_to_have_changed(s3, tmp_path, monkeypatch):
    cut(monkeypatch, 6)
    monkeypatch.setattr(Place, "modified", lambda self: 1e9)  # stores say it in seconds
    path = Place(s3) / tmp_path.name / "a.jsonl"
    path.write_text("one\ntwo\nthree")
    first = contents_of([path])
    assert contents_of([path], lambda blocks: iter(())) == first  # nothing is read again
    path.write_text("one\ntwo\nTHREE")
    assert contents_of([path]) != first


def test_a_file_of_one_block_is_read_again_rather_than_remembered(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    assert contents_of([Place(path)]) == contents_of([Place(path)])
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    cut(monkeypatch, 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))

    def changing(blocks):
        path.write_bytes(b"two")
        os.utime(path, ns=(10**18 + 10**6, 10**18 + 10**6))
        return contents.read_blocks(blocks)

    contents_of([Place(path)], changing)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cache", ["{file}/cache", "~nobody-has-this-name/cache"])
def test_without_a_cache_nothing_is_remembered(tmp_path, monkeypatch, cache):
    cut(monkeypatch, 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setenv("MLC_RAY_CACHE", cache.format(file=path))
    assert contents_of([Place(path)]) == contents_of([Place(path)])
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_known_by_the_names_and_contents_of_its_files(tmp_path):
    def named(folder):
        (file,) = resolve_source(SourceSection(path=str(folder), format="rtp-lx"))
        return file.fingerprint()

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "RTP_LX_EN.json").write_text(json.dumps(record(1)))
    assert named(tmp_path / "a") == named(tmp_path / "b")
    (tmp_path / "b" / "RTP_LX_EN.json").write_text(json.dumps(record(2)))
    changed = named(tmp_path / "b")
    (tmp_path / "b" / "RTP_LX_EN.json").rename(tmp_path / "b" / "RTP_LX_DE.json")
    assert len({named(tmp_path / "a"), changed, named(tmp_path / "b")}) == 3


# ------------------------------------------------------------------------------------------------- the driver's notes


def told(rows):
    """What a task says of rows: the name of a bundle, or None for a rejected row."""
    columns = {"file": "f", "text": None, **dict.fromkeys(BUNDLES.names)}
    read = PartRead()
    parsed = [
        {
            **columns,
            "file": "f",
            "line": line,
            "bundle_id": name,
            "reason": None if name else f"kind 'x{line}' at {line}",
        }
        for line, name in enumerate(rows, start=1)
    ]
    read.bundles(pa.Table.from_pylist(parsed, schema=sources.PARSED))
    return read


def ledger_of(tmp_path, *parts):
    """What finds repeats in parts: takes what it needs of ids, and `on_invalid`."""
    ledger, said = Ledger(), [told(part) for part in parts]
    for each in said:
        ledger.add(each)
    names = [name for part in parts for name in part if name]

    def close(on_invalid, ids=lambda rows: [names[row] for row in rows]):
        return ledger.close(
            ids, on_invalid, [line for each in said for line in each.rejects], tmp_path / "rejects.jsonl"
        )

    return ledger, close


def test_the_first_of_repeats_is_kept_and_rejects_are_in_order(tmp_path):
    ledger, close = ledger_of(tmp_path, ["a", None, "b", "a"], [], ["c", "b", None, "a", "d"])
    repeats = close("skip")
    assert {part: rows.tolist() for part, rows in repeats.items()} == {0: [2], 2: [1, 2]}
    assert ledger.reasons == {"repeats the bundle of …": 3, "kind … at …": 2}
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in written] == [2, 3, 4, 2, 4]
    assert [row["reason"] for row in written if row["line"] == 4] == ["repeats the bundle of 'f:1'"] * 2
    with pytest.raises(InvalidBundlesError, match=r"(?s)5 of 9 rows.*f:2: kind 'x2'.*f:3: .*f:4: repeats.*All of"):
        _, again = ledger_of(tmp_path, ["a", None, "b", "a"], [], ["c", "b", None, "a", "d"])
        again("fail")


def test_reasons_that_differ_in_more_than_values_are_told_apart_up_to_fifty():
    reasons = Counter()
    for number in range(60):
        count(reasons, "no " * (number + 1) + f"'{number}'")
        count(reasons, "no '7'")
    assert len(reasons) == 51 and reasons["other reasons"] == 10 and reasons["no …"] == 61


def test_two_bundles_of_one_key_are_refused_by_name(tmp_path):
    _, close = ledger_of(tmp_path, ["a", "b"], ["a"])
    with pytest.raises(KeyCollisionError, match=r"f:1: bundle other has by chance the same key as bundle a of f:1"):
        close("skip", lambda rows: [["a", "b", "other"][row] for row in rows])


def test_bundles_of_the_sample_differ_in_their_keys():
    names = [make_bundle(record(n)).bundle_id for n in range(1000)]
    assert len(set(keys_of(names).tolist())) == 1000
