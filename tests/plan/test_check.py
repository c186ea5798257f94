"""What commands refuse before they start, and the command that says why."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from transformers import AutoConfig

from mlc_ray._registry import resolve
from mlc_ray.capacity import Growth, Node
from mlc_ray.cli import build_parser, main
from mlc_ray.cli.arguments import judge_changes
from mlc_ray.config import EngineSection, ScoreConfig, SearchConfig, TrainConfig, load_config
from mlc_ray.config.train import ClusterSection
from mlc_ray.judges.base import make_judge
from mlc_ray.judges.panel import readers_of
from mlc_ray.plan.check import check_run
from mlc_ray.plan.check_engines import check_beside, check_engine
from mlc_ray.plan.engines import room_of
from mlc_ray.plan.hardware import Cluster, cluster_of, gpu_of
from mlc_ray.plan.lengths import assumed
from mlc_ray.plan.rates import Rates, rates_of, write_calibration
from mlc_ray.plan.runs import PlanError, plan_run
from mlc_ray.plan.scores import plan_scoring, plan_search
from mlc_ray.plan.shapes import config_of, known_shape, shape_of
from tests.plan.test_memory import run

EIGHT = cluster_of(8, "h100")
LAYERS = "space={mlc.layer: {choice: [8, 16, last]}, mlc.weight: {choice: [0.8, 2.4]}}"


def test_a_run_that_cannot_fit_is_refused_with_its_part_and_the_nearest_that_would():
    config = run(model={"path": "Qwen/Qwen2.5-32B-Instruct"}, cluster={"workers": 8}, engine={"stage": 1})
    with pytest.raises(
        PlanError, match=r"GiB of each worker's memory, which has 79\.1; the largest part is weights"
    ) as said:
        check_run(config, gpu=True, cluster=EIGHT)
    assert "the nearest that fits: engine.stage=3" in str(said.value)


def test_what_fits_and_what_is_not_to_be_checked_passes():
    check_run(run(model={"path": "Qwen/Qwen2.5-7B"}, cluster={"workers": 8}), gpu=True, cluster=EIGHT)
    check_run(run(model={"path": "Qwen/Qwen2.5-72B"}, cluster={"plan": "skip"}), gpu=True, cluster=EIGHT)
    check_run(run(engine={"name": "examples.my_engine:TorchDdp"}), gpu=True, cluster=EIGHT)


def test_the_check_is_turned_off_by_what_is_said_in_a_file_and_on_the_command_line():
    with pytest.raises(PlanError) as said:
        check_run(run(model={"path": "Qwen/Qwen2.5-72B"}), gpu=True, cluster=EIGHT)
    setting = re.search(r"cluster\.(plan)=(\S+) tries anyway", str(said.value))
    cluster = yaml.safe_load(f"{setting[1]}: {setting[2]}")
    check_run(run(model={"path": "Qwen/Qwen2.5-72B"}, cluster=cluster), gpu=True, cluster=EIGHT)
    scored = load_config(ScoreConfig, None, ["model=m", "benchmarks=[{path: 'sample:test'}]", "judge.name=refusal"])
    arguments = build_parser().parse_args(["judge", "there", "--set", f"plan={cluster['plan']}"])
    assert judge_changes(arguments, scored) == {"plan": "skip"}


def test_a_kind_of_model_that_the_arithmetic_does_not_know_is_counted_or_not_refused(tmp_path, caplog):
    gpt2 = AutoConfig.for_model("gpt2")
    gpt2.save_pretrained(tmp_path / "gpt2")
    assert known_shape(str(tmp_path / "gpt2"), trust_remote_code=False).parameters == 124_439_808
    mamba = AutoConfig.for_model("mamba")
    mamba.save_pretrained(tmp_path / "mamba")
    check_run(run(model={"path": str(tmp_path / "mamba")}), gpu=True, cluster=EIGHT)
    assert known_shape(str(tmp_path / "mamba"), trust_remote_code=False) is None


def test_workers_on_a_cpu_share_its_memory():
    config = run(model={"path": "Qwen/Qwen2.5-0.5B"}, cluster={"workers": 4, "accelerator": "cpu"})
    with pytest.raises(PlanError, match=r"on 4 x cpu needs .* GiB of each worker's memory, which has 5\.7"):
        check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 24 * 2**30))
    check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 96 * 2**30))
    check_run(config, gpu=False, cluster=Cluster(None, 4, 1, 24 * 2**30))  # four such nodes


def test_a_check_imports_no_model():
    code = (
        "import sys, mlc_ray.train.run\n"
        "from mlc_ray.config import TrainConfig\n"
        "from mlc_ray.plan.check import check_run\n"
        "from mlc_ray.plan.hardware import cluster_of\n"
        "from mlc_ray.plan.shapes import published_config\n"
        "published_config('7b')  # a driver has read a config by now\n"
        "config = TrainConfig.model_validate({'name': 'x', 'model': {'path': 'Qwen/Qwen2.5-7B', 'dtype': 'bfloat16'},\n"
        "    'data': {'train': [{'path': 'x.jsonl'}]}, 'cluster': {'workers': 8}})\n"
        "check_run(config, gpu=True, cluster=cluster_of(8, 'h100'))\n"
        "print('transformers.modeling_utils' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"


def test_an_engine_that_cannot_hold_the_model_is_refused():
    scoring = ScoreConfig(model="Qwen/Qwen2.5-72B", benchmarks=[{"path": "sample:test"}])
    with pytest.raises(PlanError, match=r"the nearest that fits: engine\.tensor_parallel=4"):
        check_engine(scoring.model, scoring, gpu=True, cluster=EIGHT)
    wide = scoring.model_copy(update={"engine": scoring.engine.model_copy(update={"tensor_parallel": 4})})
    check_engine(scoring.model, wide, gpu=True, cluster=EIGHT)
    with pytest.raises(PlanError, match=r"14 attention heads of Qwen/Qwen2\.5-0\.5B .* set one of 1, 2, 7"):
        check_engine("Qwen/Qwen2.5-0.5B", wide, gpu=True, cluster=EIGHT)
    with pytest.raises(PlanError, match=r"this machine has 21\.2 for it; lower engine\.cpu_kv_cache_gib=2"):
        check_engine(scoring.model, scoring, gpu=False, cluster=Cluster(None, 1, 1, 24 * 2**30))


def test_an_engine_lies_on_one_node_and_no_more_are_planned_than_fit():
    """Of 16 GPUs on nodes of 6, in whose rest no engine of four fits, too."""
    wide = EngineSection(tensor_parallel=16)
    with pytest.raises(PlanError, match=r"engine\.tensor_parallel=16, but an engine lies on one node, which has 8"):
        room_of(wide, cluster_of(16, "h100"))
    four = EngineSection(tensor_parallel=4, replicas=40)
    assert (room_of(four, cluster_of(16, "h100")), room_of(four, cluster_of(18, "h100", per_node=6))) == (4, 3)
    scoring = ScoreConfig(model="Qwen/Qwen2.5-72B", benchmarks=[{"path": "sample:test"}], engine=four)
    with pytest.raises(PlanError, match=r"engine\.replicas=40 with .*tensor_parallel=4, but 16 GPUs .* hold 4; lower"):
        check_engine(scoring.model, scoring, gpu=True, cluster=cluster_of(16, "h100"))


def test_engines_on_cpus_share_the_memory_of_their_nodes(monkeypatch):
    def check(nodes=1, memory=40, **engine):
        scoring = ScoreConfig(
            model="Qwen/Qwen2.5-7B", benchmarks=[{"path": "sample:test"}], engine={"dtype": "bfloat16", **engine}
        )
        check_engine(scoring.model, scoring, gpu=False, cluster=Cluster(None, nodes, 1, memory * 2**30))

    # Each 2 x 14.2 GiB of weights, 2 of cache and 1 for its process; Ray kills above 95 %, and has 1.6 GiB itself.
    check(replicas=1)
    check(replicas=4, nodes=4)
    check(replicas=4, memory=134)
    with pytest.raises(PlanError, match="4 engines on a node"):
        check(replicas=4, memory=133)
    with pytest.raises(
        PlanError,
        match=r"4 engines on a node .* need 125\.5 GiB, of which weights, which are there twice, 113\.5.*replicas=1",
    ):
        check(replicas=4)
    with pytest.raises(PlanError, match=r"2 engines on a node .* but a node has 36\.4 for them; .*engine\.replicas=2"):
        check(replicas=3, nodes=2)
    # `auto` is as many as the CPUs there hold, unless more nodes may come.
    monkeypatch.setattr("mlc_ray.plan.check_engines.known_cluster", lambda **_: Cluster(None, 1, 1, 40 * 2**30))
    monkeypatch.setattr("mlc_ray.cluster.nodes_there", lambda: [Node({"CPU": 4.0})])
    monkeypatch.setattr("mlc_ray.cluster.may_grow", lambda: Growth())
    auto = ScoreConfig(model="Qwen/Qwen2.5-7B", benchmarks=[{"path": "sample:test"}], engine={"replicas": "auto"})
    with pytest.raises(PlanError, match="3 engines on a node"):
        check_engine(auto.model, auto, gpu=False)
    monkeypatch.setattr("mlc_ray.cluster.may_grow", lambda: Growth(known=False))
    check_engine(auto.model, auto, gpu=False)


def test_trials_and_engines_on_cpus_share_the_memory_of_all_nodes():
    scoring = load_config(SearchConfig, "configs/search/demo.yaml", ["scoring.engine.dtype=bfloat16"]).scoring
    trial = run(model={"path": "Qwen/Qwen2.5-0.5B"}, cluster={"accelerator": "cpu"})
    node = Cluster(None, 1, 1, 24 * 2**30)
    check_beside(scoring, [trial], at_once=1, cluster=node)
    check_beside(scoring, [trial], at_once=2, cluster=Cluster(None, 2, 1, 24 * 2**30))
    with pytest.raises(PlanError, match=r"concurrency=3 trials of .* the engines beside them 4\.8, .*concurrency=1"):
        check_beside(scoring, [trial], at_once=3, cluster=node)
    lora = run(model={"path": "Qwen/Qwen2.5-0.5B", "lora": {"rank": 8}}, cluster={"accelerator": "cpu"})
    check_beside(scoring, [trial, lora], at_once=3, cluster=node)  # some may be small
    small = Cluster(None, 1, 1, 18 * 2**30)
    with pytest.raises(PlanError, match="use nodes with more memory"):
        check_beside(scoring, [trial], at_once=1, cluster=small)
    elsewhere = scoring.engine.model_copy(update={"label_selector": {"pool": "engines"}})
    check_beside(scoring.model_copy(update={"engine": elsewhere}), [trial], at_once=1, cluster=small)
    assert not check_beside(scoring, [trial], at_once=1, cluster=replace(small, node_memory=None)), "it is not known"


def test_trials_are_planned_by_the_calibration_of_as_many_threads(tmp_path, monkeypatch):
    """The one of other threads, which comes first in the file, measured far more bytes kept of each token."""
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path))
    for threads, kept in ((1, 1e6), (2, 1.0)):
        write_calibration(Rates("cpu", "bfloat16", 5e10, 0.0, 1e8, 4e8, kept, "today", threads))
    scoring = load_config(SearchConfig, "configs/search/demo.yaml", ["scoring.engine.dtype=bfloat16"]).scoring
    model, node = {"path": "Qwen/Qwen2.5-0.5B", "dtype": "bfloat16"}, Cluster(None, 1, 1, 24 * 2**30)
    check_beside(
        scoring, [run(model=model, cluster={"accelerator": "cpu", "cpus_per_worker": 2})], at_once=1, cluster=node
    )
    with pytest.raises(PlanError, match="concurrency=1 trials"):
        check_beside(scoring, [run(model=model, cluster={"accelerator": "cpu"})], at_once=1, cluster=node)


GUARD = {"name": "llama-guard", "model": "meta-llama/Llama-3.1-8B"}
SMALL = Cluster(replace(gpu_of("l4"), memory=15 * 2**30), 8, 8, None)


def test_the_engines_of_judges_guards_and_translators_are_planned_too():
    def check(judge, **given):
        config = ScoreConfig(model="Qwen/Qwen2.5-0.5B", benchmarks=[{"path": "sample:test"}], judge=judge)
        check_engine(config.model, config, gpu=True, cluster=SMALL, **given)

    check("refusal")
    check({**GUARD, "model": "meta-llama/Llama-3.2-1B"})
    with pytest.raises(
        PlanError, match=r"an engine for meta-llama/Llama-3\.1-8B .* \(judge\.engine\.tensor_parallel=1"
    ):
        check(GUARD)
    panel = {"name": "panel", "judges": [{"judge": "refusal"}, {"judge": GUARD}]}
    with pytest.raises(PlanError, match=r"nearest that fits: judge\.judges\.1\.judge\.engine\.tensor_parallel=2"):
        check(panel)
    translated = {"name": "refusal", "translate": {"model": "Qwen/Qwen2.5-7B"}}
    with pytest.raises(PlanError, match=r"nearest that fits: judge\.translate\.engine\.tensor_parallel=2"):
        check(translated)
    check(translated, readers=[])  # nobody reads what is translated
    check({**GUARD, "engine": {"options": {"quantization": "fp8"}}})  # what it takes is not known


def test_a_judge_of_a_panel_that_is_not_asked_is_not_planned():
    judges = [{"judge": "refusal", "kinds": ["benign"]}, {"judge": GUARD, "kinds": ["harmful"]}]
    config = ScoreConfig(
        model="Qwen/Qwen2.5-0.5B", benchmarks=[{"path": "sample:test"}], judge={"name": "panel", "judges": judges}
    )
    panel = make_judge(config.judge)
    benign, both = (
        readers_of(panel, [(kind, "en") for kind in kinds]) for kinds in (["benign"], ["benign", "harmful"])
    )
    check_engine(config.model, config, gpu=True, cluster=SMALL, readers=benign)
    with pytest.raises(PlanError, match="an engine for meta-llama"):
        check_engine(config.model, config, gpu=True, cluster=SMALL, readers=both)


def test_engines_that_a_plan_shows_are_those_that_a_command_refuses(monkeypatch, capsys):
    """On a CPU: all engines of a node share it, and in a search also the trials; the sentence is the refusal's."""

    def plan(kind, file, shape, *settings, memory=40):
        monkeypatch.setattr("mlc_ray.cli.plan.ray_is_up", lambda: False)
        monkeypatch.setattr("mlc_ray.cli.plan.cluster_here", lambda *_, **__: Cluster(None, 1, 1, memory * 2**30))
        asked = ["plan", "--for", kind, "--config", file, "--shape", shape, "--json"]
        status = main([*asked, *(part for each in settings for part in ("--set", each))])
        return status, json.loads(capsys.readouterr().out)

    config = "configs/score/default.yaml"
    status, found = plan("score", config, "7b", "engine.dtype=bfloat16")
    assert (status, found["fits"], found["replicas"]) == (0, True, 1)
    status, found = plan("score", config, "7b", "engine.dtype=bfloat16", "engine.replicas=4")
    assert (status, found["fits"], found["replicas"]) == (1, False, 4)
    assert "4 engines on a node" in found["refused"] and "engine.replicas=1" in found["refused"]
    status, found = plan("score", config, "0.5b", f"judge={json.dumps({**GUARD, 'model': 'Qwen/Qwen2.5-14B'})}")
    assert status == 1 and "Qwen2.5-14B needs" in found["refused"]
    assert [reader["of"] for reader in found["readers"]] == ["Qwen/Qwen2.5-14B"]

    def search(*settings):
        types = ("set=[model.dtype=bfloat16]", "scoring.engine.dtype=bfloat16", LAYERS)
        status, found = plan("search", "configs/search/demo.yaml", "0.5b", *types, *settings, memory=32)
        assert status == (not found["search"]["fits"])
        return found["search"]["refused"]

    assert search() is None
    assert "concurrency=3 trials of 0.5b" in search("concurrency=3")
    guard = {**GUARD, "model": "Qwen/Qwen2.5-7B", "engine": {"dtype": "bfloat16"}}
    assert "the engines beside them 36.2" in search(f"scoring.judge={json.dumps(guard)}")


