"""The budget of a study, against the plans of its runs and scores, and the judge's requests counted by hand."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.cli import main
from mlc_ray.config import StudyConfig, TrainConfig, parse_config
from mlc_ray.data.bundles import KINDS
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.plan.hardware import Cluster, cluster_of
from mlc_ray.plan.lengths import PROMPT, Weights, assumed
from mlc_ray.plan.rates import PlanCalibrationError, rates_of
from mlc_ray.plan.runs import plan_run
from mlc_ray.plan.scores import plan_scoring
from mlc_ray.plan.shapes import config_of, shape_of
from mlc_ray.score.counted_prompts import Prompts
from mlc_ray.storage import Place
from mlc_ray.study import run as running
from mlc_ray.study.budget_tables import (
    ScoringBudget,
    StudyBudget,
    study_budget_json,
    study_budget_lines,
    study_budget_tables,
)
from mlc_ray.study.cell_budget import budget_of_cells, study_budget
from mlc_ray.study.cells import make_cells, scoring_of
from mlc_ray.study.contents import CellData
from tests.data.files import write_rows
from tests.documented import REPOSITORY
from tests.study.folders import asked, planned
from tests.train.tiny import random_rows

ENDPOINT = {"base_url": "http://localhost:1/v1", "model": "m", "usd_per_million_input_tokens": 2.0,
            "usd_per_million_output_tokens": 8.0, "max_cost_usd": 6.0}  # fmt: skip
H100 = cluster_of(8, "h100")


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "name": "s",
        "models": {"qwen": {"path": "Qwen/Qwen2.5-7B-Instruct"}},
        "methods": {"dpo": ["mlc.weight=0"], "sft": ["objective={loss: sft}"]},
        "seeds": [1, 2, 3],
        "train": {"data": {"train": [{"path": "/not/here.jsonl"}]}, "cluster": {"workers": 8, "accelerator": "gpu"}},
        "scoring": {
            "benchmarks": [{"path": "/not/here.csv", "kind": "harmful"}, {"path": "sample:test", "only": "benign"}],
            "languages": ["en", "fr"], "max_new_tokens": 100, "judge": {"name": "endpoint", "endpoint": ENDPOINT},
        },
        **changes,
    }  # fmt: skip


def configured(**changes: Any) -> StudyConfig:
    return parse_config(StudyConfig, raw(**changes))


def test_hours_memory_and_disk_are_those_of_the_plans_of_runs_and_scores() -> None:
    """The reference is asked once for all seeds; engines start once; checkpoints of one run lie there at a time."""
    config = configured()
    found = study_budget(config, H100)
    shape, rates = shape_of(*config_of("qwen2.5-7b")), rates_of(H100.gpu, "bfloat16")
    runs: dict[str, TrainConfig] = {cell.method: cell.config for cell in make_cells(config)}
    plans = {
        method: plan_run(run, shape, H100, assumed(run), rates, dtype="bfloat16", workers=8)
        for method, run in runs.items()
    }
    assert plans["dpo"].reference_seconds > 0 == plans["sft"].reference_seconds
    expected = {
        method: (3 * (plan.wall_seconds - plan.reference_seconds) + plan.reference_seconds) / 3600
        for method, plan in plans.items()
    }
    assert {each.method: each.hours for each in found.methods} == pytest.approx(expected)
    assert [each.runs for each in found.methods] == [3, 3]
    assert all(each.gpu_hours == pytest.approx(8 * (each.hours or 0)) for each in found.methods)
    assert {each.method: each.needs for each in found.methods} == {
        method: plan.memory.worker_bytes for method, plan in plans.items()
    }
    (scores,) = found.scoring
    prompts = 2 * 180 + 2 * 60  # of the file that is not here as many as published; of the sample its own
    assert (scores.scores, scores.answers) == (7, 7 * prompts)
    plan = plan_scoring(scoring_of(config, make_cells(config)), shape, H100, prompts=prompts)
    assert scores.hours == pytest.approx((72 + 7 * (plan.seconds - 72)) / 3600)
    assert found.hours == pytest.approx(sum(expected.values()) + (scores.hours or 0))
    weights = 2 * shape.parameters
    expected_disk = 6 * weights + max(plan.memory.disk_bytes for plan in plans.values())
    assert found.disk == pytest.approx(expected_disk, rel=1e-3)  # the extractor's weights, which no export has
    gone = study_budget(configured(keep_models=False, models={**raw()["models"], "b": {"path": "qwen2.5-0.5b"}}), H100)
    assert gone.disk == found.disk, "those of one model are removed before those of the next are there"
    (name,) = raw()["models"]
    adapters = {name: {**raw()["models"][name], "lora": {"rank": 8}}}
    merged = study_budget(configured(models=adapters), H100)
    assert weights * 6 < (merged.disk or 0) < expected_disk, "models are merged, and checkpoints are small"


def test_what_the_judge_asks_is_counted_for_every_score_and_costs_what_its_tokens_do() -> None:
    found = study_budget(configured(), H100)
    (verdicts,) = found.asked
    requests = 7 * (2 * 180 + 2 * 60)
    assert (verdicts.requests, verdicts.read, verdicts.written) == (
        requests,
        requests * (PROMPT + 100 + 500),
        requests * 32,
    )
    assert verdicts.usd == pytest.approx((2.0 * verdicts.read + 8.0 * verdicts.written) / 1e6)
    said = "\n".join(study_budget_lines(found))
    assert f"6 runs and 7 scores of {requests:,} answers" in said and f"about ${verdicts.usd:,.2f}" in said
    assert "max_cost_usd=6 of m at http://localhost:1/v1 is a cap for all scores of one model" in said
    assert "/not/here.csv is not here: 180 bundles in 2 languages" in said
    assert "may take" not in said
    large = {**ENDPOINT, "max_cost_usd": verdicts.usd - 0.01}  # type: ignore[operator]
    scoring = {**raw()["scoring"], "judge": {"name": "endpoint", "endpoint": large}}
    assert f"may take ${verdicts.usd:,.2f}: what it" in "\n".join(
        study_budget_lines(study_budget(configured(scoring=scoring), H100))
    )
    as_json = json.loads(json.dumps(study_budget_json(found)))
    assert as_json["usd"] == pytest.approx(verdicts.usd) and as_json["requests"] == requests
    assert as_json["hours"] == pytest.approx(found.hours) and as_json["fits"] is True
    assert study_budget(configured(scoring={**raw()["scoring"], "judge": {"name": "refusal"}}), H100).asked == ()


def test_samples_of_each_prompt_are_counted_once() -> None:
    """Four samples are four answers each: the engines and the judge have four times the work, and start once."""

    def found(samples: int) -> StudyBudget:
        return study_budget(configured(scoring={**raw()["scoring"], "asking": sampled(samples)}), H100)

    (one,), (four,) = (found(samples).scoring for samples in (1, 4))
    assert four.answers == 4 * one.answers
    config = configured(scoring={**raw()["scoring"], "asking": sampled(4)})
    scoring, shape = scoring_of(config, make_cells(config)), shape_of(*config_of("qwen2.5-7b"))
    plan = plan_scoring(scoring, shape, H100, prompts=2 * 180 + 2 * 60)
    assert four.hours == pytest.approx((72 + 7 * plan.working_seconds) / 3600)
    assert found(4).asked[0].requests == 4 * found(1).asked[0].requests


def test_engines_of_a_judge_are_counted_and_must_fit() -> None:
    """Of 8 GPUs a judge of 72B fits none by itself, where the model that answers does."""

    def found(judge: Any, cluster: Cluster = H100, **changes: Any) -> ScoringBudget:
        budget = study_budget(configured(scoring={**raw()["scoring"], "judge": judge, **changes}), cluster)
        assert budget.fits is all(each.fits is not False for each in (*budget.methods, *budget.scoring))
        return budget.scoring[0]

    guard = {"name": "llama-guard", "model": "meta-llama/Llama-3.1-8B", "engine": {"tensor_parallel": 2}}
    plain, guarded = found("refusal"), found(guard)
    assert plain.hours is not None and guarded.hours is not None and guarded.gpu_hours is not None and guarded.fits
    assert plain.gpu_hours == plain.hours and guarded.hours - plain.hours > 72 / 3600  # which an engine takes to start
    assert guarded.gpu_hours - plain.hours == pytest.approx(2 * (guarded.hours - plain.hours))
    large = found({"name": "wildguard", "model": "Qwen/Qwen2.5-72B"})
    assert large.fits is False and "judge.engine.tensor_parallel=4" in large.fault
    assert large.needs is not None and large.limit is not None and large.needs > large.limit
    unknown = study_budget(
        configured(scoring={**raw()["scoring"], "judge": {"name": "wildguard", "model": "/no/model"}}), H100
    )
    assert "nothing for the engines of judge.model=/no/model, which are not known" in unknown.assumed
    small = Cluster(None, 1, 1, 8 * 2**30)
    assert "but this machine has 6.0" in found("refusal", small).fault
    assert "gpu_memory_utilization" not in found("refusal", small).fault


def test_what_is_known_not_to_fit_is_told_from_what_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer GPUs than workers do not fit; of an engine of one's own nothing is known; a damaged file is an error."""
    few = study_budget(configured(), cluster_of(4, "h100"))
    assert not few.fits and [each.fits for each in few.methods] == [False, False]
    split = study_budget(configured(scoring={**raw()["scoring"], "engine": {"tensor_parallel": 16}}), H100)
    assert not split.fits and "engine.tensor_parallel=16" in split.scoring[0].fault
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path))
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "calibration.json").write_text("{")
    with pytest.raises(PlanCalibrationError, match="is damaged"):
        study_budget(configured(), H100)


