"""Parts lie on nodes, by size and label, and on those that an autoscaler may still start."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mlc_ray.capacity import Growth, Need, Node, amount, fit, growth_of, look, most_that_fit, said_of, workers_needed
from mlc_ray.cluster import ClusterError, check_fits, could_fit, use_gpu, with_dtype
from mlc_ray.config import ConfigError, EngineSection, ModelSection, TrainConfig, parse_config
from mlc_ray.config.placement import selects
from mlc_ray.config.train import ClusterSection
from tests.ray_head import running

H100, L4 = {"ray.io/accelerator-type": "H100", "zone": "a"}, {"ray.io/accelerator-type": "L4", "zone": "b"}
MIXED = [Node({"CPU": 8.0}), Node({"CPU": 16.0, "GPU": 8.0}, H100), Node({"CPU": 16.0, "GPU": 8.0}, L4)]


@pytest.mark.parametrize(
    ("value", "takes"),
    [("H100", [True, False, False]), ("!H100", [False, True, True]), ("in(H100, L4)", [True, True, False]),
     ("!in(H100,L4)", [False, False, True])],
)  # fmt: skip
def test_labels_select_nodes_as_ray_does(value: str, takes: list[bool]) -> None:
    assert [selects({"ray.io/accelerator-type": value}, labels) for labels in (H100, L4, {})] == takes


def test_workers_and_engines_lie_on_nodes_of_their_labels() -> None:
    workers = [Need(1, 1, {"ray.io/accelerator-type": "H100"})] * 8
    assert fit(workers, MIXED) and not fit([*workers, workers[0]], MIXED)
    # An engine takes no GPU of the kind that workers ask for, though it came first and would fit there.
    assert fit([Need(1, 8), *workers], MIXED)
    assert not fit([Need(1, 1, {"zone": "c"})], MIXED)
    assert most_that_fit(Need(1, 2, {"zone": "b"}), MIXED) == 4
    assert most_that_fit((1, 16), MIXED) == 1  # sixteen GPUs there are, on no one node
    section = ClusterSection(workers=[2, 4], cpus_per_worker=0.5, label_selector={"zone": "a"})
    assert workers_needed(section, gpu=True) == [Need(0.5, 1.0, {"zone": "a"})] * 2
    assert amount([*workers, (0.5, 0)]) == (
        "8 x (1 CPUs, 1 GPUs, labels ray.io/accelerator-type=H100) + 1 x (0.5 CPUs)"
    )
    assert (
        said_of(MIXED) == "1 x (8 CPUs) + 1 x (16 CPUs, 8 GPUs, labels zone=a) + 1 x (16 CPUs, 8 GPUs, labels zone=b)"
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("label_selector", {"zone": "a b"}, r"'zone': 'a b' is not what Ray selects nodes by; write VALUE"),
        ("env", ["HF_TOKEN=hf_secret"], r"env has 'HF_TOKEN=\.\.\.', which is no name of a variable"),
        ("env", ["*"], r"env has '\*', which would take variables that Ray sets"),
        ("env", ["R*"], r"env has 'R\*', which would take variables that Ray sets"),
        ("env", ["RAY_AUTH_TOKEN"], r"env has 'RAY_AUTH_TOKEN', which would take variables that Ray sets"),
    ],
)
def test_what_cannot_be_selected_is_refused(field: str, value: object, said: str) -> None:
    settings = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "b"}]}, "cluster": {field: value}}
    with pytest.raises(ConfigError, match=said):
        parse_config(TrainConfig, settings)


AUTOSCALER = {
    "cluster_name": "c",
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}},
        "gpu": {"resources": {"CPU": 16, "GPU": 8}, "max_workers": 2, "labels": H100},
        "cpu": {"resources": {"CPU": 32}},
    },
}


def test_nodes_that_an_autoscaler_may_start_count() -> None:
    growth = growth_of(AUTOSCALER)
    gpu, cpu = Node({"CPU": 16, "GPU": 8}, H100), Node({"CPU": 32})
    head = Node({"CPU": 4.0})
    assert growth.beside([head], at_most=2) == ([gpu, gpu, cpu, cpu], 3)  # three in all
    assert growth.beside([head, gpu], at_most=9) == ([gpu, cpu, cpu, cpu], 2)
    assert growth.beside([head, gpu, gpu, cpu], at_most=9) == ([cpu, cpu], 0)
    assert Growth().beside([head], at_most=9) == ([], 0)


def test_kinds_of_one_size_are_told_apart_by_their_labels() -> None:
    size, head = {"CPU": 16.0, "GPU": 8.0}, Node({"CPU": 4.0})
    a, b, any_zone = Node(size, {"zone": "a"}), Node(size, {"zone": "b"}), Node(size)
    growth = Growth(((a, 2), (b, 2)), 9)
    there = [head, *[Node(size, {"zone": "a", "ray.io/node-id": name}) for name in "12"]]
    assert growth.beside(there, at_most=9) == ([b, b], 2)
    assert fit([Need(1, 8, {"zone": "b"})], there, *growth.beside(there, at_most=9))
    # Of a kind without labels and of zone a, a node of zone a is the latter; one of no kind takes no kind's place.
    both = Growth(((any_zone, 1), (a, 2)), 9)
    assert both.beside(there, at_most=9) == ([any_zone], 1)
    assert growth.beside([head, any_zone], at_most=9) == ([a, a, b, b], 4)


def test_nodes_are_added_for_what_asks_for_them() -> None:
    """The cluster's limit is kept, and spent on nodes of the kind that is asked for."""
    more = [*[Node({"CPU": 16.0, "GPU": 8.0}, H100)] * 2, *[Node({"CPU": 16.0, "GPU": 8.0}, L4)] * 2]
    head = [Node({"CPU": 4.0})]
    policy, judge = Need(1, 8, {"zone": "a"}), Need(1, 1, {"zone": "b"})
    assert fit([judge], head, more, 1)  # not a node of H100s, which come first
    assert fit([policy, judge], head, more, 2)
    assert not fit([policy, judge], head, more, 1)
    assert not fit([policy, policy, judge], head, more, 2)
    assert fit([(1, 1)] * 16, head, [Node({"CPU": 2.0, "GPU": 1.0}), *more], 2)  # the larger ones
    assert not fit([(4, 0)], head) and fit([(4, 0)], head, more, 1)  # some CPU is left


