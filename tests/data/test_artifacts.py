"""Token rows and the reference's numbers on a real S3 server: made there by tasks, fetched once per machine, mapped."""

import json
import multiprocessing
from pathlib import Path

import pytest

from mlc_ray.config import DataSection, ModelSection, SourceSection
from mlc_ray.data.artifacts import local_artifact
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.rejects import InvalidBundlesError
from mlc_ray.data.store import TokenArtifact, finish_artifact, shard_file, write_shard
from mlc_ray.data.tables import rows_to_table
from mlc_ray.storage import IncompleteArtifactError, Place, read_manifest
from mlc_ray.types import TokenRow

ROWS = [TokenRow(f"id{n:03}", "benign", ["en"], [[1, n]], [1], 0, [2, n], [3]) for n in range(10)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """This machine's cache, for the test alone."""
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artifacts"


@pytest.fixture
def stored(s3, request):
    """Two shards and a manifest in a folder of the bucket that no other test has."""
    place = Place(s3) / request.node.name
    shards = [write_shard(place, shard_file(n), [rows_to_table(part)]) for n, part in enumerate((ROWS[:4], ROWS[4:]))]
    finish_artifact(place, shards, fingerprint="x", rejected={})
    return place


def first_id(url, ready, found):
    ready.wait(60)
    found.put(TokenArtifact.open(url).rows([7])[0].bundle_id)


def test_processes_that_open_an_artefact_at_the_same_time_fetch_it_once(stored, cache):
    context = multiprocessing.get_context("spawn")  # the client of an object store does not survive a fork
    ready, found = context.Barrier(3), context.Queue()
    workers = [context.Process(target=first_id, args=(str(stored), ready, found), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [found.get(timeout=60) for _ in workers] == ["id007"] * 3
    for worker in workers:
        worker.join()
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert TokenArtifact.open(stored).rows(range(10)) == ROWS
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_a_copy_that_lost_a_file_is_fetched_again_and_a_changed_artefact_has_another(stored, cache):
    copy = local_artifact(stored, read_manifest(stored))
    (copy / shard_file(1)).unlink()
    assert TokenArtifact.open(stored).rows([9]) == ROWS[9:]
    finish_artifact(
        stored, [write_shard(stored, shard_file(0), [rows_to_table(ROWS[:3])])], fingerprint="y", rejected={}
    )
    assert len(TokenArtifact.open(stored)) == 3
    (stored / shard_file(0)).remove()
    (copies,) = {path.parent for path in Path(cache).glob("*/manifest.json")} - {copy}
    (copies / shard_file(0)).unlink()
    with pytest.raises(IncompleteArtifactError, match=r"s3://.*'rows-00000\.arrow' is missing"):
        TokenArtifact.open(stored)


def test_bundles_become_token_rows_on_an_object_store(ray_local, smollm2, s3, tmp_path):
    records = [
        {"kind": "benign", "prompts": {"en": f"Count to {n}?", "de": f"{n}?"}, "chosen": f"{n}"} for n in range(9)
    ]
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, part in zip(files, (records[:5], [*records[5:], records[2], {"kind": "x"}]), strict=True):
        file.write_text("".join(json.dumps(one) + "\n" for one in part))
    data = DataSection(train=[SourceSection(path=str(file)) for file in files], on_invalid="skip")
    model, remote = ModelSection(path=str(smollm2)), Place(s3) / "cache"
    here = prepare_token_rows(data, model, cache_dir=tmp_path / "local")
    there = prepare_token_rows(data, model, cache_dir=remote)
    assert there.table(range(9)) == here.table(range(9))
    assert there.folder == remote / here.folder.name
    assert there.rejects_path.read_text() == here.rejects_path.read_text()
    named = {"rejects.jsonl", "rows-00000.arrow", "once-00001.arrow"}
    assert read_manifest(there.folder)["files"].keys() == named
    # Another run may still read what was written before a repeat was found.
    assert there.folder.sizes().keys() == named | {"manifest.json", "rows-00001.arrow"}
    assert here.folder.sizes().keys() == named | {"manifest.json"}
    assert prepare_token_rows(data, model, cache_dir=remote).folder == there.folder
    with pytest.raises(InvalidBundlesError, match=r"2 of 11 rows(?s:.)*'s3://test/cache/tokens-.*\.rejects\.jsonl'"):
        prepare_token_rows(data.model_copy(update={"on_invalid": "fail"}), model, cache_dir=remote)
    (kept,) = (place for place in remote.iterdir() if place.name.endswith(".rejects.jsonl"))
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [6, 5]
