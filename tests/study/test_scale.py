"""A scaling study: what it refuses, what it reads of its searches' folders, and its report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mlc_ray.cli import main
from mlc_ray.cluster import ClusterError
from mlc_ray.config import ConfigError, ScaleConfig, load_config, parse_config
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.plan.check_engines import check_engine
from mlc_ray.plan.hardware import cluster_of
from mlc_ray.plan.lengths import of_artifact
from mlc_ray.plan.rates import rates_of
from mlc_ray.plan.runs import PlanError, plan_run
from mlc_ray.plan.scores import SearchPlan, plan_scoring
from mlc_ray.plan.shapes import config_of, shape_of
from mlc_ray.report.scale import budget_notes, budget_table, scale_notes
from mlc_ray.report.study import load_study, study_tables
from mlc_ray.report.write import write_report
from mlc_ray.score.results import load_records, load_scores
from mlc_ray.search.objectives.average import Average
from mlc_ray.search.objectives.base import make_objective
from mlc_ray.show import show
from mlc_ray.stats.rates import Interval
from mlc_ray.stats.significance import holm
from mlc_ray.storage import Place
from mlc_ray.study.budget import model_size, plan_of
from mlc_ray.study.folder import StudyError
from mlc_ray.study.scale import scale
from mlc_ray.study.scale_record import ScaleRecorder, best_values
from mlc_ray.study.searches import check_scale_goes_on, is_over, load_scale, make_searches
from tests.data.files import write_rows
from tests.study.scale_folders import planned, raw_scale, write_search
from tests.train.tiny import random_rows

REPOSITORY = Path(__file__).parents[2]


def configured(folder: Path, **changes: Any) -> ScaleConfig:
    return parse_config(ScaleConfig, raw_scale(folder, "a", "b", **changes))


def searching(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**raw_scale(folder)["search"], **changes}


@pytest.mark.parametrize("name", ["scaling", "scaling-small"])
def test_the_shipped_studies_are_valid(name: str, tmp_path: Path) -> None:
    config = load_config(ScaleConfig, REPOSITORY / "configs" / "study" / f"{name}.yaml")
    searches = make_searches(config, Place(tmp_path))
    assert [each.size for each in searches] == list(config.sizes)
    paths = {each.run.model.path for each in searches}
    assert len(paths) == len(searches) >= 3
    if name == "scaling":
        recipes = {path.stem for path in (REPOSITORY / "configs" / "scaling").glob("*.yaml")}
        assert set(config.sizes) == recipes
        assert max(each.run.cluster.most_workers for each in searches) == 32


def test_every_engine_of_the_large_study_holds_its_model(tmp_path: Path) -> None:
    config = load_config(ScaleConfig, REPOSITORY / "configs" / "study" / "scaling.yaml")
    for each in make_searches(config, Place(tmp_path)):
        check_engine(each.run.model.path, each.config.scoring, gpu=True, cluster=cluster_of(40, "h100"))
    assert config.sizes["qwen2.5-72b"].engine == {"tensor_parallel": 4}


def test_the_search_of_a_size_has_the_settings_of_all_and_its_own(tmp_path: Path) -> None:
    config = parse_config(
        ScaleConfig,
        raw_scale(
            tmp_path, set=["train.max_steps=5", "mlc.every=1"],
            sizes={"a": {"set": ["model.path=/m"]}, "b": {"train": "recipe:gemma-2-9b", "set": ["mlc.every=2"]}},
        ),
    )  # fmt: skip
    a, b = make_searches(config, Place(tmp_path))
    assert (a.run.model.path, a.run.mlc.every) == ("/m", 1)
    assert (b.run.model.path, b.run.mlc.every) == ("google/gemma-2-9b-it", 2)
    assert a.run.train.max_steps == b.run.train.max_steps == 5
    assert (a.config.name, a.config.resume, a.points) == ("a", "auto", 4)


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"search": {"name": "x"}}, "search.name='x' cannot stand here: the study decides it"),
        ({"search": {"train": "t.yaml"}}, "search.train='t.yaml' cannot stand here: give it at the top"),
        ({"train": None}, "sizes.a has no file of its runs"),
        ({"space": {"mlc.layer": {"choice": [0.5, "last"]}}}, "search.space has no mlc.weight"),
        (
            {"space": {"mlc.layer": {"choice": [3]}, "mlc.weight": {"choice": [1.0]}}},
            "has 3: an index is another depth",
        ),
        (
            {"space": {"mlc.layer": {"integers": [1, 3]}, "mlc.weight": {"choice": [1.0]}}},
            "search.space.mlc.layer has 'no choice'",
        ),
        ({"objective": "pareto"}, "search.objective.name='pareto': a scaling study follows one best point"),
        ({"objective": {"name": "average", "min_bening": 1}}, "min_bening"),
        ({"sizes": {}}, "sizes: .*at least 1"),
    ],
)
def test_studies_whose_searches_cannot_be_compared_are_refused(
    changes: dict[str, Any], quoted: str, tmp_path: Path
) -> None:
    raw = raw_scale(tmp_path, "a", "b")
    inner = {name: changes[name] for name in ("space", "objective") if name in changes}
    raw["search"] |= changes.get("search", inner)
    raw |= {name: value for name, value in changes.items() if name not in ("search", "space", "objective")}
    with pytest.raises(ConfigError, match=quoted):
        parse_config(ScaleConfig, raw)


class TwoNumbers(Average):
    """A floor, but no single best."""

    metrics = ("one", "other")


def test_an_objective_of_ones_own_is_taken_if_its_class_has_one_best(tmp_path: Path) -> None:
    raw = raw_scale(tmp_path, "a")
    for name, floor in (("mlc_ray.search.objectives.worst_language:WorstLanguage", 0.7), ("worst_language", 0.8)):
        raw["search"]["objective"] = {"name": name, "min_benign_compliance": floor}
        assert parse_config(ScaleConfig, raw).search["objective"]["name"] == name
    for name in (f"{__name__}:TwoNumbers", "examples.my_objective:TellsApart"):
        raw["search"]["objective"] = {"name": name}
        with pytest.raises(ConfigError, match=f"'{name}': a scaling .* use average or worst_language"):
            parse_config(ScaleConfig, raw)


def test_a_bad_run_names_its_size(tmp_path: Path) -> None:
    sizes = {"a": {}, "b": {"set": ["mlc.weigth=1"]}}
    with pytest.raises(ConfigError, match=r"sizes\.b: .*weigth"):
        make_searches(configured(tmp_path, sizes=sizes), Place(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sizes whose best layer is the last, and one that has not begun."""
    study = tmp_path_factory.mktemp("scale") / "st_udy"
    plan = planned(study, "small", "middle", "large", "huge")
    for search, gain in zip(plan.searches, (0.5, 0.6, 0.7), strict=False):
        write_search(search, study, gain=gain)
    return study


