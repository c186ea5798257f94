"""The reference pass: the same numbers on any workers, resumed by shard, and what runs that share a cache come to."""

import json
import os
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.my_storage import VaultStorage  # noqa: F401 - registers vault://
from mlc_ray.data.batches import BatchError
from mlc_ray.data.plan import Lengths
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.plan.cutting import BUNDLES_PER_REFERENCE_FORWARD
from mlc_ray.storage import IncompleteArtifactError, Place, read_manifest, verify_checksums
from mlc_ray.train import reference_cache, reference_shards
from mlc_ray.train.model import load_policy
from mlc_ray.train.reference import ReferenceModel
from mlc_ray.train.reference_cache import asked_of, prepare_references
from mlc_ray.train.reference_pass import Asking
from mlc_ray.train.reference_shards import StoredReference, load_reference, shard_files, shard_number, write_shard
from mlc_ray.train.worker import frozen_reference
from tests.data.files import write_rows
from tests.train.tiny import on_workers, random_rows, tiny_config, tiny_model

CPU = torch.device("cpu")
ASKED = {"log_probs": True, "layer": 2, "pairing": "response", "pooling": None}
BUNDLES, SHARD = 22, 6  # four shards, the last of four bundles
STAGES = {"zero0": {"stage": 0}, "zero3": {"stage": 3, "persistence_threshold": 0}}


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(reference_shards, "SHARD_BUNDLES", SHARD)
    monkeypatch.setattr("mlc_ray.train.reference_pass.BUNDLES_PER_WORKER", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and token rows."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_model().save_pretrained(folder / "model")
    (folder / "tokens").mkdir()
    write_rows(folder / "tokens", [rows_to_table(random_rows(BUNDLES))], fingerprint="t", rejected={})
    return folder


@pytest.fixture(scope="module")
def said(place):
    """What the model says of each bundle, in a plain forward of it alone."""
    model = ReferenceModel(load_policy(configured(place).model), **ASKED).eval()
    tokens = TokenArtifact.open(place / "tokens")
    asking = Asking(lambda batch: model(batch, state=batch.taps), True, True, 1, CPU, "response", False)
    with torch.no_grad():
        return np.concatenate([asking.ask(tokens, np.array([row]), lambda _: None) for row in range(BUNDLES)])


def configured(place, **sections):
    return tiny_config(model={"path": str(place / "model")}, terms={"anchor": {"weight": 0.3}}, **sections)


def check(folder, said):
    stored = load_reference(folder)
    rows = [BUNDLES - 1, 0, SHARD, 3]
    taken = stored.take(rows)
    for name in ("chosen", "rejected", "state"):
        assert getattr(taken, name) == pytest.approx(said[name][rows], rel=1e-6, abs=1e-6), name
    assert stored.take(range(BUNDLES)).chosen == pytest.approx(said["chosen"], rel=1e-6)
    assert read_manifest(folder)["bundles"] == BUNDLES and taken.chosen.dtype == np.float64


# ----------------------------------------------------------------------------------------------- workers with an engine


def ask_on_all(rank, place, cache):
    reference_shards.SHARD_BUNDLES = SHARD
    tokens = TokenArtifact.open(place / "tokens")
    for name, stage in STAGES.items():
        config = configured(place, engine=stage)
        asking = Asking.of(config, frozen_reference(config, ASKED, CPU), ASKED, CPU)
        asking.fill(Place(cache / name), tokens, key="k", beat=lambda _: None)
    # Without a budget, as on a GPU by default.
    replace(asking, tokens_per_forward=None).fill(Place(cache / "eight"), tokens, key="k", beat=lambda _: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_workers_at_any_zero_stage_say_what_the_model_says(workers, place, said, tmp_path):
    on_workers(workers, ask_on_all, tmp_path / "results", place, tmp_path)
    for name in (*STAGES, "eight"):
        assert len(shard_files(Place(tmp_path / name))) == 4
        check(tmp_path / name, said)


# ----------------------------------------------------------------------------------------- passes in the test's process


class Counted:
    """The reference, which does something before one of its forwards, and may err by rounding."""

    def __init__(self, place, before=None, then=lambda: None, factor=1.0):
        self.model = ReferenceModel(load_policy(configured(place).model), **ASKED).eval()
        self.before, self.then, self.factor, self.forwards, self.bundles = before, then, factor, 0, []

    @torch.no_grad()
    def __call__(self, batch):
        if self.forwards == self.before:
            self.then()
        self.forwards += 1
        self.bundles += batch.bundle_ids
        given = self.model(batch, state=batch.taps)
        return replace(given, chosen=given.chosen * self.factor)


def fill(place, folder, reference, tokens="tokens"):
    asking = Asking.of(configured(place), reference, ASKED, CPU)
    asking.fill(Place(folder), TokenArtifact.open(place / tokens), key="k", beat=lambda _: None)
    return reference


def die():
    raise KeyboardInterrupt


def of_shards(*numbers):
    return {
        f"bundle-{row:02d}" for number in numbers for row in range(number * SHARD, min(BUNDLES, number * SHARD + SHARD))
    }


def test_a_pass_that_died_goes_on_with_the_shards_that_are_missing(place, said, tmp_path):
    folder = tmp_path / "ours"
    whole = fill(place, tmp_path / "whole", Counted(place))
    dying = Counted(place, before=whole.forwards // 2 + 1, then=die)
    with pytest.raises(KeyboardInterrupt):
        fill(place, folder, dying)
    assert sorted(map(shard_number, shard_files(Place(folder)))) == [0, 1]
    assert not (folder / "manifest.json").exists()
    again = fill(place, folder, Counted(place))
    assert set(again.bundles) == of_shards(2, 3) and again.forwards < whole.forwards
    check(folder, said)


def test_a_damaged_shard_is_asked_again(place, said, tmp_path, caplog):
    folder = tmp_path / "ours"
    fill(place, folder, Counted(place))
    (name,) = [name for name in shard_files(Place(folder)) if shard_number(name) == 2]
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    (folder / "manifest.json").unlink()
    assert set(fill(place, folder, Counted(place)).bundles) == of_shards(2)
    assert f"{folder / name} is damaged; the reference is asked again" in caplog.text
    verify_checksums(folder, read_manifest(folder))
    check(folder, said)


@pytest.mark.parametrize("where", ["here", "vault"])
def test_of_two_passes_at_once_the_first_to_end_is_kept_whole(where, place, said, tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    folder = Place("vault://team/ours") if where == "vault" else Place(tmp_path / "ours")
    another = Counted(place, factor=1 + 1e-7)
    fill(place, folder, Counted(place, before=5, then=lambda: fill(place, folder, another)))
    assert len(set(another.bundles)) > SHARD  # it found what the first had written, and did the rest
    manifest = read_manifest(folder)
    verify_checksums(folder, manifest)
    assert len(manifest["files"]) == 4 < len(shard_files(folder))
    check(folder, said)


def test_no_bundles_are_a_complete_folder_without_shards(place, tmp_path):
    (place / "none").mkdir()
    write_rows(place / "none", [rows_to_table([])], fingerprint="none", rejected={})
    fill(place, tmp_path / "ours", Counted(place), tokens="none")
    assert read_manifest(tmp_path / "ours")["bundles"] == 0 and not shard_files(Place(tmp_path / "ours"))


def test_forwards_on_a_gpu_are_alike_in_tokens(place):
    tokens = TokenArtifact.open(place / "tokens")
    own = tokens.counted(partial(Lengths.own_tokens, head=tokens.head, taps=False, rejected=True))
    model, forwards = Counted(place), []

    def reference(batch):
        forwards.append(sum(own[int(each.removeprefix("bundle-"))] for each in batch.bundle_ids))
        return model(batch)

    # Dealt out in this order, one forward would get the longest ones.
    rows = np.empty(BUNDLES, dtype=int)
    rows[0::3], rows[1::3], rows[2::3] = np.split(np.argsort(-own), [8, 15])
    Asking(reference, True, True, None, CPU, "response", False).ask(tokens, rows, lambda _: None)
    assert sum(forwards) == own.sum() and len(forwards) <= -(-BUNDLES // BUNDLES_PER_REFERENCE_FORWARD) + 1
    assert max(forwards) - min(forwards) <= own.min()


def test_a_bundle_without_an_answer_that_is_needed_is_named(place, tmp_path):
    rows = random_rows(BUNDLES)
    rows[12] = replace(rows[12], rejected=None)
    (place / "lacking").mkdir()
    write_rows(place / "lacking", [rows_to_table(rows)], fingerprint="lacking", rejected={})
    with pytest.raises(BatchError, match="bundle bundle-12 has no 'rejected' answer"):
        fill(place, tmp_path / "ours", Counted(place), tokens="lacking")


# ----------------------------------------------------------------------------------------------- the driver, by its key


@pytest.fixture
def prepare(place, monkeypatch):
    """Prepare with one worker, which is this process; says where, and about which bundles the reference was asked."""

    def prepared(cache, **sections):
        reference = Counted(place)

        def here(worker, spec, cluster, **_):
            asking = Asking.of(configured(place), reference, ASKED, CPU)
            for each in spec.asked:
                asking.fill(each.folder, TokenArtifact.open(each.tokens_folder), key=each.key, beat=lambda _: None)

        monkeypatch.setattr(reference_cache, "run_workers", here)
        tokens = TokenArtifact.open(place / "tokens")
        found = prepare_references(configured(place, **sections), [tokens], layer=2, cache_dir=cache, gpu=False)
        return found["t"], set(reference.bundles)

    return prepared


def test_a_complete_folder_is_used_again_and_a_lost_shard_alone_is_made_again(prepare, said, tmp_path, caplog):
    folder, asked = prepare(tmp_path)
    assert asked == of_shards(0, 1, 2, 3)
    assert prepare(tmp_path, cluster={"workers": 2}, engine={"stage": 3}, train={"tokens_per_forward": 9}) == (
        folder,
        set(),
    )
    first = min(Path(folder).glob("shard-*"))
    first.unlink()
    assert prepare(tmp_path) == (folder, of_shards(0))
    assert f"{first.name!r} is missing; making again what is missing" in caplog.text
    assert json.loads((folder / "manifest.json").read_text())["tokens"] == "t"
    check(folder, said)


def test_more_shards_can_be_read_than_a_process_may_have_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_shards, "OPEN_SHARDS", 8)
    shards = 40
    rows = np.zeros(1, dtype=[("chosen", "f8")])
    names = []
    for number in range(shards):
        rows["chosen"] = number
        names.append(write_shard(Place(tmp_path), number, rows)[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        taken = StoredReference([tmp_path / name for name in names], 1).take(range(shards))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert taken.chosen.tolist() == list(range(shards))


def test_what_is_needed_decides_the_key(place):
    tokens = TokenArtifact.open(place / "tokens")
    both = configured(place)
    plain = both.model_copy(update={"terms": {}})
    keys = [
        asked_of(config, tokens, layer=layer, cache_dir=place, gpu=False).key
        for config, layer in ((both, 2), (both, 3), (plain, 2), (plain, 3))
    ]
    assert len(set(keys)) == 3 and keys[2] == keys[3]  # no states, so no layer


def test_shards_on_an_object_store_are_fetched_and_checked(prepare, said, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    folder, asked = prepare(Place(s3))
    assert len(asked) == BUNDLES and prepare(Place(s3)) == (folder, set())
    check(folder, said)
    (name, *_) = shard_files(folder)
    (folder / name).write_bytes(b"\0" * folder.sizes([name])[name])
    shutil.rmtree(tmp_path / "cache")  # another machine
    with pytest.raises(IncompleteArtifactError, match=f"{name!r} has checksum .*; remove '{s3}/reference-"):
        load_reference(folder)
