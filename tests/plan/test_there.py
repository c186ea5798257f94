"""The cluster that is there: what nodes say of themselves, not what Ray's names leave of it."""

import pytest

from mlc_ray import cluster
from mlc_ray.cluster import ClusterError
from mlc_ray.device import HostMemory, VisibleGpu
from mlc_ray.plan.hardware import HardwareError
from mlc_ray.plan.rates import Rates, calibration_file, write_calibration
from mlc_ray.plan.there import cluster_here, cluster_there, known_cluster

GIB = 2**30


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """Nodes by id, each with the answers that its tasks give."""
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path))
    found = {}

    def compute(*, gpu, labels):
        return [
            {"NodeID": node, "Resources": {"GPU": float(len(gpus))}, "Labels": own}
            for node, (gpus, own) in found.items()
            if labels.items() <= own.items()
        ]

    def ask(function, *, nodes):
        answers = {"host_memory": lambda _: HostMemory(512 * GIB, 0, None), "visible_gpus": lambda node: found[node][0]}
        return {node: answers[function.__name__](node) for node in nodes}

    monkeypatch.setattr("mlc_ray.cluster.nodes_that_compute", compute)
    monkeypatch.setattr("mlc_ray.cluster.ask_nodes", ask)
    monkeypatch.setattr("mlc_ray.cluster.this_node", lambda: "driver")
    return found


def test_gpus_are_those_that_nodes_name_and_the_least_of_them_counts(nodes):
    nodes["there 1"] = ([VisibleGpu("NVIDIA A100-SXM4-40GB", 42 * 10**9)] * 8, {})
    found = cluster_there(gpu=True)
    assert (found.gpu.name, found.gpu.memory, found.gpus, found.per_node) == ("a100-40", 42 * 10**9, 8, 8)
    assert found.node_memory == 512 * GIB
    nodes["there 2"] = ([VisibleGpu("NVIDIA H100 PCIe", 85 * 10**9)] * 4, {"pool": "train"})
    both = cluster_there(gpu=True)
    assert (both.gpu.name, both.gpus, both.per_node) == ("a100-40", 12, 4)
    labelled = cluster_there(gpu=True, labels={"pool": "train"})
    assert (labelled.gpu.name, labelled.gpu.link, labelled.gpus) == ("h100-pcie", 64e9, 4)


def test_a_gpu_of_the_cluster_that_nobody_knows_is_named_until_it_is_calibrated(nodes, caplog):
    nodes["there 3"] = ([VisibleGpu("NVIDIA B200", 190 * 10**9)], {})
    with pytest.raises(HardwareError, match=r"'NVIDIA B200' is not known.*mlc-ray plan --calibrate"):
        cluster_there(gpu=True)
    with caplog.at_level("INFO"):
        assert known_cluster(gpu=True) is None
    assert "memory is not planned: gpu 'NVIDIA B200' is not known" in caplog.text
    write_calibration(Rates("b200", "bfloat16", 9e14, 1e-3, 2e11, None, 1.0, "today"))
    assert cluster_there(gpu=True).gpu.name == "b200"
    with pytest.raises(HardwareError, match=r"no node with GPUs that has the labels \{'pool': 'x'\}"):
        cluster_there(gpu=True, labels={"pool": "x"})


def test_a_damaged_file_of_calibrations_stops_nothing_that_is_only_looked_at(nodes, tmp_path, caplog):
    nodes["there 6"] = ([VisibleGpu("NVIDIA L4", 23 * 10**9)], {})
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text("[{")
    assert known_cluster(gpu=True) is None
    assert "memory is not planned" in caplog.text and "is damaged" in caplog.text


def test_a_node_that_does_not_answer_is_warned_of(nodes, monkeypatch, caplog):
    ask = cluster.ask_nodes
    nodes["there 4"] = ([VisibleGpu("NVIDIA L4", 23 * 10**9)], {})
    monkeypatch.setattr("mlc_ray.cluster.ask_nodes", lambda _, nodes: {n: ClusterError("gone") for n in nodes})
    assert known_cluster(gpu=True) is None
    assert "did not say which GPUs it has, and is not planned with (gone)" in caplog.text
    monkeypatch.setattr("mlc_ray.cluster.ask_nodes", ask)  # it is asked again, and its GPUs are counted then alone
    nodes["there 5"] = ([VisibleGpu("NVIDIA H200", 150 * 10**9)] * 8, {})
    assert known_cluster(gpu=True).gpus == 9


def test_without_a_cluster_it_is_this_machine_and_a_gpu_that_it_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr("mlc_ray.cluster.running", lambda: None)
    monkeypatch.setattr("mlc_ray.plan.there.visible_gpus", lambda: [VisibleGpu("NVIDIA L4", 23 * 10**9)] * 2)
    found = cluster_here()
    assert (found.gpu.name, found.gpu.memory, found.gpus) == ("l4", 23 * 10**9, 2)
    assert cluster_here("local", accelerator="cpu").gpu is None
    monkeypatch.setattr("mlc_ray.plan.there.visible_gpus", list)
    assert cluster_here().gpu is None
    with pytest.raises(HardwareError, match=r"accelerator='gpu', but this machine has no GPU: name a cluster"):
        cluster_here(accelerator="gpu")