@pytest.fixture(scope="module")
def result(folder: Path) -> Any:
    return ScaleRecorder(load_scale(Place(folder)), Place(folder), gpu=False).write()


def test_each_sizes_best_point_is_what_its_search_confirmed(folder: Path, result: Any) -> None:
    assert load_study(folder) == result
    small, _, large = result.scaling.points
    assert (small.size, small.parameters, small.seeds, small.trials) == ("small", 1e8, 2, 4)
    assert small.layer.value == 1.0 and 10**small.log_weight.value == pytest.approx(2.4)
    assert small.probed == pytest.approx(2 / 3)
    assert small.seconds == 2 * 5 * 6  # two workers, five runs of three steps
    confirmed = [
        load_scores(folder / f"cells/large/trials/{name}/scores/confirmation").summary()
        for name in ("00000003", "00000003-seed-7")
    ]
    before = load_scores(folder / "cells/large/confirmation").summary()
    rates = result.row("large", "best").rates
    assert rates.seeds == 2 and result.seeds == (42, 7)
    assert rates.harmful.avg.value == pytest.approx(np.mean([each.side("harmful").avg.value for each in confirmed]))
    refused = [each.side("benign").avg.value for each in confirmed]
    assert large.over_refusal.value == pytest.approx(np.mean(refused) - before.side("benign").avg.value)
    # sw was never trained
    untouched = result.row("large", "untouched").rates
    assert large.transfer.value == pytest.approx(rates.harmful.never.value - untouched.harmful.never.value)
    assert large.transfer.low > 0
    assert [(each.name, each.state) for each in result.cells if each.model in ("large", "huge")] == [
        ("large-untouched", "scored"), ("large-00000003", "scored"), ("large-00000003-seed-7", "scored"),
        ("huge-untouched", "waiting"), ("huge", "waiting"),
    ]  # fmt: skip
    assert [test.p_holm for test in result.tests] == holm([test.p for test in result.tests])
    assert any(test.told_apart for test in result.tests if test.compared == "harmful")