def test_machines_reached_by_ssh_say_nothing_of_their_size() -> None:
    """As Ray fills in a file of `type: local`: one type, the head's too, whose resources are found when it starts."""
    from ray.autoscaler._private.util import prepare_config

    file = Path(__file__).resolve().parent.parent / "cluster" / "ray-cluster.yaml"
    assert not growth_of(prepare_config(yaml.safe_load(file.read_text(encoding="utf-8")))).known
    both = {"max_workers": 2, "head_node_type": "n", "available_node_types": {"n": {"resources": {"CPU": 4}}}}
    assert growth_of(both) == Growth((), 2)
    both["available_node_types"]["n"]["max_workers"] = 2
    assert growth_of(both) == Growth(((Node({"CPU": 4}), 2),), 2)


PROVIDER = {
    "provider": {"type": "fake_multinode", "head_node_id": "f" * 56},
    "auth": {},
    "docker": {},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@pytest.mark.slow
def test_the_head_of_an_autoscaling_cluster_says_what_may_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real head with Ray's own provider of pretended nodes: nothing is started until something asks for it."""
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    config = tmp_path / "cluster.yaml"
    kinds = AUTOSCALER["available_node_types"].values()
    filled = {**AUTOSCALER, **PROVIDER}
    for kind in kinds:
        kind |= {"node_config": {}, "min_workers": 0}
    config.write_text(yaml.safe_dump(filled, sort_keys=False))
    with running(f"--autoscaling-config={config}") as head:
        assert look(head.gcs) == growth_of(AUTOSCALER)
        said = "".join(file.read_text() for file in head.folder.glob("session_2*/logs/monitor.*"))
        # Before it starts, it may find the port of its metrics taken by another Ray of this machine.
        assert "Traceback" not in said.split("Monitor: Started")[-1], said
    with running() as head:
        assert look(head.gcs) == Growth()


def process(folder: Path, number: int, *line: str) -> None:
    (folder / str(number)).mkdir(parents=True)
    (folder / str(number) / "cmdline").write_bytes("\0".join(line).encode() + b"\0")


def test_the_autoscaler_of_this_cluster_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, config = tmp_path / "proc", tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(AUTOSCALER, sort_keys=False))
    assert look("10.0.0.1:6379", tmp_path) == Growth()
    monitor = "/venv/ray/autoscaler/_private/monitor.py"
    process(processes, 7, "python", "-u", monitor, "--gcs-address=10.0.0.1:7000", f"--autoscaling-config={config}")
    process(processes, 8, "python", "-u", monitor, "--gcs-address=10.0.0.1:6379")
    assert look("10.0.0.1:6379", processes) == Growth()  # it has a monitor that scales nothing
    assert look("10.0.0.1:7000", processes) == growth_of(AUTOSCALER)
    for content in ("a: [", "- 1\n", None):  # no YAML, no configuration, not there for this user
        config.unlink() if content is None else config.write_text(content)
        assert look("10.0.0.1:7000", processes) == Growth(known=False)
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    assert look("10.0.0.1:6379", processes).known
    assert not look("10.0.0.1:1", processes).known  # KubeRay's is in another container


