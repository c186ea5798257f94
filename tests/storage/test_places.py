"""Places and storages: the seam itself, on this machine and through `examples/my_storage.py`."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest

from examples.my_storage import VaultStorage
from mlc_ray.cli import main
from mlc_ray.config import ConfigError, ScoreConfig, TrainConfig, UtilityConfig, parse_config
from mlc_ray.report.collect import collect
from mlc_ray.runs import OutputFolderError, kind_of, output_folder, output_place, read_metrics
from mlc_ray.score.results import load_records, load_scores
from mlc_ray.storage import Place, StorageError, storage_of, working_folder, write_manifest
from tests.report.runs import grid, steps, write_run, write_score


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the vault keeps its objects."""
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    return tmp_path / "vault"


@pytest.fixture(params=["local", "vault", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, vault: Path) -> Place:
    if request.param == "s3":
        return Place(f"{request.getfixturevalue('s3')}/{tmp_path.name}/here")
    return Place(tmp_path / "here") if request.param == "local" else Place("vault://team/here")


def test_a_place_reads_and_writes_the_same_wherever_it_is(place: Place) -> None:
    assert not place.exists()
    assert (place.iterdir(), place.is_dir(), place.is_file()) == ([], False, False)
    (place / "a" / "x.json").write_json({"ü": 1})
    (place / "b.txt").write_text("one")
    (place / "b.txt").write_text("two")
    assert [inside.name for inside in place.iterdir()] == ["a", "b.txt"]
    assert place.is_dir()
    assert not place.is_file()
    assert (place / "a" / "x.json").read_json() == {"ü": 1}
    assert (place / "b.txt").read_text() == "two"
    assert (place / "b.txt").parent == place
    with pytest.raises(FileNotFoundError):
        (place / "none").read_text()
    with pytest.raises(ZeroDivisionError), (place / "b.txt").open("wb") as file:
        file.write(b"three")
        raise ZeroDivisionError
    assert (place / "b.txt").read_text() == "two"
    (place / "a" / "y").write_parts([b"12", memoryview(b"345")])
    assert place.sizes() == {"a/x.json": 14, "a/y": 5, "b.txt": 3}
    assert (place / "a").sizes(["y", "none"]) == {"y": 5}
    assert (place / "none").sizes() == {}
    (place / "a").remove()
    assert [inside.name for inside in place.iterdir()] == ["b.txt"]
    assert pickle.loads(pickle.dumps(place)) == place


def test_a_working_folder_is_published_also_after_an_error_and_only_what_changed(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), working_folder(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "kept").write_text("kept")
        (folder / "gone").write_text("gone")
        raise ZeroDivisionError
    with working_folder(place) as folder:
        assert (folder / "sub" / "kept").read_text() == "kept"
        (folder / "gone").unlink()
        (folder / "new").write_text("new")
    assert [inside.name for inside in place.iterdir()] == ["new", "sub"]
    place.storage.fetch(str(place), copy := tmp_path / "copy")
    assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == ["kept", "new"]


def test_what_names_a_folder_complete_is_published_last(
    vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put = VaultStorage._put
    monkeypatch.setattr(VaultStorage, "_put", lambda self, url: sent.append(url) or put(self, url))
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "z").write_text("z")
    write_manifest(checkpoint, step=1)
    (checkpoint / "link").symlink_to("/etc/hostname")
    storage_of("vault://c").publish(checkpoint, "vault://c")
    assert sent == ["vault://c/model/z", "vault://c/manifest.json"]
    sent.clear()
    with working_folder(Place("vault://s"), last=("scores.json",)) as folder:
        (folder / "scores.json").write_text("{}")
        (folder / "zzz").write_text("")
    assert sent == ["vault://s/zzz", "vault://s/scores.json"]


def test_a_place_elsewhere_is_no_local_path(vault: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"'vault://team' is not on this machine.*all nodes share"):
        Path(Place("vault://team"))
    with pytest.raises(StorageError, match=r"'ftp://b': ftp:// cannot be opened here"):
        Place("ftp://b").exists()
    assert Path(Place(tmp_path)) == tmp_path


def test_an_absolute_url_has_one_spelling() -> None:
    for url in ("vault://team/a/b", "VAULT://team//a///b/", "vault://team/a/b//"):
        assert Place(url).absolute() == output_place(url) == Place("vault://team/a/b")
    for url in ("vault://team", "vault:///a", "vault:/a"):  # the last two are refused where they are used
        assert Place(url).absolute() == Place(url)


def test_a_file_that_is_created_is_on_the_disk_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(os.fstat(opened).st_ino))
    assert Place(tmp_path / "file").create("whole")
    assert (tmp_path / "file").stat().st_ino in synced


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_gone(
    fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.stat

    def failing(path: object, *arguments: object, **named: object) -> os.stat_result:
        if str(path) == str(tmp_path / "file"):
            raise OSError(fault, os.strerror(fault), str(path))
        return status(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", failing)
    file = Place(tmp_path / "file")
    for look in (file.is_file, file.exists, file.is_dir):
        with pytest.raises(OSError, match=rf"\[Errno {fault}\]"):
            look()


def test_a_link_to_itself_cannot_be_looked_at_and_a_name_in_a_file_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        (Place(tmp_path) / "loop").is_file()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file/inside", "none", "broken", "null\0byte"):
        place = Place(tmp_path) / name
        assert (place.is_file(), place.exists(), place.is_dir()) == (False, False, False)
    assert Place("").is_dir() and (Place(tmp_path) / "file").is_file()


def test_a_registered_scheme_passes_where_places_are_used_and_nowhere_else(vault: Path) -> None:
    score = {"model": "m", "benchmarks": [{"path": "b.csv"}], "output_dir": "vault://team/scores"}
    assert parse_config(ScoreConfig, score).output_dir == "vault://team/scores"
    assert output_place("vault://team/scores") == Place("vault://team/scores")
    with pytest.raises(OutputFolderError, match=r"output_dir='vault://team' is not on this machine"):
        output_folder("vault://team")
    with pytest.raises(OutputFolderError, match=r"output_dir='ftp://team': ftp:// cannot be opened here"):
        output_place("ftp://team")
    run = {
        "name": "r",
        "model": {"path": "vault://m"},
        "data": {"train": [{"path": "d"}]},
        "output_dir": "vault://team",
    }
    parsed = parse_config(TrainConfig, run)
    assert (parsed.output_dir, parsed.model.path) == ("vault://team", "vault://m")
    with pytest.raises(ConfigError, match=r"output_dir='vault://team': vault:// cannot be opened here"):
        parse_config(UtilityConfig, {"model": "vault://m", "tasks": ["t"], "output_dir": "vault://team"})


def test_a_run_and_its_scores_are_read_from_a_vault_as_from_a_disk(
    vault: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_run(tmp_path / "mine", steps())
    rows = grid(["en", "sw"], lambda kind, code: 0.9 if kind == "harmful" else 0.1)
    write_score(local / "scores" / "after", rows)
    run = Place("vault://team/mine")
    run.storage.publish(local, str(run), last=("scores.json",))
    (tmp_path / "mine").rename(tmp_path / "away")  # nothing of it is found by its old path

    assert kind_of(run) == "run"
    assert read_metrics(run) == steps()
    result = load_scores(run / "scores" / "after")
    assert result.folder == run / "scores" / "after"
    assert result.summaries == load_scores(tmp_path / "away" / "scores" / "after").summaries
    assert len(load_records(result)) == len(rows)
    collection = collect([run])
    assert [training.label for training in collection.trainings] == ["mine"]
    assert len(collection.models[0].responses) == len(rows)

    monkeypatch.chdir(tmp_path)
    assert main(["report", "vault://team/mine", "--out", "from-vault.html"]) == 0
    assert capsys.readouterr().out == "from-vault.html\n"
    assert main(["report", str(tmp_path / "away"), "--out", "from-disk.html"]) == 0
    assert len((tmp_path / "from-vault.html").read_text()) == pytest.approx(
        len((tmp_path / "from-disk.html").read_text()), abs=2000
    )
    assert not (tmp_path / "vault:").exists()
    assert json.loads((run / "run.json").read_text())["total_steps"] == 24