def test_the_interval_of_the_best_is_over_resamples_of_the_bundles_that_chose(folder: Path) -> None:
    place = Place(folder) / "cells/small"
    objective = make_objective(load_scale(Place(folder)).searches[0].config.objective)
    drawn = best_values(place, objective)
    assert len(drawn) == 2000
    ranks = []
    values = []
    for trial in sorted((folder / "cells/small/trials").glob("????????")):
        records = load_records(load_scores(trial / "scores/step-000003"))
        ranks.append(_ranks(records))
        values.append(trial.name)
    best = np.argmax(ranks, axis=0)
    layers = [[0.5, 0.5, "last", "last"][index] for index in best]
    assert [each["mlc.layer"] for each in drawn] == layers


class AllEqual(Average):
    """An objective by which every point is as good as any other."""

    def drawn(self, *records: Any) -> Any:
        return np.zeros(2000)


def test_of_equally_good_points_none_is_preferred_for_being_the_first(folder: Path) -> None:
    place = Place(folder) / "cells/small"
    drawn = best_values(place, AllEqual(load_scale(Place(folder)).searches[0].config.objective))
    of_each = Counter((each["mlc.layer"], each["mlc.weight"]) for each in drawn)
    assert len(of_each) == 4 and min(of_each.values()) > 400


def _ranks(records: Any) -> list[float]:
    """By hand: the mean over languages of the rate of harmful refused, in the resamples that all scores share."""
    from mlc_ray.stats.intervals import RESAMPLES, SEED

    codes = sorted({r.language for r in records})
    found = {}
    for stream, (kind, hit) in enumerate((("harmful", "refused"), ("benign", "complied"))):
        named = dict.fromkeys(r.bundle_id for r in records if r.kind == kind)
        index = {bundle: number for number, bundle in enumerate(named)}
        hits = np.zeros((len(index), len(codes)))
        for r in records:
            if r.kind == kind:
                hits[index[r.bundle_id], codes.index(r.language)] += r.behaviour == hit
        drawn = np.random.default_rng([SEED, stream]).integers(0, len(index), (RESAMPLES, len(index)))
        found[kind] = hits[drawn].mean(axis=1).mean(axis=1)
    return [h if b >= 0.5 else b - 0.5 for h, b in zip(found["harmful"], found["benign"], strict=True)]


def test_trends_are_corrected_together_and_say_what_they_cannot(result: Any) -> None:
    trends = result.scaling.trends
    assert [each.name for each in trends] == [
        "best layer (fraction of the depth)", "log10 of lambda", "transfer (points)", "over-refusal (points)",
    ]  # fmt: skip
    assert [each.p_holm for each in trends] == holm([each.p for each in trends])
    assert all(each.sizes == 3 and each.freedom == 1 for each in trends)
    notes = " ".join(scale_notes(result.scaling))
    assert "transfer (points): it cannot be told whether it moves with size" in notes
    assert "The best layer of small, middle, large is the last" in notes and "count as one family" in notes
    same = [replace(each, slope=Interval(0.0, 0.0, 0.0), p_holm=1.0) for each in trends]
    assert scale_notes(replace(result.scaling, trends=tuple(same)))[0] == (
        "best layer (fraction of the depth) is the same at all 3 sizes."
    )