def test_a_judge_that_is_a_model_has_its_time():
    """Each of its engines reads every answer, and writes its reply; by hand on two H100s of one engine each."""
    cluster = cluster_of(4, "h100")
    judged = ScoreConfig(model="x", benchmarks=[{"path": "x"}], judge=GUARD, max_new_tokens=200)
    plain = judged.model_copy(update={"judge": ScoreConfig(model="x", benchmarks=[{"path": "x"}]).judge})
    shape = shape_of(*config_of("0.5b"))
    with_judge, without = (plan_scoring(each, shape, cluster, prompts=10) for each in (judged, plain))
    (guard,) = with_judge.readers
    assert not without.readers and guard.of == "meta-llama/Llama-3.1-8B"
    tokens, reply = resolve("judge", "llama-guard").max_new_tokens, 2 * 8.03e9 / 3.35e12
    # It is asked with a template of its own, a prompt of 43 tokens and an answer of at most 200.
    read = 10 * 2 * 7.5e9 * (25 + 43 + 200) / (0.4 * 989e12)
    assert guard.seconds - guard.start == pytest.approx(read + tokens * reply, rel=0.02)
    assert with_judge.wall_seconds == pytest.approx(without.wall_seconds + guard.seconds)
    assert with_judge.held == without.held + 1  # GPUs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--simulate", "recipe:simulation/72b", "--gpus", "64"], "--gpus 64 is not read with --simulate"),
        (["--simulate", "recipe:simulation/72b", "--config", "recipe:quickstart"], "is not read with --simulate"),
        (
            ["--calibrate", "--config", "recipe:quickstart", "--shape", "72b"],
            "--shape 72b is not read with --calibrate",
        ),
        (["--config", "recipe:quickstart", "--gpu", "h200"], "--gpu h200 says what --gpus N are"),
        (["--config", "recipe:quickstart", "--node-memory", "64"], "--node-memory 64.0 says what --gpus N are"),
    ],
)
def test_options_that_nothing_would_read_are_refused(options, said, capsys):
    assert main(["plan", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "argument --gpus: '0' is no whole number from 1"),
        (["--gpus-per-node", "-2"], "argument --gpus-per-node: '-2' is no whole number from 1"),
        (["--node-memory", "-4"], "argument --node-memory: '-4' is no number above 0"),
    ],
)
def test_numbers_of_a_cluster_are_above_0(options, said, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *options])
    assert said in capsys.readouterr().err