@pytest.fixture
def autoscaling(monkeypatch: pytest.MonkeyPatch):
    """A cluster whose only node has no GPU, and what its autoscaler may start."""

    def of(growth: Growth) -> None:
        monkeypatch.setattr("mlc_ray.cluster.nodes_there", lambda: [Node({"CPU": 4.0})])
        monkeypatch.setattr("mlc_ray.cluster.cluster_resources", lambda: {"CPU": 4.0})
        monkeypatch.setattr("mlc_ray.cluster.may_grow", lambda: growth)

    return of


def test_a_cluster_at_zero_is_no_cluster_without_gpus(autoscaling, caplog) -> None:
    workers = [Need(1, 1, {"ray.io/accelerator-type": "H100"})] * 16
    autoscaling(growth_of(AUTOSCALER))
    assert use_gpu("auto") and use_gpu("gpu") and not use_gpu("cpu")
    assert could_fit(workers)
    with pytest.raises(
        ClusterError, match=r"training needs 17 x .* has 1 x \(4 CPUs\), and may add 2 x \(16 .* in all"
    ):
        check_fits("training", [*workers, workers[0]])

    autoscaling(Growth(known=False))
    assert use_gpu("gpu") and could_fit(workers)
    assert not use_gpu("auto")
    assert "which nodes the autoscaler may start is not known: this runs on CPUs" in caplog.text

    autoscaling(Growth())
    assert not use_gpu("auto") and not could_fit(workers)
    with pytest.raises(ClusterError, match=r"the Ray cluster has no GPU; set it"):
        use_gpu("gpu")


def test_dtypes_are_asked_of_the_nodes_that_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": name, "Resources": dict(node.resources), "Labels": dict(node.labels)}
        for name, node in zip("abc", MIXED, strict=True)
    ]
    monkeypatch.setattr("mlc_ray.cluster.living_nodes", lambda: nodes)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("mlc_ray.cluster._native_dtype", lambda nodes, *, gpu: asked.append(nodes) or "bfloat16")
    with_dtype(ModelSection(path="m"), gpu=True, labels={"zone": "a"})
    with_dtype(EngineSection(label_selector={"zone": "b"}), gpu=True)
    with_dtype(EngineSection(), gpu=False)
    assert asked == [("b",), ("c",), ("a", "b", "c")]