def test_the_report_has_points_trends_and_the_budget(folder: Path, result: Any, tmp_path: Path) -> None:
    titles = [table.title for table in study_tables(result)]
    assert titles[:3] == ["The best point of each size", "How they move with size", "Budget"]
    (budget,) = [table for table in study_tables(result) if table.title == "Budget"]
    assert [cell.text for cell in budget.rows[-1].cells] == [
        "·", "20", "·", "240,000", "5.4e+14", "28", "1,400", "10.5", "·",
    ]  # fmt: skip
    written = write_report([folder], tmp_path / "scaling.html", paper=tmp_path / "paper")
    page = written[0].read_text()
    assert "How they move with size" in page and "cannot tell" in page
    assert "\\caption{How they move with size" in (tmp_path / "paper" / "study.tex").read_text()
    assert (folder / "study.md").read_text().count("best layer") >= 2
    said = show(folder)
    assert "3 of 4 searches have ended" in said and "search huge" in said and "not begun" in said
    assert "mlc-ray scale --resume" in said and "log10 of lambda" in said
    assert f"{folder.name}" in show(folder.parent)


def test_what_is_over_is_not_begun_again_and_what_changed_is_refused(folder: Path) -> None:
    plan = load_scale(Place(folder))
    assert [is_over(each, Place(folder)) for each in plan.searches] == [True, True, True, False]
    sizes = ("small", "middle", "large")
    more = parse_config(ScaleConfig, raw_scale(folder, *sizes, "other"))  # huge had not begun
    check_scale_goes_on(type(plan)(more, make_searches(more, Place(folder))), Place(folder))
    raw = raw_scale(folder, *sizes)
    raw["sizes"]["middle"]["set"].append("mlc.every=3")
    changed = parse_config(ScaleConfig, raw)
    with pytest.raises(StudyError, match=r"middle: train.mlc.every was 2, now 3"):
        check_scale_goes_on(type(plan)(changed, make_searches(changed, Place(folder))), Place(folder))
    fewer = parse_config(ScaleConfig, raw_scale(folder, "small", "middle"))
    with pytest.raises(StudyError, match="large is not a size any more"):
        check_scale_goes_on(type(plan)(fewer, make_searches(fewer, Place(folder))), Place(folder))
    with pytest.raises(StudyError, match="exists already"):
        scale(more)
    with pytest.raises(StudyError, match="not the folder of a scaling study"):
        load_scale(Place(folder / "cells"))


def test_a_search_whose_results_are_damaged_is_not_over(tmp_path: Path) -> None:
    plan = planned(tmp_path, "small")
    write_search(plan.searches[0], tmp_path)
    results = tmp_path / "cells" / "small" / "trials.json"
    assert is_over(plan.searches[0], Place(tmp_path))
    results.write_text(results.read_text()[:-40])  # it goes on, and writes them anew
    assert not is_over(plan.searches[0], Place(tmp_path))


def test_hours_are_those_of_the_planner(tmp_path: Path) -> None:
    """By hand from the plan of a run and of its scores: four trials, two at once, and one run with another seed.

    The reference is asked once, by the workers of one run.
    """
    write_rows(tmp_path / "tokens", [rows_to_table(random_rows(40, head=range(5)))], fingerprint="x", rejected={})
    tokens = of_artifact(TokenArtifact.open(tmp_path / "tokens"))
    raw = raw_scale(tmp_path, "a", sizes={"a": {"set": ["model.path=Qwen/Qwen2.5-7B", "cluster.workers=2"]}})
    raw["search"]["concurrency"] = 2
    (search,) = make_searches(parse_config(ScaleConfig, raw), Place(tmp_path))
    cluster = cluster_of(8, "h100")
    found = plan_of(search, lambda _: tokens, (100, 60), cluster)
    assert found is not None
    rates, shape = rates_of(cluster.gpu, "bfloat16"), shape_of(*config_of("qwen2.5-7b"))
    corners = [search.space.run(values, name="corner") for values in search.space.corners()]
    plans = [plan_run(each, shape, cluster, tokens, rates, dtype="bfloat16", workers=2) for each in corners]
    run = max(plans, key=lambda plan: plan.wall_seconds)
    scoring = search.config.scoring
    choosing, confirming = (plan_scoring(scoring, shape, cluster, prompts=number).seconds - 72 for number in (100, 60))
    assert (found.trials, found.at_once, found.runs, found.scores) == (4, 2, 5, (5, 3))
    reference = run.reference_seconds
    each = run.wall_seconds - reference
    assert reference > 0
    assert found.seconds == pytest.approx(72 + reference + 3 * each + 5 * choosing + 3 * confirming)
    assert found.gpu_hours == pytest.approx((2 * reference + 5 * 2 * each + found.seconds) / 3600)
    # On a larger cluster trials lie on one node all the same: nothing of them travels between nodes.
    assert plan_of(search, lambda _: tokens, (100, 60), replace(cluster_of(40, "h100"), network=1e9)) == found
    small = plan_of(search, lambda _: tokens, (100, 60), cluster_of(3, "h100"))
    assert small is not None and small.at_once == 1, "two trials and the engine need five GPUs"
    with pytest.raises(PlanError, match="needs more than the 2 of the cluster"):
        plan_of(search, lambda _: tokens, (100, 60), cluster_of(2, "h100"))