def sampled(samples: int) -> dict[str, Any]:
    return {"samples": samples, "temperature": 0.7} if samples > 1 else {}


def test_a_cap_is_compared_with_what_one_endpoint_takes_for_the_model_with_most_cells() -> None:
    """Two members of a panel have a purse each, also where they ask the same model."""
    cells = {"models": {**raw()["models"], "b": {"path": "qwen2.5-0.5b", "methods": {}}}}
    plain = study_budget(configured(**cells), H100).asked[0].usd
    assert plain is not None
    a_model = plain / 2  # of two

    def notes(share: float) -> list[str]:
        endpoint = {**ENDPOINT, "max_cost_usd": share * a_model}
        judges = [{"judge": {"name": "endpoint", "endpoint": endpoint}, "kinds": [kind]} for kind in KINDS]
        scoring = {**raw()["scoring"], "judge": {"name": "panel", "judges": judges}}
        found = study_budget(configured(**cells, scoring=scoring), H100)
        assert [each.usd for each in found.asked] == pytest.approx([0.75 * plain, 0.25 * plain])
        return [note for note in found.notes if "max_cost_usd" in note]

    (said,) = notes(0.8)  # neither purse needs so much, both together do
    assert said.startswith(f"max_cost_usd={0.8 * a_model:g} of m at http://localhost:1/v1 is a cap")
    assert "may take" not in said
    harmful, benign = notes(0.7)
    assert f"which may take ${0.75 * a_model:,.2f}: what it" in harmful and "may take" not in benign
    lower = {"name": "endpoint", "endpoint": {**ENDPOINT, "max_cost_usd": 0.01}}
    cells_of_one = [cell for cell in make_cells(configured(**cells)) if cell.model == "qwen" or cell.seed == 1]
    config = configured(scoring={**raw()["scoring"], "judge": lower})
    scoring = scoring_of(config, cells_of_one)
    uneven = budget_of_cells(cells_of_one, scoring, PROMPTS, assumed, H100, keep_models=True)
    (said,) = [note for note in uneven.notes if "max_cost_usd" in note]
    of_all = uneven.asked[0].usd
    assert of_all is not None and f"which may take ${of_all * 7 / 10:,.2f}" in said  # seven of its ten scores


