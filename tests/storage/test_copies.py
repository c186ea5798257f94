"""Models that are elsewhere: one copy for a machine, whole or not at all, by content; and those needed for a moment."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from mlc_ray.runs import ModelPathError, longest_context, resolve_model, training_languages
from mlc_ray.storage import CacheError, Place, fingerprint_model, fingerprint_tokenizer, local_model, model_for_now
from tests.checkpoints import complete
from tests.storage.test_places import place, vault  # noqa: F401 - fixtures

LARGE = 9 << 20  # bytes: more than the samples that a fingerprint reads, so that it reads samples


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models in the user's cache."""
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_model(folder: Place, weights: bytes = b"w" * LARGE) -> Place:
    (folder / "config.json").write_json({"max_position_embeddings": 512})
    (folder / "tokenizer.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(weights)
    return folder


def test_a_copy_is_of_the_content(place: Place, cache: Path, tmp_path: Path) -> None:  # noqa: F811
    model = write_model(place / "m")
    twin = write_model(Place(tmp_path / "twin"))
    assert fingerprint_model(str(model)) == fingerprint_model(str(twin))
    assert fingerprint_tokenizer(str(model)) == fingerprint_tokenizer(str(twin))
    copy = Path(local_model(str(model)))
    if model.is_local:
        assert copy == Path(model) and not cache.exists()
        return
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (copy / "model.safetensors").read_bytes() == b"w" * LARGE
    assert sorted(path.name for path in Path(local_model(str(model), weights=False)).iterdir()) == [
        "config.json", "tokenizer.json",
    ]  # fmt: skip
    (copy / "mark").touch()
    assert local_model(str(model)) == str(copy) and (copy / "mark").exists()  # it is not fetched again
    write_model(model, b"v" * LARGE)  # of the same size
    assert (Path(local_model(str(model))) / "model.safetensors").read_bytes() == b"v" * LARGE
    with pytest.raises(CacheError, match=r"none': nothing is there; give the folder"):
        local_model(str(place / "none"))
    with pytest.raises(CacheError, match=r"MLC_RAY_CACHE='s3://b'"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLC_RAY_CACHE", "s3://b")
        local_model(str(model))


def fetch(url: str, barrier: object) -> str:
    barrier.wait()  # type: ignore[attr-defined]
    return local_model(url)


def test_processes_of_a_machine_share_one_copy(s3: str, cache: Path, tmp_path: Path) -> None:
    model = write_model(Place(s3) / tmp_path.name / "shared")
    with multiprocessing.Manager() as manager, multiprocessing.get_context("spawn").Pool(3) as pool:
        barrier = manager.Barrier(3)
        folders = pool.starmap(fetch, [(str(model), barrier)] * 3, chunksize=1)
    assert len(set(folders)) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(folders[0]).name]


def test_a_copy_for_now_goes_with_its_last_user(vault: Path, cache: Path) -> None:  # noqa: F811
    model = write_model(Place("vault://team/checkpoint"))
    with model_for_now(str(model)) as first:
        with model_for_now(str(model)) as second:
            assert first == second
        assert (Path(first) / "config.json").is_file()
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    with model_for_now(str(model)) as again:
        assert (Path(again) / "model.safetensors").stat().st_size == LARGE


def test_a_run_elsewhere_is_a_model(vault: Path) -> None:  # noqa: F811
    run = Place("vault://team/run")
    with pytest.raises(ModelPathError, match=r"model='vault://team/run' does not exist"):
        resolve_model(run)
    (run / "run.json").write_json({"languages": ["en", "sw"]})
    with pytest.raises(ModelPathError, match=r"'vault://team/run' holds no model: neither config.json"):
        resolve_model(run)
    checkpoint = run / "train" / "checkpoint_000002"
    write_model(checkpoint / "model", b"w")
    complete(checkpoint, 2)
    assert resolve_model(run) == resolve_model(checkpoint) == f"{checkpoint}/model"
    assert training_languages(run) == training_languages(str(checkpoint)) == ["en", "sw"]
    assert longest_context(resolve_model(run)) == 512
    (checkpoint / "model" / "model.safetensors.index.json").write_json({"weight_map": {"a": "b.safetensors"}})
    with pytest.raises(ModelPathError, match=r"is incomplete: .* names 'b.safetensors', not there"):
        resolve_model(checkpoint / "model")