def test_a_size_that_a_named_cluster_cannot_hold_is_said_without_ray_or_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        name: {"set": [f"model.path={name}", "cluster.workers=2", "data.train=[{path: /none.json}]"]}
        for name in ("qwen2.5-0.5b", "qwen2.5-32b")
    }
    file = tmp_path / "scale.yaml"
    file.write_text(json.dumps(raw_scale(tmp_path / "study", sizes=sizes)))
    command = ["scale", "--config", str(file), "--budget", "--gpus", "8", "--json"]
    running = ray.is_initialized()  # by a test before
    assert main(command) == 1
    small, large = json.loads(capsys.readouterr().out)
    assert small["fault"] == "" and small["hours"] > 0 and small["tokens"] > 0
    assert "the largest part is" in large["fault"] and large["hours"] is None
    assert not (tmp_path / "study").exists() and ray.is_initialized() == running
    assert main([*command[:-1], "--set", "sizes={qwen2.5-0.5b: {set: [model.path=qwen2.5-0.5b]}}"]) == 0


def test_hours_of_quantised_weights_are_not_known(tmp_path: Path) -> None:
    """Whose bytes the arithmetic does not count."""
    write_rows(tmp_path / "tokens", [rows_to_table(random_rows(40, head=range(5)))], fingerprint="x", rejected={})
    config, _ = config_of("qwen2.5-0.5b")
    plain, quantised = tmp_path / "plain", tmp_path / "quantised"
    config.save_pretrained(plain)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(quantised)

    tokens = of_artifact(TokenArtifact.open(tmp_path / "tokens"))

    def known(model: Path) -> bool:
        raw = raw_scale(tmp_path, "a", sizes={"a": {"set": [f"model.path={model}", "cluster.workers=2"]}})
        (search,) = make_searches(parse_config(ScaleConfig, raw), Place(tmp_path))
        return plan_of(search, lambda _: tokens, (100, 60), cluster_of(8, "h100")) is not None

    assert known(plain) and not known(quantised)


def test_hours_have_the_samples_of_each_prompt_once(tmp_path: Path) -> None:
    """Four answers to each of 100 prompts are 400: engines are asked the 100, four times each."""
    write_rows(tmp_path / "tokens", [rows_to_table(random_rows(40, head=range(5)))], fingerprint="x", rejected={})
    tokens, cluster = of_artifact(TokenArtifact.open(tmp_path / "tokens")), cluster_of(8, "h100")
    raw = raw_scale(tmp_path, "a", sizes={"a": {"set": ["model.path=Qwen/Qwen2.5-7B", "cluster.workers=2"]}})
    raw["search"]["scoring"]["asking"] = {"samples": 4, "temperature": 0.7}
    (search,) = make_searches(parse_config(ScaleConfig, raw), Place(tmp_path))
    found = plan_of(search, lambda _: tokens, (400, 240), cluster)
    none = plan_of(search, lambda _: tokens, (0, 0), cluster)
    assert found is not None and none is not None
    scoring, shape = search.config.scoring, shape_of(*config_of("qwen2.5-7b"))
    choosing, confirming = (
        plan_scoring(scoring, shape, cluster, prompts=number).working_seconds for number in (100, 60)
    )
    assert found.seconds - none.seconds == pytest.approx(found.scores[0] * choosing + found.scores[1] * confirming)