PROMPTS = Prompts(Counter({("harmful", "en"): 360, ("benign", "en"): 360}))


def test_what_rests_on_assumed_numbers_of_bundles_and_prompts_is_not_called_at_most(tmp_path: Path) -> None:
    found = study_budget(configured(), H100)
    first = study_budget_lines(found)[0]
    assert "answers: about" in first and "; numbers and lengths of bundles and numbers of prompts are assumed" in first
    assert all("at most, as" not in (table.note or "") for table in study_budget_tables(found))
    cells = make_cells(config := configured())

    def measured(run: TrainConfig) -> Weights:
        return replace(assumed(run), said="measured: 2,835 prepared bundles")

    known = budget_of_cells(cells, scoring_of(config, cells), PROMPTS, measured, H100, keep_models=True)
    assert "answers: at most" in study_budget_lines(known)[0] and "are assumed" not in study_budget_lines(known)[0]


def test_bundles_or_prompts_are_said_to_be_assumed_where_they_are() -> None:
    here = {"benchmarks": [{"path": "sample:test"}], "max_new_tokens": 100}
    train = raw()["train"]

    def said(**changes: Any) -> str:
        return study_budget_lines(study_budget(configured(**changes), H100))[0]

    prompts_here = said(scoring=here)
    assert "answers: about" in prompts_here and "; numbers and lengths of bundles are assumed" in prompts_here
    # of bundles that are here, without the model's tokenizer, the lengths alone
    bundles = {**train, "data": {"train": [{"path": "sample:train"}]}}
    assert "; lengths of bundles are assumed" in said(scoring=here, train=bundles)
    config = configured()
    cells = make_cells(config)
    measured = budget_of_cells(
        cells, scoring_of(config, cells), replace(PROMPTS, assumed=("not here",)),
        lambda run: replace(assumed(run), said="measured: 2,835 prepared bundles"), H100, keep_models=True,
    )  # fmt: skip
    assert measured.bound == "about" and "; numbers of prompts are assumed" in study_budget_lines(measured)[0]
    assert "bundles" not in study_budget_lines(measured)[0]


