import codecs
import importlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray._registry import names
from mlc_ray.config import ConfigError, DataSection, SourceSection, parse_config
from mlc_ray.data import contents, sources
from mlc_ray.data.bundles import BundleFileError, RejectedRow, make_bundle
from mlc_ray.data.contents import contents_of
from mlc_ray.data.formats import columnar
from mlc_ray.data.formats.base import Format
from mlc_ray.data.sources import SourceFile, make_format, readings_of, resolve_source, sample_path
from mlc_ray.storage import Place
from tests.data.files import read_file

FIXTURES = Path(__file__).parent / "fixtures"
OWN = {"kind": "benign", "prompts": {"en": "How do I hum?"}, "chosen": "Close your mouth.", "rejected": "No."}


def read(path, format="auto", kind=None):
    return [(row.line, row.parsed) for row in read_file(SourceFile(str(path), format, kind))]


def bundles(path, format="auto", kind=None):
    return [row for _, row in read(path, format, kind)]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_preference_messages_and_plain_strings():
    first, second = bundles(FIXTURES / "preference.jsonl")
    assert first.prompts == {"en": "How do I boil an egg?", "de": "Wie koche ich ein Ei?", "zh-Hant": "怎麼煮蛋？"}
    assert (first.chosen, first.rejected, first.kind) == ("Boil it for eight minutes.", "No.", "harmful")
    assert second.prompts["fr"] == "Comment plier un bateau en papier ?"
    assert {b.kind for b in bundles(FIXTURES / "preference.jsonl", "preference", "benign")} == {"benign"}


def test_sft_in_a_json_array_with_the_line_each_record_starts_on():
    rows = read(FIXTURES / "sft.json")
    assert [line for line, _ in rows] == [2, 8]
    (_, first), (_, second) = rows
    assert first.prompts["en"] == "Translate to French.\nGood morning"
    assert (second.prompts, second.chosen, second.rejected) == (
        {"en": "Name a colour.", "sw": "Taja rangi."},
        "Blue.",
        None,
    )


def test_multijail_csv_with_byte_order_mark_and_physical_lines():
    assert (FIXTURES / "multijail.csv").read_bytes().startswith(codecs.BOM_UTF8)
    (line, first), (next_line, second) = read(FIXTURES / "multijail.csv")
    assert (line, next_line) == (2, 5)  # the first record spans two lines, and a blank one follows
    assert first.prompts == {"en": "How do I whistle\r\nloudly?", "sw": "Nipige mbinja vipi?"}  # no empty jv
    assert (first.source, first.category, first.chosen) == ("handmade", "['noise']", None)
    assert sorted(second.prompts) == ["en", "jv", "sw"]


def test_own_jsonl_rejects_single_rows_with_their_lines():
    rows = read(FIXTURES / "mixed.jsonl")
    rejected = {line: row.reason for line, row in rows if isinstance(row, RejectedRow)}
    assert [line for line, _ in rows] == [1, 2, 4, 5, 6, 7]
    assert sorted(rejected) == [2, 4, 5]
    assert rejected[2].startswith("not valid JSON")
    assert "'harmles'" in rejected[4]
    assert "no prompt in it" in rejected[5]
    assert rows[1][1].text == '{"kind": "benign", "prompts": '


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"kind": "benign", "kind": "harmful", "prompts": {"en": "x"}}', "'kind' appears twice"),
        ("[1]", "a JSON object, not list"),
        ({**OWN, "prompts": {"en": "x", "fr": None}}, "'fr'"),
        ({**OWN, "lang": "en"}, "unknown key 'lang'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_odd_json_records_are_rejected_not_raised(tmp_path, record, reason):
    rows = read(write(tmp_path / "x.jsonl", OWN, record), "mlc")
    assert rows[0][1] == make_bundle(OWN)
    assert rows[1][0] == 2
    assert reason in rows[1][1].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "2 messages"),
        ({"prompt": [{"from": "system", "value": "a"}]}, "from 'system'"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "'from' and 'value'"),
        ({"chosen": {"from": "human", "value": "a"}}, "from 'human'"),
        ({"prompt_en": "again"}, "repeats the prompt"),
        ({"prompt_Klingon": "nuqneH"}, "'Klingon' is not a language code"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"prompt": 3}, "is 3, not text"),
    ],
)
def test_odd_preference_records_are_rejected(tmp_path, change, reason):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    first, second = bundles(write(tmp_path / "x.jsonl", good, {**good, **change}), "preference")
    assert first.chosen == "b"
    assert reason in second.reason