def test_the_command_says_the_same_in_words_and_as_json(capsys):
    asked = ["plan", "--config", "recipe:qwen2.5-7b", "--gpus", "8", "--gpu", "h100"]
    assert main(asked) == 0
    words = capsys.readouterr().out
    assert "it fits" in words
    assert "of --gpus, not" not in words
    assert main([*asked, "--set", "cluster.workers=2"]) == 0
    assert "all 8 GPUs of --gpus, not cluster.workers=2" in capsys.readouterr().out
    assert "AdamW's moments" in words
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["worker_bytes"] == sum(part["bytes"] for part in found["memory"]["worker"])
    assert f"{found['worker_bytes'] / 2**30:.1f} of 79.1 GiB" in words
    assert found["gpu_hours"] == pytest.approx(8 * found["wall_seconds"] / 3600)


def test_what_does_not_fit_has_an_exit_status_of_its_own(capsys):
    asked = ["plan", "--config", "recipe:qwen2.5-7b", "--gpus", "1", "--gpu", "a100-40"]
    assert main([*asked, "--json"]) == 1
    told = capsys.readouterr()
    assert not json.loads(told.out)["fits"] and told.err.startswith("mlc-ray: error: it does not fit; ")


def test_scores_and_searches_are_planned(capsys):
    score = [
        "plan",
        "--for",
        "score",
        "--config",
        "configs/score/default.yaml",
        "--shape",
        "7b",
        "--gpus",
        "8",
        "--json",
    ]
    assert main(score) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["prompts"] > 0
    search = ["plan", "--for", "search", "--config", "configs/search/demo.yaml", "--shape", "0.5b", "--gpus", "8"]
    search += ["--set", LAYERS]
    assert main(search) == 0
    assert "the search, at most: 6 trials, 1 at once, 7 scores to choose and 4 to confirm" in capsys.readouterr().out
    asked = ["--set", "confirm.seeds=[7,8]", "--set", "concurrency=3", "--set", "score_every=6", "--json"]
    assert main([*search, *asked]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert (found["trials"], found["at_once"], found["runs"], found["scores"]) == (
        6,
        3,
        6 + 3 * 2,
        [1 + 6 * 3, 1 + 3 * 3],
    )


def test_every_corner_of_a_search_is_asked_about_and_the_first_that_cannot_fit_is_said(tmp_path, capsys):
    """Stage 3 of 7B on six GPUs fits, stage 0 does not: a search refuses it, and so does its plan."""
    raw = yaml.safe_load(Path("configs/search/demo.yaml").read_text())
    raw["space"] = {"engine.stage": {"choice": [3, 0]}}
    raw["set"] += ["cluster.workers=6", "model.dtype=bfloat16"]
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(raw))
    asked = ["plan", "--for", "search", "--config", str(file), "--shape", "7b", "--gpus", "8"]
    assert main([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["score"]["fits"] and not found["search"]["fits"]
    assert "7b with engine.stage=0 on 6 x h100 needs" in found["search"]["refused"]
    assert main([*asked, "--set", "space={engine.stage: {choice: [3, 2]}}"]) == 0
    words = capsys.readouterr().out
    assert "together" not in words and "each corner of its space fits" in words
    unchecked = yaml.safe_load(file.read_text())
    (other,) = {*get_args(ClusterSection.model_fields["plan"].annotation)} - {"check"}
    file.write_text(yaml.safe_dump({**unchecked, "set": [*unchecked["set"], f"cluster.plan='{other}'"]}))
    assert main(asked) == 1  # the longest trial, which is shown, does not fit; a search tries it all the same
    words = capsys.readouterr().out
    assert "it does not fit: each worker's memory" in words
    assert f"corners of its space are not checked: cluster.plan={other}" in words


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("score", ["score/default.yaml", "--shape", "7b", "--set", "engine.tensor_parallel=4"], "has 2 GPUs; lower it"),
        (
            "search",
            ["search/demo.yaml", "--shape", "0.5b"],
            "a trial on 2 GPUs beside engines on 1 needs more than the 2",
        ),
    ],
)
def test_what_the_named_cluster_cannot_hold_at_all_is_said(kind, options, said, capsys):
    file, *options = options
    asked = ["plan", "--for", kind, "--config", f"configs/{file}", "--gpus", "2", *options]
    assert main(asked) == 1
    assert said in capsys.readouterr().err
    assert main([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    found = found["search"] if kind == "search" else found
    assert not found["fits"] and said in found["refused"]


def test_an_elastic_run_is_planned_on_its_most_workers_and_asked_about_on_its_fewest(capsys, monkeypatch):
    asked = ["plan", "--config", "recipe:qwen2.5-7b", "--set", "engine.stage=3"]
    asked += ["--set", "cluster.workers=[1,16]", "--set", "cluster.max_failures=1", "--set", "checkpoint.every=5"]
    assert main([*asked, "--gpus", "16"]) == 1
    words = capsys.readouterr().out
    assert "it fits so, but not on its fewest workers" in words and "on 1 x h100 needs" in words
    monkeypatch.setattr("mlc_ray.cli.plan.cluster_here", lambda *_, **__: EIGHT)
    assert main([*asked, "--set", "cluster.workers=[4,16]"]) == 0
    assert "on 8 x h100 (1 nodes)" in capsys.readouterr().out.replace("1 node)", "1 nodes)")
    assert main([*asked, "--set", "cluster.workers=16"]) == 1
    assert "cluster.workers=16, but the cluster has 8 GPUs" in capsys.readouterr().err


def test_workers_of_an_elastic_run_on_cpus_are_asked_about_as_most_of_them_share_a_node(monkeypatch):
    config = run(
        model={"path": "Qwen/Qwen2.5-0.5B"},
        cluster={"workers": [1, 4], "accelerator": "cpu", "max_failures": 1},
        checkpoint={"every": 5},
    )
    monkeypatch.setattr("mlc_ray.plan.there.ray_is_up", lambda: True)
    monkeypatch.setattr("mlc_ray.cluster.nodes_there", lambda: [Node({"CPU": 16.0})])
    with pytest.raises(PlanError, match=r"on 4 x cpu needs") as said:
        check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 24 * 2**30))
    assert "use more workers" not in str(said.value)
    check_run(config, gpu=False, cluster=Cluster(None, 4, 1, 24 * 2**30))
    monkeypatch.setattr("mlc_ray.cluster.nodes_there", lambda: [Node({"CPU": 2.0})])  # more than two never meet
    check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 24 * 2**30))


