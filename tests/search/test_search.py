"""Whole searches on real Ray, DeepSpeed and vLLM, with a small random Llama: what they leave, and what they survive."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

from mlc_ray import cluster as ray_cluster
from mlc_ray.capacity import Node
from mlc_ray.cluster import ClusterError, fits, how_many_fit
from mlc_ray.config import SearchConfig, TrainConfig, load_config
from mlc_ray.errors import MlcRayError
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.runs import read_metrics
from mlc_ray.score.results import load_scores
from mlc_ray.score.run import judge_again
from mlc_ray.search.probe import choose_bundles, statistics
from mlc_ray.search.run import resume_search, search
from mlc_ray.search.trial import SearchError
from tests.generate.chat_server import Step, serving
from tests.ray_head import running as another_ray
from tests.scraping import target_of, watching

pytestmark = pytest.mark.slow
SECONDS = 400


@pytest.fixture(scope="module")
def run_place(small_llama: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few bundles of the sample, the config of a run, and that of a search over it."""
    folder = tmp_path_factory.mktemp("search")
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "bundles.jsonl").write_text("\n".join(sample[:8]) + "\n", encoding="utf-8")
    run = {
        "name": "base",
        "model": {"path": str(small_llama)},
        "data": {"train": [{"path": str(folder / "bundles.jsonl")}], "languages": ["en", "sw"]},
        "mlc": {"extractor_dim": 16},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"epochs": 4, "max_steps": 2},
        "engine": {"stage": 2},
        "cluster": {"address": "local", "workers": 1, "cpus_per_worker": 0.5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    searched = {
        "name": "found",
        "output_dir": str(folder),
        "train": str(folder / "run.yaml"),
        "space": {"mlc.layer": {"choice": [1, "last"]}},
        "score_every": 1,
        "sampler": "grid",
        "objective": {"name": "average", "min_benign_compliance": 0.0},
        "scoring": {
            "benchmarks": [{"path": "sample:select"}],
            "languages": ["en", "sw"],
            "limit": 4,
            "max_new_tokens": 4,
            "max_unparsed": 1.0,
            "engine": {"cpus_per_replica": 0.5, "max_model_len": 256, "cpu_kv_cache_gib": 1},
        },
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(searched))
    return folder


def configured(run_place: Path, *overrides: str) -> SearchConfig:
    return load_config(SearchConfig, run_place / "search.yaml", overrides)


def nothing_is_held(ray_local: Any) -> bool:
    """Whether all CPUs are free again and no placement group is left; Ray needs a moment to notice."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = [g for g in ray_local.util.placement_group_table().values() if g["state"] != "REMOVED"]
        if not groups and ray_local.available_resources().get("CPU") == ray_local.cluster_resources()["CPU"]:
            return True
        time.sleep(0.5)
    print(f"held: {groups}, of the CPUs {ray_local.available_resources().get('CPU')} are free", actors_alive(ray_local))
    return False


def actors_alive(ray_local: Any) -> list[str]:
    """The classes of the actors that run."""
    from ray.util.state import list_actors

    address = ray_local.get_runtime_context().gcs_address
    return [actor.class_name for actor in list_actors(address=address, filters=[("state", "=", "ALIVE")])]


def actors_started(ray_local: Any) -> Counter[str]:
    """How many actors were started since Ray was, dead ones too, by class, Ray Data's by what they run."""
    from ray.util.state import list_actors

    address = ray_local.get_runtime_context().gcs_address  # of this Ray, whatever else runs on the machine
    actors = list_actors(address=address, limit=10_000, detail=True, raise_on_missing_output=False)
    return Counter(re.sub(r"MapWorker\(Map\((\w+)\)\)", r"\1", actor.class_name) for actor in actors)


def check_logs(folder: Path, trials: list[str]) -> None:
    """Driver, scorer and engines of a search write into its folder, each trial's driver and workers into its own."""

    def lines(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    logs = {re.sub(r"-\d+\.jsonl$", "", file.name): lines(file) for file in (folder / "logs").iterdir()}
    assert logs.keys() >= {"driver.jsonl", "scorer", "answering-00000", "judging-00000"}
    assert {line["run"] for each in logs.values() for line in each} == {"found"}
    assert {line["trial"] for line in logs["scorer"]} >= {*trials, ""}
    assert {(line["worker"], line["step"]) for line in logs["answering-00000"]} == {(0, None)}
    for name in trials:
        for file in ("driver.jsonl", "worker-00000.jsonl"):
            told = lines(folder / "trials" / name / "logs" / file)
            assert {(line["run"], line["trial"]) for line in told} <= {("found", name)}


def test_a_search_says_what_it_found_and_leaves_nothing_running(
    ray_local: Any, run_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = actors_started(ray_local)
    own = "objective={name: 'examples.my_objective:TellsApart'}"  # the best trial is chosen by code from outside
    settings = (own, "space={objective.loss: {choice: [dpo, sft]}}", "set=[logging.json_lines=true]")
    with watching(target_of(ray_local)) as seen:
        result = search(configured(run_place, *settings))
        deadline = time.monotonic() + 30  # Ray's processes report every ten seconds; this one, the driver, goes on
        while ("ray_mlc_search_trials", "found") not in seen and time.monotonic() < deadline:
            time.sleep(1)

    folder = run_place / "found"
    told = {name for name, run in seen if run == "found"}
    engines = ("engines", "engine_blocks_in_flight", "engine_rows_left", "engine_rows_total", "engine_tokens_total")
    assert told >= {f"ray_mlc_{name}" for name in (*engines, "search_trials", "search_trials_planned")}
    check_logs(folder, [trial.name for trial in result.trials])
    by_loss = {trial.values["objective.loss"]: trial for trial in result.trials}
    assert sorted(by_loss) == ["dpo", "sft"] and len(result.trials) == 2
    assert all(trial.finished and trial.step == 2 for trial in result.trials)
    # Both were confirmed, with the model before training, on the half of the bundles that no trial was scored on.
    assert result.confirmation is not None and result.best is not None
    assert {point.trial for point in result.confirmation.points} == {trial.name for trial in result.trials}
    asked = {
        name: {row["bundle_id"] for row in pq.read_table(folder / name / "responses.parquet").to_pylist()}
        for name in ("baseline", "confirmation", *(f"trials/{t.name}/scores/confirmation" for t in result.trials))
    }
    assert not asked["baseline"] & asked["confirmation"] and len(asked["baseline"] | asked["confirmation"]) == 8
    assert len({frozenset(bundles) for bundles in asked.values()}) == 2
    runs = [path.parent for path in (folder / "trials").glob("*/config.yaml")]
    assert len(runs) == 2
    for loss, trial in by_loss.items():  # each was trained by its own loss: SFT has no rewards
        run = folder / "trials" / trial.name
        assert load_config(TrainConfig, run / "config.yaml").objective.loss == loss
        assert {"reward/margin" in row for row in read_metrics(run)} == {loss == "dpo"}
    # What trials share was made once: a pool of Ray Data, a scorer with an engine and a judge, and what the reference
    # says, which DPO alone reads, by a worker of its own beside one a trial.
    started = actors_started(ray_local) - before
    once = {"Tokenize": 1, "Scorer": 1, "Worker": 2}
    assert {name: started[name] for name in (*once, "RayTrainWorker")} == {**once, "RayTrainWorker": 1 + 2}
    (_,) = (folder / "trials" / "cache").glob("tokens-*")
    (_,) = (folder / "trials" / "cache").glob("reference-*")
    fingerprints = [json.loads((run / "run.json").read_text())["fingerprints"] for run in runs]
    assert fingerprints[0]["tokens"] == fingerprints[1]["tokens"]
    # Every checkpoint was scored, by weights that are not those of the other checkpoints.
    scores = [load_scores(path) for run in runs for path in sorted((run / "scores").glob("step-*"))]
    baseline = load_scores(folder / "baseline")
    assert [score.name for score in scores] == ["step-000001", "step-000002"] * 2
    assert len({score.fingerprint for score in [*scores, baseline]}) == 5
    assert {score.prompts for score in scores} == {baseline.prompts}
    assert {score.seen_languages for score in scores} == {("en", "sw")}
    assert all(score.config["seconds"]["transfer"] > 0 for score in scores)
    assert not list((folder / "trials").glob("*/train"))  # optimizer states are gone, models are not
    best = load_config(TrainConfig, folder / "best.yaml")
    assert best.objective.loss == result.best.values["objective.loss"]
    AutoModelForCausalLM.from_pretrained(folder / "best")
    assert "trials.json" not in capsys.readouterr().out
    assert nothing_is_held(ray_local)

    with pytest.raises(SearchError, match=r"exists already.*--resume"):
        search(configured(run_place, *settings))

    # Resuming what is finished repeats nothing.
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.json*")}
    again = search(configured(run_place, *settings, "resume=auto"))
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.json*")} == before
    assert again.trials == result.trials

    # Other prompts than those the trials were asked would not compare.
    content = json.loads((folder / "search.json").read_text())
    content["fingerprints"]["prompts"] = "0" * 16
    (folder / "search.json").write_text(json.dumps(content))
    with pytest.raises(SearchError, match=r"the prompts of search .*found' changed since it began \(0000000000000000"):
        resume_search(folder)


@pytest.mark.soak
def test_a_trial_that_is_worse_on_held_out_bundles_is_stopped_and_leaves_nothing(
    ray_local: Any, run_place: Path, repository: Path
) -> None:
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (run_place / "held_out.jsonl").write_text("\n".join(sample[8:12]) + "\n", encoding="utf-8")
    held_out = f"data.validation={{sources: [{{path: {run_place}/held_out.jsonl}}], every: 1}}"
    settings = configured(
        run_place,
        "name=stopped",
        "space={optimizer.learning_rate: {choice: [1e-3, 1e-30]}}",  # the second learns nothing
        f"set=[objective.loss=sft, cluster.workers=2, train.max_steps=4, '{held_out}']",
        "scheduler=asha",
        "scheduler_metric=validation/log_prob/chosen_change",
    )
    with another_ray():
        result = search(settings)
        assert nothing_is_held(ray_local)
    by_rate = {trial.values["optimizer.learning_rate"]: trial for trial in result.trials}
    assert {rate: trial.ended for rate, trial in by_rate.items()} == {1e-3: "finished", 1e-30: "stopped"}
    assert by_rate[1e-30].step < 4  # its workers may write another score before Tune's decision reaches them
    assert result.best is not None and result.best.values["optimizer.learning_rate"] == 1e-3
    assert not list((run_place / "stopped" / "trials").glob("*/train"))  # optimizer states are gone


def test_what_the_cluster_can_never_hold_is_refused(ray_local: Any, run_place: Path) -> None:
    with pytest.raises(ClusterError, match=r"concurrency=4 trials of 1 x \(0\.1 CPUs\) \+ 1 x .*has 1 x \(2 CPUs\)"):
        search(configured(run_place, "name=greedy", "concurrency=4"))
    with pytest.raises(MlcRayError, match=r"mlc\.layer=99"):
        search(configured(run_place, "name=deep", "space={mlc.layer: {choice: [1, 99]}}"))
    assert not (run_place / "greedy").exists() and not (run_place / "deep").exists()


def cached_from_a_hub(model: Path, name: str, cache: Path) -> None:
    """Lay a model's files where a download of `name` from the Hugging Face hub would have put them."""
    stored = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    shutil.copytree(model, stored / "snapshots" / commit)


def test_parts_fit_on_nodes_and_not_on_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node({"CPU": 8.0, "GPU": 2.0}), Node({"CPU": 8.0, "GPU": 2.0})]
    monkeypatch.setattr(ray_cluster, "nodes_there", lambda: nodes)
    assert fits([(1, 2), (1, 1), (1, 1), (4, 0)])
    assert not fits([(1, 4)])  # four GPUs there are, on no one node
    assert not fits([(1, 1)] * 5)
    assert not fits([(5, 0)] * 3)
    assert fits([(7.9, 0), (8, 0)])
    assert not fits([(8, 0), (8, 0)])  # nothing is left for Ray Data
    assert [how_many_fit(part) for part in ((1, 1), (1, 2), (3, 0), (8, 0), (1, 4))] == [4, 2, 4, 1, 1]


@pytest.mark.soak
def test_a_killed_driver_is_resumed_where_it_was(run_place: Path, small_llama: Path, tmp_path: Path) -> None:
    folder, config = run_place / "killed", run_place / "soon-gone.yaml"
    shutil.copy(run_place / "run.yaml", config)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"HF_HUB_CACHE": str(tmp_path)}
    cached_from_a_hub(small_llama, "someone/small", tmp_path)  # and, while we are at it, the model is a hub's
    command = [sys.executable, "-m", "mlc_ray", "search"]
    settings = [
        "name=killed",
        f"train={config}",
        "set=[train.max_steps=3, model.path=someone/small, checkpoint.every=1, checkpoint.keep=1]",
    ]
    started = [*command, "--config", str(run_place / "search.yaml"), *(f"--set={setting}" for setting in settings)]
    with (run_place / "killed.log").open("w") as log:
        process = subprocess.Popen(
            started, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + SECONDS
        # one trial is done, the other has a score and is not
        while len(list((folder / "trials").glob("*/scores/step-000001/scores.json"))) < 2:
            assert process.poll() is None, (run_place / "killed.log").read_text()
            assert time.monotonic() < deadline, (run_place / "killed.log").read_text()
            time.sleep(0.1)
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        process.wait()
    (done,) = (path.parent for path in (folder / "trials").glob("*/model"))
    scored = list((folder / "trials").glob("*/scores/step-*/scores.json"))
    assert len(scored) in (4, 5)
    before = {path: path.stat().st_mtime_ns for path in [*done.rglob("*.json*"), *scored]}
    so_far = json.loads((folder / "trials.json").read_text())  # written after every score
    assert so_far["trials"] and so_far["confirmation"] is None

    # What the search was made from is gone, and the call comes from another folder: its own folder has it all.
    config.unlink()
    resumed = subprocess.run(
        [*command, "--resume", "killed"],
        cwd=run_place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    content = json.loads((folder / "trials.json").read_text())
    trials = content["trials"]
    assert sorted(str(trial["values"]["mlc.layer"]) for trial in trials) == ["1", "last"]
    assert all(trial["ended"] == "finished" and trial["step"] == 3 for trial in trials)
    assert len(list((folder / "trials").glob("*/scores/step-*/scores.json"))) == 6
    assert {point["trial"] for point in content["confirmation"]["points"]} == {trial["name"] for trial in trials}


def judged_in_english(messages: list[dict[str, str]], number: int) -> Step:
    """A remote model: translates what stands between markers, and judges every answer to be safe."""
    if found := re.search(r"<text-(\w+)>", messages[-1]["content"]):
        return Step(f"<english-{found[1]}>In English this is sentence number {number}.</english-{found[1]}>")
    (code,) = re.findall(r'"check": "(\w+)"', messages[0]["content"])
    return Step(json.dumps({"check": code, "response": "answers", "verdict": "safe"}))


def test_adapters_are_probed_and_searched_with_two_engines_and_a_translator(ray_local: Any, run_place: Path) -> None:
    hinge, sign = "examples.my_loss:Hinge", "{name: 'examples.my_term:SameSign', weight: 0.5}"  # found in every trial
    with serving(judged_in_english) as server:
        endpoint = {"base_url": server.base_url, "model": "m", "cache_dir": str(run_place / "replies")}
        judge = {"name": "endpoint", "endpoint": endpoint, "translate": {"endpoint": endpoint, "all_languages": True}}
        result = search(
            configured(
                run_place,
                "name=adapters",
                "space={mlc.layer: {choice: [2, last]}}",
                "probe.criterion=silhouette",
                "scoring.engine.replicas=2",
                f'set=[model.lora.rank=4, "objective.loss={hinge}", "terms={{sign: {sign}}}"]',
                f"scoring.judge={json.dumps(judge)}",
                "confirm={keep: 1, seeds: [7]}",
            )
        )
    assert [(trial.finished, trial.step) for trial in result.trials] == [(True, 2), (True, 2)]
    folder = run_place / "adapters"
    # The one that is confirmed was trained again, to its last weights alone.
    assert result.confirmation is not None
    (point,) = result.confirmation.points
    first, again = (folder / "trials" / name for name in point.runs)
    assert again.name == f"{first.name}-seed-7" and (again / "model" / "adapter_config.json").is_file()
    assert not (again / "train").exists() and len(read_metrics(again)) == 2
    for metrics in (folder / "trials").glob("*/metrics.jsonl"):
        assert all(row["loss/sign"] >= 0 and "sign/cosine" in row for row in read_metrics(metrics.parent))
    ranking = json.loads((folder / "probe" / "probe.json").read_text())["probe"]["ranking"]
    order = sorted(("last", 2), key=lambda layer: ranking.index({"last": 4, 2: 2}[layer]))
    began = sorted(result.trials, key=lambda trial: (folder / "trials" / trial.name / "values.json").stat().st_mtime_ns)
    assert [trial.values["mlc.layer"] for trial in began] == order
    of_trials = [load_scores(path) for path in sorted((folder / "trials").glob("*/scores/step-*"))]
    baseline = load_scores(folder / "baseline")
    assert len({baseline.fingerprint, *(scored.fingerprint for scored in of_trials)}) == 5
    for scored in (baseline, *of_trials):
        rows = pq.read_table(scored.responses_file).to_pylist()
        assert {(row["language"], row["via_safe"]) for row in rows} == {("en", ""), ("sw", "translated")}
        assert {row["safety"] for row in rows} <= {"safe", "degenerate"}  # what a random model says may be either
    for kind in ("judge", "translate"):
        assert json.loads((folder / f"{kind}_usage.json").read_text())["requests"] > 0
    assert (folder / "best" / "adapter_config.json").is_file()
    rejudged = judge_again(folder / "baseline", judge=RefusalJudge.Settings())  # warm scores are scores like any other
    assert rejudged.prompts == baseline.prompts
    assert nothing_is_held(ray_local)


def test_a_search_that_cannot_start_leaves_its_name_free(ray_local: Any, run_place: Path) -> None:
    (run_place / "broken.jsonl").write_text("{}\n")
    with pytest.raises(MlcRayError, match=r"broken\.jsonl"):
        search(configured(run_place, "name=again", f"scoring.benchmarks.0.path={run_place / 'broken.jsonl'}"))
    assert not (run_place / "again" / "config.json").exists()
    with pytest.raises(SearchError, match=r"again' is not a search folder"):
        resume_search(run_place / "again")


def test_a_probe_sees_every_layer_as_transformers_does(ray_local: Any, small_llama: Path, tmp_path: Path) -> None:
    import torch

    from mlc_ray.config import ModelSection, SourceSection
    from mlc_ray.data.store import TokenArtifact
    from mlc_ray.search.probe import probe

    settings = ModelSection(path=str(small_llama), dtype="float32")
    found = probe(settings, [SourceSection(path="sample:train")], tmp_path / "probe", languages=["en", "sw"], limit=8)
    assert (found.depth, found.bundles, found.languages) == (4, 16, ("en", "sw"))
    content = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert content["probe"]["ranking"] == found.ranking()
    assert set(found.layers[4].separability) == {"en", "sw"}

    (folder,) = (tmp_path / "cache").glob("tokens-*")
    tokens = TokenArtifact.open(folder)
    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    chosen = [tokens.rows([index])[0] for index in choose_bundles(tokens, 8)]
    rows = []
    for row in chosen:
        with torch.no_grad():
            states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in row.prompts]
        rows.append([torch.stack([layer[0, -1] for layer in each]) for each in states])
    states = torch.stack([torch.stack(row) for row in rows])  # [N, L, layers, H]
    harmful = torch.tensor([row.kind == "harmful" for row in chosen])
    expected = statistics(states, torch.ones(16, 2, dtype=torch.bool), harmful, ["en", "sw"])
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.share == pytest.approx(theirs.share, rel=1e-4)
        assert ours.within == pytest.approx(theirs.within, rel=1e-3, abs=1e-4)
        assert ours.separability == pytest.approx(theirs.separability, abs=0.05)
        for name in ("silhouette", "separation"):
            assert ours.criteria[name].value == pytest.approx(theirs.criteria[name].value, rel=1e-3, abs=1e-3)