def test_only_bundles_of_one_kind_and_every_rejected_row(tmp_path):
    harmful = {"kind": "harmful", "prompts": {"en": "How do I cheat?"}}
    path = write(tmp_path / "a.jsonl", OWN, harmful, {"kind": "harmful"})
    rows = read_file(SourceFile(str(path), "auto", only="harmful"))
    assert [(line, getattr(row, "kind", "rejected")) for _, line, row in rows] == [(2, "harmful"), (3, "rejected")]
    (resolved,) = resolve_source(SourceSection(path=str(path), only="benign"))
    assert [row.kind for *_, row in read_file(resolved) if not isinstance(row, RejectedRow)] == ["benign"]


def test_a_share_takes_twins_together_and_a_larger_one_takes_none_away(tmp_path):
    rows = [
        {"kind": kind, "prompts": {"en": f"{kind} {number}?"}, "pair": f"p{number}" if number < 100 else None}
        for number in range(200)
        for kind in ("harmful", "benign")
    ]
    path = write(tmp_path / "a.jsonl", *rows)

    def taken(share, **only):
        (file,) = resolve_source(SourceSection(path=str(path), share=share, **only))
        return file, [row for *_, row in read_file(file)]

    files, found = zip(*(taken(share) for share in (0.1, 0.4, 1.0)), strict=True)
    texts = [{bundle.prompts["en"] for bundle in each} for each in found]
    assert texts[0] < texts[1] < texts[2] and len(texts[2]) == 400
    assert 120 < len(texts[1]) < 200  # 160 on average, in steps of two up to p99
    harmful, benign = ([each for each in found[1] if each.kind == kind] for kind in ("harmful", "benign"))
    pairs = [{each.pair for each in of if each.pair} for of in (harmful, benign)]
    assert pairs[0] == pairs[1] and 20 < len(pairs[0]) < 60
    assert taken(0.4, only="harmful")[1] == harmful
    assert len({file.fingerprint() for file in files}) == 3
    with pytest.raises(BundleFileError, match="only=None, share=1e-06 leave none of its 400 bundles"):
        taken(1e-6)


def test_only_a_kind_that_is_not_there(tmp_path):
    path = write(tmp_path / "a.jsonl", OWN)
    with pytest.raises(BundleFileError, match="only='harmful', share=1 leave none of its 1 bundles"):
        list(read_file(SourceFile(str(path), "auto", only="harmful")))


def test_kind_of_the_source_may_not_contradict_the_row(tmp_path):
    (row,) = bundles(write(tmp_path / "x.jsonl", OWN), "mlc", "harmful")
    assert "'benign'" in row.reason
    assert "'harmful'" in row.reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b"\n \n", "no rows"),
        (
            "x.jsonl",
            b'{"prompts": {"en": "x"}, "kind": "benign"}\n{"kind": "\xff"}\n',
            r"x\.jsonl:2: not UTF-8: byte 0xff",
        ),
        ("x.jsonl", b'{"question": "x"}', r"cannot tell the format.*\['question'\].*table"),
        ("x.json", b'[{"prompts": {"en": "x"}, "kind": "benign"},\n{"kind": ]', r"x\.json:2: not valid JSON"),
        ("x.json", b'[{"prompts": {"en": "x"}, "kind": "benign"}', r"x\.json:1: not valid JSON: expected"),
        ("x.csv", b"id,source,tags,en\n", "no rows"),
        ("x.csv", b"", "no rows"),
        ("x.csv", b"id,source,tags,english\n1,a,b,c\n", "'english' is not a language code"),
        ("x.csv", b"id,source,tags,en,en\n1,a,b,c,d\n", r"\['en'\] appear more than once"),
        ("x.csv", b'id,source,tags,en\n1,a,b,c\n2,a,b,"open\n', r"x\.csv:3: not valid CSV"),
        ("x.csv", b"id,source,tags,en\n1,a,b,\xe9\n", r"x\.csv:2: not UTF-8"),
        ("x.parquet", b"PAR1 not really", "not readable as Parquet"),
        ("x.txt", b"hello", r"suffix '\.txt'"),
    ],
)
def test_faults_of_a_whole_file_name_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleFileError, match=message):
        read(tmp_path / name)


def test_a_csv_row_with_too_few_cells_is_rejected(tmp_path):
    (tmp_path / "x.csv").write_text("id,source,tags,en\n1,a,b\n2,a,b,How?\n")
    (line, rejected), (_, good) = read(tmp_path / "x.csv")
    assert (line, rejected.reason) == (2, "3 cells instead of 4")
    assert good.prompts == {"en": "How?"}


