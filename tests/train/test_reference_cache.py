"""The reference's cached numbers on disk: what two runs that share a cache, or a damaged folder, come to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from examples.my_storage import VaultStorage  # noqa: F401 - registers vault://
from mlc_ray.data.batches import BatchError
from mlc_ray.data.store import TokenArtifact, write_rows
from mlc_ray.data.tables import rows_to_table
from mlc_ray.storage import IncompleteArtifactError, Place, write_manifest
from mlc_ray.train import reference_cache as ray_reference
from mlc_ray.train.model import ModelError
from mlc_ray.train.reference_cache import column_file, load_reference, prepare_reference
from tests.train.tiny import random_rows, tiny_config, tiny_model

CHOSEN = column_file("chosen")


class Tokens:
    fingerprint = "t"

    def __len__(self):
        return 2


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepare with a number given in the model's place, and something that happens while it is computed."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = tiny_config(model={"path": str(model)})

    def prepared(chosen, meanwhile=lambda: None, cache=tmp_path / "cache"):
        def compute(config, tokens, needed, folder, **_):
            np.save(folder / CHOSEN, [chosen] * len(tokens))
            meanwhile()

        monkeypatch.setattr(ray_reference, "_compute", compute)
        folder = prepare_reference(config, Tokens(), layer=2, cache_dir=cache, gpu=False)
        return Path(folder) if folder.is_local else folder, load_reference(folder).chosen[0]

    return prepared


def write(folder, chosen):
    folder.mkdir(exist_ok=True)
    np.save(folder / CHOSEN, [chosen] * 2)
    write_manifest(folder)


def test_a_complete_folder_is_used_again(prepare):
    folder, chosen = prepare(-1.0)
    assert chosen == -1.0
    assert prepare(-9.0) == (folder, -1.0)


@pytest.mark.parametrize("damage", ["table", "manifest"])
def test_an_incomplete_folder_is_computed_again(prepare, damage, caplog):
    folder, _ = prepare(-1.0)
    (folder / {"table": CHOSEN, "manifest": "manifest.json"}[damage]).unlink()
    assert prepare(-3.0) == (folder, -3.0)
    assert "; making it again" in caplog.text
    assert json.loads((folder / "manifest.json").read_text())["bundles"] == 2


@pytest.mark.parametrize("damaged_before", [False, True])
def test_the_folder_of_a_faster_run_is_used(prepare, damaged_before):
    folder, _ = prepare(-1.0)
    (folder / CHOSEN).unlink()
    if not damaged_before:
        (folder / "manifest.json").unlink()
        folder.rmdir()
    assert prepare(-3.0, meanwhile=lambda: write(folder, -5.0)) == (folder, -5.0)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def vault(tmp_path, monkeypatch):
    """A storage elsewhere, and a cache of this machine for the test alone."""
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "here"))
    return Place("vault://team")


def test_elsewhere_nothing_is_written_over_the_numbers_of_another_run(prepare, vault):
    def another(stops):
        prepare(-1.0, cache=vault)
        if stops:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(0.0, meanwhile=lambda: another(stops=True), cache=vault)
    folder, chosen = prepare(-7.0, cache=vault)
    assert chosen == -1.0
    (folder / CHOSEN).remove()
    assert prepare(-3.0, meanwhile=lambda: another(stops=False), cache=vault) == (folder, -1.0)
    (folder / CHOSEN).remove()
    assert prepare(-5.0, cache=vault) == (folder, -5.0)


def test_elsewhere_numbers_of_the_same_size_that_the_manifest_does_not_name_are_refused(prepare, vault, tmp_path):
    folder, _ = prepare(-1.0, cache=vault)
    with (folder / CHOSEN).open("wb") as file:
        np.save(file, [-2.0] * 2)
    shutil.rmtree(tmp_path / "here")  # another machine
    with pytest.raises(
        IncompleteArtifactError, match=r"'chosen\.npy' has checksum .*; remove 'vault://team/reference-"
    ):
        prepare(-1.0, cache=vault)


@pytest.fixture
def place(tmp_path):
    """A tiny model, and token rows of which one has no rejected answer."""
    rows = random_rows(20)
    rows[12] = replace(rows[12], rejected=None)
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "tokens").mkdir()
    write_rows(tmp_path / "tokens", [rows_to_table(rows)], fingerprint="t", rejected={})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("model", "error"), [("model", BatchError), ("broken", ModelError)])
def test_an_actor_of_the_pass_hands_over_an_error_of_ours_as_data(place, monkeypatch, model, error):
    class Scored:
        def map_batches(self, scorer, *, fn_constructor_kwargs, **_):
            self.scorer = scorer(**fn_constructor_kwargs)
            return self

        def iter_batches(self, **_):
            return (self.scorer({"row": np.arange(start, start + 4)}) for start in range(0, 20, 4))

    monkeypatch.setattr(ray_reference.ray.data, "from_blocks", lambda _: Scored())
    config = tiny_config(model={"path": str(place / model)})
    with pytest.raises(error) as caught:
        prepare_reference(config, TokenArtifact.open(place / "tokens"), layer=2, cache_dir=place / "cache", gpu=False)
    assert type(caught.value) is error


def test_numbers_come_back_to_their_rows_in_whatever_order_they_are_made(place, monkeypatch):
    parts = [np.array([3, 1]), np.array([0, 2])]

    class Scored:
        def map_batches(self, *_, **__):
            return self

        def iter_batches(self, **_):
            for rows in parts:
                states = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(rows, 2), pa.float32()), 2)
                yield pa.table({"row": rows, "chosen": rows * -1.0, "state": states})

    monkeypatch.setattr(ray_reference.ray.data, "from_blocks", lambda _: Scored())
    (place / "four").mkdir()
    write_rows(place / "four", [rows_to_table(random_rows(4))], fingerprint="t", rejected={})
    config, tokens = tiny_config(model={"path": str(place / "model")}), TokenArtifact.open(place / "four")
    folder = prepare_reference(config, tokens, layer=2, cache_dir=place / "cache", gpu=False)
    found = load_reference(folder)
    assert isinstance(found.state, np.memmap) and found.rejected is None
    taken = found.take([2, 0])
    assert taken.chosen.tolist() == [-2.0, 0.0] and taken.state.tolist() == [[2.0, 2.0], [0.0, 0.0]]
    parts.pop()
    with pytest.raises(RuntimeError, match="asked for 4 bundles and said something of 2"):
        prepare_reference(config, tokens, layer=2, cache_dir=place / "other", gpu=False)


def test_numbers_on_an_object_store_are_fetched_and_mapped(place, s3, monkeypatch):
    monkeypatch.setenv("MLC_RAY_CACHE", str(place / "cache"))
    monkeypatch.setattr(
        ray_reference, "_compute", lambda config, tokens, needed, folder, **_: np.save(folder / CHOSEN, [-1.0, -2.0])
    )
    config = tiny_config(model={"path": str(place / "model")})
    folder = prepare_reference(config, Tokens(), layer=2, cache_dir=Place(s3), gpu=False)
    found = load_reference(folder).chosen
    assert isinstance(found, np.memmap) and found.tolist() == [-1.0, -2.0]
    assert prepare_reference(config, Tokens(), layer=2, cache_dir=Place(s3), gpu=False) == folder
    assert sorted(folder.sizes()) == [CHOSEN, "manifest.json"]