def test_a_search_is_as_long_as_the_longest_trial_whatever_its_space_begins_with(tmp_path, capsys):
    """A weight of 0 leaves the prompts in other languages out, and is less work."""
    raw = yaml.safe_load(Path("configs/search/demo.yaml").read_text())
    raw["set"].remove("train.max_steps=18")
    found = []
    for weights, steps in (([0, 0.8], [4, 12]), ([0.8, 0], [12, 4])):
        raw["space"] = {"mlc.weight": {"choice": weights}, "train.max_steps": {"choice": steps}}
        file = tmp_path / "search.yaml"
        file.write_text(yaml.safe_dump(raw))
        assert main(["plan", "--for", "search", "--config", str(file), "--shape", "0.5b", "--gpus", "8", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["search"]["seconds"] == pytest.approx(found[1]["search"]["seconds"])
    assert found[0]["run"]["steps"] == 12
    raw["space"] = {"engine.name": {"choice": ["deepspeed", "examples.my_engine:TorchDdp"]}}
    raw["set"].append("engine={}")
    file.write_text(yaml.safe_dump(raw))
    assert main(["plan", "--for", "search", "--config", str(file), "--shape", "0.5b", "--gpus", "8"]) == 0
    assert "nothing of trials with another engine than deepspeed" in capsys.readouterr().out
    said = "each trial takes as long as that of {'mlc.weight': 0.8, 'train.max_steps': 12}, which takes longest"
    assert all(said in each["search"]["assumed"] for each in found)


def test_what_a_score_assumes_is_said(capsys):
    asked = ["plan", "--for", "score", "--config", "configs/score/default.yaml", "--shape", "7b", "--gpus", "8"]
    assert main([*asked, "--set", "benchmarks=[{path: data/typo.jsonl}]"]) == 0
    words = capsys.readouterr().out
    assert "1,800 prompts" in words
    assert "assumed: data/typo.jsonl is not here: 180 bundles in 10 languages, as published of one test set" in words
    assert "assumed: an engine: 72 s until it answers, 3.96e+02e12" in words.replace("396e12", "3.96e+02e12")
    assert "h100, not calibrated" in words


def test_a_search_on_cpus_pays_its_scores():
    config = load_config(SearchConfig, "configs/search/demo.yaml")
    base = load_config(TrainConfig, "configs/quickstart.yaml")
    cluster = Cluster(None, 1, 1, 24 * 2**30)
    shape, rates = shape_of(*config_of("smollm2-135m")), rates_of(None, "bfloat16")
    planned = plan_run(base, shape, cluster, assumed(base), rates, dtype="bfloat16", workers=1)
    score = plan_scoring(config.scoring, shape, cluster, prompts=100)
    answering = score.seconds - 13.0  # an engine starts in 13 s there
    assert answering > 0
    found = plan_search(config, planned, points=6, choosing=score, confirming=score, cluster=cluster)
    training = 6 * planned.wall_seconds - 5 * planned.reference_seconds  # the reference is asked once
    assert found.seconds == pytest.approx(13.0 + training + 11 * answering)
    assert found.gpu_hours == pytest.approx((training + found.seconds) / 3600)