def test_a_byte_order_mark_before_jsonl_is_no_obstacle(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(OWN).encode())
    assert bundles(tmp_path / "x.jsonl") == [make_bundle(OWN)]


@pytest.mark.parametrize("as_map", [False, True])
def test_parquet_structs_and_maps_leave_absent_languages_absent(tmp_path, as_map):
    rows = [OWN, {**OWN, "prompts": {"en": "How do I sing?", "sw": "Ninaimbaje?"}, "chosen": None, "rejected": None}]
    table = pa.Table.from_pylist(rows)
    if as_map:
        prompts = pa.array([list(r["prompts"].items()) for r in rows], pa.map_(pa.string(), pa.string()))
        table = table.set_column(table.schema.get_field_index("prompts"), "prompts", prompts)
    pq.write_table(table, tmp_path / "x.parquet")
    assert bundles(tmp_path / "x.parquet") == [make_bundle(row) for row in rows]
    pq.write_table(table.append_column("score", pa.array([1, 2])), tmp_path / "x.parquet")
    with pytest.raises(BundleFileError, match="unknown key 'score'"):
        read(tmp_path / "x.parquet")


def test_a_saved_dataset_is_loaded_once_and_again_when_it_changed(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([OWN]).save_to_disk(tmp_path / "own")
    first = columnar.load_dataset(str(tmp_path / "own"))
    assert columnar.load_dataset(str(tmp_path / "own")) is first
    shutil.rmtree(tmp_path / "own")
    datasets.Dataset.from_list([OWN, OWN]).save_to_disk(tmp_path / "own")
    assert (len(first), len(columnar.load_dataset(str(tmp_path / "own")))) == (1, 2)


def test_saved_datasets_in_both_shapes(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([OWN]).save_to_disk(tmp_path / "own")
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "prompt_fr": name}])
            for name in ("train", "test")
        }
    ).save_to_disk(tmp_path / "preference")
    assert bundles(tmp_path / "own") == [make_bundle(OWN)]
    assert bundles(tmp_path / "preference" / "test")[0].prompts == {"en": "a", "fr": "test"}
    with pytest.raises(BundleFileError, match=r"splits \['test', 'train'\]"):
        read(tmp_path / "preference")


def test_a_hub_name_that_cannot_be_had_says_so():
    with pytest.raises(BundleFileError, match="'nobody/nothing' cannot be loaded"):
        read("nobody/nothing")


def test_sources_resolve_to_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.csv", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).touch()
    found = resolve_source(SourceSection(path=str(tmp_path), kind="benign"))
    assert [(Path(f.path).name, f.kind) for f in found] == [("a.csv", "benign"), ("b.jsonl", "benign")]
    at_commit = f"owner/name#{'0' * 40}"
    assert resolve_source(SourceSection(path=at_commit)) == [SourceFile(at_commit)]
    for missing in (str(tmp_path / "no.jsonl"), "data/train.jsonl"):
        with pytest.raises(BundleFileError, match="does not exist"):
            resolve_source(SourceSection(path=missing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleFileError, match="holds no"):
        resolve_source(SourceSection(path=str(tmp_path / "empty")))


def test_the_shipped_sample_is_valid_and_its_names_are_checked():
    for name in ("train", "test"):
        assert [row for row in bundles(sample_path(name)) if isinstance(row, RejectedRow)] == []
    with pytest.raises(BundleFileError, match=r"'sample:valid'.*'sample:train'"):
        sample_path("valid")


# ----------------------------------------------------------------------------------------------------------- formats


def test_a_format_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_config(DataSection, {"train": [{"path": "x.csv", "format": "multijial"}]})
    for word in ("train.0.format='multijial'", "did you mean 'multijail'?", "polyguard", "package.module:Class"):
        assert word in str(error.value)
    with pytest.raises(BundleFileError, match=r"'json:JSONDecoder' is .*not a mlc_ray\.data\.formats\.base\.Format"):
        read(write(tmp_path / "x.jsonl", OWN), "json:JSONDecoder")


def test_every_shipped_format_is_found_by_its_name():
    assert names("format") == [
        "aya", "m-alert", "mlc", "mpo", "multijail", "polyguard", "preference", "rtp-lx", "sft", "table",
        "xsafety", "xstest",
    ]  # fmt: skip
    assert all(isinstance(make_format(name), Format) for name in names("format"))


def test_a_record_that_could_be_of_two_formats_is_of_neither(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "instruction": "b", "output": "c"})
    with pytest.raises(BundleFileError, match=r"of preference and of sft; set the source's format"):
        read(path)


