"""Models of the hub, which a server on this machine plays: asked once for a commit, whose files are what is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlc_ray.runs import resolve_model
from mlc_ray.storage import HubError, HubModel, fingerprint_model, pinned_model, without_commit
from tests.data.hub_server import Hub, running

FIRST, SECOND = "a" * 40, "b" * 40
READ = """
import json, sys
from pathlib import Path
from mlc_ray.runs import pinned_weights
from mlc_ray.storage import fingerprint_model, local_model
from mlc_ray.storage.hub import HubError

weights, known, *names = sys.argv[1:]
for name in names:
    try:
        pinned = pinned_weights(name, json.loads(known))
        folder = Path(local_model(pinned, weights=weights == "weights"))
        files = {file.name: file.read_text() for file in sorted(folder.iterdir())}
        print(json.dumps([pinned, fingerprint_model(pinned), files]))
    except HubError as error:
        print(json.dumps(str(error)))
"""


def files(text: str) -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors")
    return {name: f"{name} {text}".encode() for name in names}


@pytest.fixture
def hub():
    with running(
        Hub("owner/Model", {FIRST: files("one"), SECOND: files("two")}, {"main": SECOND, "v1": FIRST}, "models")
    ) as served:
        yield served


def read(hub, home, *names, weights=True, known=None, offline=False):
    """What a process of a machine whose cache is in `home` says of each name: commit, fingerprint, files, or error."""
    process = reading(hub, home, *names, weights=weights, known=known, offline=offline)
    said, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(text) for text in said.splitlines()]


def reading(hub, home, *names, weights=True, known=None, offline=False):
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home)}
    ours["MLC_RAY_CACHE"] = str(home / "ours")
    arguments = ["weights" if weights else "tokenizer", json.dumps(known or {}), *names]
    return subprocess.Popen(
        [sys.executable, "-c", READ, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **ours}
    )


def test_a_model_is_loaded_at_the_commit_that_its_name_stands_for(hub, tmp_path):
    newest, tagged, unknown, nothing = read(
        hub, tmp_path, "owner/Model", "owner/Model#v1", "owner/Model#v9", "owner/nothing"
    )
    assert newest[0] == f"owner/Model#{SECOND}" and tagged[0] == f"owner/Model#{FIRST}"
    # No pickle is fetched, and no second copy of the weights.
    assert newest[2] == {"config.json": "config.json two", "model.safetensors": "model.safetensors two"}
    assert tagged[2] == {"config.json": "config.json one", "model.safetensors": "model.safetensors one"}
    assert newest[1] != tagged[1]
    assert unknown.startswith("'owner/Model#v9': 'owner/Model' has no branch, tag or commit 'v9'")
    assert nothing.startswith("'owner/nothing': it is not on this machine, and the hub has no model 'owner/nothing'")

    # Another node is given the commit: it does not ask what a name stands for, and a branch that moved changes nothing.
    hub.refs["main"], hub.asked = FIRST, []
    (there,) = read(hub, tmp_path / "node", newest[0], weights=False)
    assert there == [newest[0], newest[1], {"config.json": "config.json two"}]
    assert not [path for path in hub.asked if path.endswith(("/owner/Model", "/main"))]
    # Work that goes on keeps the commit that it began with.
    assert read(hub, tmp_path, "owner/Model", known={"owner/Model": newest[0]}) == [newest]
    assert read(hub, tmp_path, "owner/Model") == [tagged]

    guessed, cached = read(hub, tmp_path, "owner/Model", newest[0], offline=True)
    assert "the hub cannot be asked which commit that is" in guessed and "owner/Model#COMMIT" in guessed
    assert FIRST in guessed and SECOND in guessed
    assert cached == newest
    (only,) = read(hub, tmp_path / "node", "owner/Model", weights=False, offline=True)
    assert only == there  # the only commit in that machine's cache


def test_the_workers_of_a_node_fetch_once(hub, tmp_path):
    pinned = f"owner/Model#{FIRST}"
    read(hub, tmp_path / "alone", pinned)
    alone, hub.asked = sorted(hub.asked), []
    workers = [reading(hub, tmp_path, pinned) for _ in range(3)]
    said = {worker.communicate()[0] for worker in workers}
    assert len(said) == 1 and json.loads(said.pop())[2]["model.safetensors"] == "model.safetensors one"
    assert sorted(hub.asked) == alone  # three as one

    (cache,) = (tmp_path / "hub").glob(f"*/snapshots/{FIRST}")
    (cache / "model.safetensors").resolve().unlink()  # somebody cleared the hub's cache in part
    assert read(hub, tmp_path, pinned)[0][2]["model.safetensors"] == "model.safetensors one"


def test_a_name_is_the_text_of_its_parts():
    assert str(HubModel.parse("owner/name#refs/pr/1")) == "owner/name#refs/pr/1"
    assert HubModel.parse("gpt2") == HubModel("gpt2")
    for path in ("./owner", "/models/name", "s3://bucket/model", "a/b/c", "owner/name#", "owner/name:split"):
        assert HubModel.parse(path) is None
    assert without_commit(f"owner/name#{FIRST}") == "owner/name"
    assert without_commit("owner/name#v1") == "owner/name#v1"
    assert fingerprint_model(f"owner/name#{FIRST}") != fingerprint_model(f"owner/name#{SECOND}")


def test_a_folder_has_no_revision(tmp_path: Path):
    for read_by in (pinned_model, resolve_model):
        with pytest.raises(HubError, match=r"is on this machine, where it has no revision 'v1'; leave out #v1"):
            read_by(f"{tmp_path}#v1")
    (tmp_path / "a#b").mkdir()
    assert pinned_model(str(tmp_path / "a#b")) == str(tmp_path / "a#b")  # that is how it is called
