"""The reference's cached numbers on disk: what two runs that share a cache, or a damaged folder, come to."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.storage import write_manifest
from mlc_ray.train import reference_cache as ray_reference
from mlc_ray.train.reference_cache import TABLE, load_reference, prepare_reference
from tests.train.tiny import tiny_config

TOKENS = SimpleNamespace(fingerprint="t", bundle_ids=["a", "b"])


def said(chosen):
    return pa.table({"bundle_id": ["a", "b"], "chosen": [chosen, chosen], "rejected": [-2.0, -2.0]})


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepare with a number given in the model's place, and something that happens while it is computed."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = tiny_config(model={"path": str(model)})

    def prepared(chosen, meanwhile=lambda: None):
        def compute(*_, **__):
            meanwhile()
            return said(chosen)

        monkeypatch.setattr(ray_reference, "_compute", compute)
        folder, _ = prepare_reference(config, TOKENS, layer=2, cache_dir=tmp_path / "cache", gpu=False)
        return folder, load_reference(folder)["a"].chosen

    return prepared


def write(folder, chosen):
    folder.mkdir(exist_ok=True)
    pq.write_table(said(chosen), folder / TABLE)
    write_manifest(folder)


def test_a_complete_folder_is_used_again(prepare):
    folder, chosen = prepare(-1.0)
    assert chosen == -1.0
    assert prepare(-9.0) == (folder, -1.0)


@pytest.mark.parametrize("damage", ["table", "manifest"])
def test_an_incomplete_folder_is_computed_again(prepare, damage, caplog):
    folder, _ = prepare(-1.0)
    (folder / {"table": TABLE, "manifest": "manifest.json"}[damage]).unlink()
    assert prepare(-3.0) == (folder, -3.0)
    assert "; computing it again" in caplog.text
    assert json.loads((folder / "manifest.json").read_text())["bundles"] == 2


@pytest.mark.parametrize("damaged_before", [False, True])
def test_the_folder_of_a_faster_run_is_used(prepare, damaged_before):
    folder, _ = prepare(-1.0)
    (folder / TABLE).unlink()
    if not damaged_before:
        (folder / "manifest.json").unlink()
        folder.rmdir()
    assert prepare(-3.0, meanwhile=lambda: write(folder, -5.0)) == (folder, -5.0)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