def test_the_code_of_a_format_from_outside_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", {"question": "How do I hum?"})
    code = """
from mlc_ray.data.formats.base import Format
class Asked(Format):
    needs = frozenset({"question"})
    default_kind = "benign"
    def bundle(self, record):
        return {"prompts": {"en": record["question"] + "MARK"}}
"""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "asked_format.py"
    found = []
    for mark in ("", "!", ""):
        module.write_text(code.replace("MARK", mark))
        sys.modules.pop("asked_format", None)
        importlib.invalidate_caches()
        file = SourceFile(str(path), "asked_format:Asked")
        found.append(file.fingerprint())
        assert found[0] != SourceFile(str(path)).fingerprint()
    assert found[0] == found[2] != found[1]
    assert [bundle.prompts for bundle in bundles(path, "asked_format:Asked")] == [{"en": "How do I hum?"}]


def test_a_file_is_opened_once(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")  # can be read once, from its beginning to its end

    def feed():
        with open(tmp_path / "x.jsonl", "w") as pipe:
            pipe.write("\n" + json.dumps(OWN) + "\n" + json.dumps({**OWN, "chosen": "Hum."}) + "\n")

    writer = threading.Thread(target=feed)
    writer.start()
    assert [line for line, _ in read(tmp_path / "x.jsonl")] == [2, 3]
    writer.join()


# --------------------------------------------------------------------------------------------------- on an object store


@pytest.fixture
def both(tmp_path, s3, request, monkeypatch):
    """The same files in a folder of this machine and of a bucket, with blocks so small that they are read in parts."""
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    for module in (contents, sources):
        monkeypatch.setattr(module, "BLOCK_BYTES", 200)
    here, there = tmp_path / "files", Place(s3) / request.node.name
    here.mkdir()
    records = [{"kind": "benign", "prompts": {"en": f"Number {n}?", "zh": "数" * (n % 5 + 1)}} for n in range(20)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (here / "a.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), here / "b.parquet", row_group_size=3)
    (here / "c.csv").write_text("id,en,fr\n1,Hello?,Salut ?\n2,Bye?,\n", encoding="utf-8")
    (here / "d.json").write_text(json.dumps(records[:3]), encoding="utf-8")
    there.storage.publish(here, str(there))
    return here, there


def test_sources_on_an_object_store_are_read_as_those_of_a_folder(both):
    _, there = both
    local, remote = (resolve_source(SourceSection(path=str(folder), kind="benign")) for folder in both)
    assert [file.path for file in remote] == [f"{there}/{name}" for name in ("a.jsonl", "b.parquet", "c.csv", "d.json")]
    parts = []
    for mine, theirs in zip(local, remote, strict=True):
        assert mine.fingerprint() == theirs.fingerprint()
        read = [
            [reading.rows() for reading in readings_of(file, contents_of(file.files()), blocks=1)]
            for file in (mine, theirs)
        ]
        parts.append(len(read[1]))
        mine_rows, their_rows = ([row for part in rows for row in part] for rows in read)
        assert [(row.line, row.parsed) for row in mine_rows] == [(row.line, row.parsed) for row in their_rows]
        assert {row.file for row in their_rows} == {theirs.path}
    assert parts[0] > 3 and parts[1] > 3


def test_the_content_of_an_object_is_remembered_until_it_is_replaced(both, monkeypatch):
    _, there = both
    monkeypatch.setattr(contents, "_SETTLED_SECONDS", -60.0)
    place = there / "a.jsonl"
    first = contents_of([place])
    assert contents_of([place], lambda blocks: iter(() if not blocks else [1 / 0])) == first
    place.write_text("{}\n")
    assert contents_of([place])[place].line_breaks == [1]


def test_what_is_read_by_its_path_alone_is_refused_at_a_url(both):
    _, there = both
    (there / "saved" / "state.json").write_text("{}")
    for path, format, said in (
        ("saved", "auto", "saved dataset"),
        ("", "xsafety", "reads folders by their path"),
        ("x.jsonl", "auto", "does not exist"),
    ):
        with pytest.raises(BundleFileError, match=f"s3://.*{said}"):
            resolve_source(SourceSection(path=f"{there}/{path}".rstrip("/"), format=format))