def test_a_run_that_does_not_fit_says_how_many_of_the_gpus_it_takes() -> None:
    alone = {**raw()["train"], "cluster": {"accelerator": "gpu"}}
    one = study_budget(configured(train=alone), H100).methods[0]
    assert one.fits is False and one.fault.endswith("; it takes cluster.workers=1 of 8 GPUs")
    all_of_them = study_budget(configured(models={"large": {"path": "qwen2.5-72b"}}), H100).methods[0]
    assert all_of_them.fits is False and "it takes" not in all_of_them.fault


def test_of_a_panel_each_endpoint_is_asked_about_what_it_reads() -> None:
    member = {"judge": {"name": "endpoint", "endpoint": ENDPOINT}, "kinds": ["harmful"]}
    panel = {"name": "panel", "judges": [member, {"judge": {"name": "refusal"}, "kinds": ["benign"]}]}
    found = study_budget(configured(scoring={**raw()["scoring"], "judge": panel}), H100)
    assert [each.requests for each in found.asked] == [7 * 2 * 180]


def test_what_does_not_fit_or_is_not_known_is_named_and_the_rest_is_counted() -> None:
    models = {"large": {"path": "qwen2.5-72b"}, "none": {"path": "/no/model"}, **raw()["models"]}
    found = study_budget(configured(models=models), H100)
    by = {(each.model, each.method): each for each in found.methods}
    assert not found.fits and by["large", "dpo"].fits is False and by["qwen", "dpo"].fits is True
    assert "large dpo: qwen2.5-72b with engine.stage=2 on 8 x h100 needs" in by["large", "dpo"].fault
    assert by["none", "sft"].hours is None and "/no/model" in by["none", "sft"].fault
    assert found.hours is None and found.gpu_hours is None
    said = study_budget_lines(found)
    assert "how long is not known on 8 x h100" in said[0] and "it does not fit the cluster" in said
    assert any(line.startswith("  engines of large: ") for line in said)
    assert [len(table.rows) for table in study_budget_tables(found)] == [7, 4]
    alone = study_budget(configured(models={"none": {"path": "/no/model"}}), H100)
    assert "whether it fits the cluster is not known" in study_budget_lines(alone)
    deep = study_budget(configured(methods={"sft": ["objective={loss: sft}"], "deep": ["mlc.layer=29"]}), H100)
    fitting, lacking = deep.methods
    assert fitting.hours is not None and lacking.hours is None
    assert lacking.fault.startswith("qwen deep: mlc.layer=29 is outside 0..28")
    few = study_budget(configured(), cluster_of(4, "h100"))
    assert few.methods[0].hours is None and "cluster.workers=8, but the cluster has 4 GPUs" in few.methods[0].fault