def test_hours_have_the_probe_and_judges_and_say_what_they_leave_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "tokens", [rows_to_table(random_rows(40, head=range(5)))], fingerprint="x", rejected={})
    tokens, cluster = of_artifact(TokenArtifact.open(tmp_path / "tokens")), cluster_of(8, "h100")

    def plan(judge: str | dict[str, str] = "refusal", **search: Any) -> SearchPlan:
        raw = raw_scale(tmp_path, "a", sizes={"a": {"set": ["model.path=Qwen/Qwen2.5-7B", "cluster.workers=2"]}})
        raw["search"] |= search
        raw["search"]["scoring"]["judge"] = judge
        raw["search"]["scoring"]["max_new_tokens"] = 64
        (each,) = make_searches(parse_config(ScaleConfig, raw), Place(tmp_path))
        found = plan_of(each, lambda _: tokens, (100, 60), cluster)
        assert found is not None
        return found

    plain, probed = plan(), plan(probe={"limit": 8})
    # Sixteen bundles forward, by one GPU: a third of their share of a step of two.
    (search,) = make_searches(parse_config(ScaleConfig, raw_scale(tmp_path, "a", sizes={
        "a": {"set": ["model.path=Qwen/Qwen2.5-7B", "cluster.workers=2"]}
    })), Place(tmp_path))  # fmt: skip
    shape, rates = shape_of(*config_of("qwen2.5-7b")), rates_of(cluster.gpu, "bfloat16")
    run = plan_run(search.run, shape, cluster, tokens, rates, dtype="bfloat16", workers=2)
    forward = 16 * (run.seconds.compute * 2 / search.run.train.batch_bundles) / 3
    assert probed.probe_seconds == pytest.approx(forward) and plain.probe_seconds == 0
    assert probed.seconds == pytest.approx(plain.seconds + forward)
    assert probed.gpu_hours == pytest.approx(plain.gpu_hours + forward / 3600)
    assert plan(probe={}).probe_seconds == pytest.approx(8 * forward)  # 64 of each kind
    guarded = plan({"name": "llama-guard", "model": "meta-llama/Llama-3.1-8B"})
    assert guarded.seconds > plain.seconds and guarded.gpu_hours > plain.gpu_hours
    folder = str(tmp_path / "none")
    unknown = plan({"name": "llama-guard", "model": folder})
    assert unknown.seconds == pytest.approx(plain.seconds)
    assert unknown.assumed == (*plain.assumed, f"nothing for the engines of judge.model={folder}, which are not known")
    said = budget_table(
        [replace(a_budget, assumed=unknown.assumed) for a_budget in planned(tmp_path / "s", "b").budget]
    )
    assert f"judge.model={folder}" in said.note and "start of each run" in said.note
    large = replace(planned(tmp_path / "s", "b").budget[0], size="72b", fault="it lacks a GiB")
    assert budget_notes([large, replace(large, assumed=("one", "two"), fault="")]) == [
        "72b does not fit: it lacks a GiB", "assumed: one", "assumed: two",
    ]  # fmt: skip
    assert "lacks a GiB" not in budget_table([large], notes=False).note


def test_a_scaling_study_keeps_its_log_where_its_runs_are_to_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise ClusterError("too few GPUs")

    monkeypatch.setattr("mlc_ray.study.scale._connect", lambda *_: None)
    monkeypatch.setattr("mlc_ray.study.scale.state_budget", refused)
    for name, asked in (("quiet", []), ("told", ["logging.json_lines=true"])):
        with pytest.raises(ClusterError, match="too few"):
            scale(configured(tmp_path / name, set=asked))
    assert not (tmp_path / "quiet" / "logs").exists()
    (line,) = map(json.loads, (tmp_path / "told" / "logs" / "driver.jsonl").read_text().splitlines())
    assert (line["run"], line["trial"], line["message"]) == ("told", "", "ended by ClusterError: too few GPUs")


def test_a_size_is_counted_without_weights(smollm2: Path) -> None:
    parameters, met = model_size(str(smollm2), trust_remote_code=False)
    assert parameters == 134_515_008  # SmolLM2-135M
    assert met == parameters - 49_152 * 576  # the embedding is the head, too