def test_the_command_prints_it_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(raw(output_dir=str(tmp_path / "runs"))))
    arguments = ["study", "--config", str(file), "--budget", "--gpus", "8", "--gpu", "h100"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["method"] for each in found["methods"]] == ["dpo", "sft"] and found["gpu"] == "8 x h100"
    assert main([*arguments, "--set", "models.qwen.path=qwen2.5-72b"]) == 1
    printed = capsys.readouterr()
    assert "it does not fit; what lacks is in the budget that was printed" in printed.err
    assert "qwen dpo" in printed.out and "verdicts by m at http://localhost:1/v1" in printed.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["study", "scale"])
@pytest.mark.parametrize(
    ("more", "quoted"),
    [
        (["--gpus", "8"], "--gpus 8 is read with --budget only"),
        (["--gpu", "h100"], "--gpu h100 says what --gpus N are; give that too, or remove it"),
        (["--gpus-per-node", "4"], "--gpus-per-node 4 says what --gpus N are"),
        (["--node-memory", "64"], "--node-memory 64.0 says what --gpus N are"),
        (["--json"], "--json is read with --budget only"),
        (["--resume", "runs/s", "--budget"], "--budget cannot go with --resume"),
    ],
)
def test_options_of_the_budget_are_read_with_it_alone(
    command: str, more: list[str], quoted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--resume" in more else ["--config", "configs/study/paper.yaml"]
    assert main([command, *given, *more]) == 2
    assert quoted in capsys.readouterr().err


def test_the_documented_study_fits_the_gpus_that_it_names() -> None:
    (example, *_) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/study.md").read_text(), re.DOTALL)
    found = study_budget(parse_config(StudyConfig, yaml.safe_load(example)), H100)
    assert found.fits and found.hours is not None


def test_a_study_states_it_before_its_first_cell(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the bundles and prompts that are there; the whole study, also where it goes on."""
    write_rows(tmp_path / "tokens", [rows_to_table(random_rows(12))], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path / "tokens")
    plan = planned(tmp_path / "s", models={"tiny_1": {"path": str(smollm2)}})
    monkeypatch.setattr(running, "_check", lambda *_: None)
    monkeypatch.setattr(running, "_prepare", lambda *_: {cell.name: CellData(tokens) for cell in plan.cells})
    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    monkeypatch.setattr(running, "known_cluster", lambda **_: H100)

    def trained(*_: Any) -> None:
        assert "4 runs and 5 scores of 240 answers: at most" in caplog.text
        raise KeyboardInterrupt("to go on: mlc-ray train --resume cell")

    monkeypatch.setattr(running, "_train", trained)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(KeyboardInterrupt, match=f"to go on: mlc-ray study --resume {tmp_path}/s$"),
    ):
        running._study(plan, asked(), Place(tmp_path / "s"))
    assert "data: measured: 12 prepared bundles" in caplog.text
