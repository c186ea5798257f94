from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from mlc_ray import cluster
from mlc_ray._registry import names
from mlc_ray.capacity import Growth, Node
from mlc_ray.cluster import ClusterError
from mlc_ray.config import ConfigError, ParameterSection, SearchConfig, parse_config
from mlc_ray.data.sources import SourceFile, sample_path
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.runs import PlanError
from mlc_ray.search import checks, prepare
from mlc_ray.search.space import Space, check_held_out, distribution, make_space
from mlc_ray.search.tune import make_scheduler
from mlc_ray.storage import Place
from mlc_ray.train.answers import MissingAnswersError
from mlc_ray.train.run import PreparedData
from mlc_ray.types import Bundle
from tests.data.files import read_file, write_rows
from tests.train.tiny import random_rows

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


def search_config(**changes: Any) -> SearchConfig:
    raw: dict[str, Any] = {
        "name": "s",
        "train": QUICKSTART,
        "space": {"mlc.layer": {"choice": [20, "last", 0.5]}, "mlc.weight": {"loguniform": [0.1, 2.0]}},
        "trials": 1,
        "scoring": {"benchmarks": [{"path": "sample:select"}]},
    }
    return parse_config(SearchConfig, {**raw, **changes})


def test_values_become_a_run() -> None:
    space = make_space(search_config(set=["train.epochs=1"]))
    run = space.run({"mlc.layer": 0.5, "mlc.weight": 0.3}, name="t1", output_dir="/x")
    assert (run.mlc.layer, run.mlc.weight, run.train.epochs, run.name, run.output_dir) == (0.5, 0.3, 1, "t1", "/x")
    assert space.run({"mlc.layer": "last"}, name="t2").mlc.weight == 0.8  # the file's own


def test_the_base_is_not_changed_by_a_run() -> None:
    space = make_space(search_config())
    space.run({"mlc.layer": 3}, name="a")
    assert space.run({}, name="b").mlc.layer == "last"


def test_corners_are_every_choice_both_ends_and_one_between() -> None:
    corners = list(make_space(search_config()).corners())
    assert corners == [
        {"mlc.layer": 20, "mlc.weight": 0.1},
        {"mlc.layer": "last", "mlc.weight": 0.1},
        {"mlc.layer": 0.5, "mlc.weight": 0.1},
        {"mlc.layer": 20, "mlc.weight": 2.0},
        {"mlc.layer": 20, "mlc.weight": pytest.approx(0.1 + 1.9 / math.pi)},
    ]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"mlc.layr": {"choice": [1]}}, r"mlc\.layr=1: no such field; did you mean 'layer'"),
        ({"mlc.temperature": {"uniform": [-1, 1]}}, r"(?s)with {'mlc.temperature': -1.0}: .*mlc\.temperature=-1\.0"),
        ({"mlc.scaling": {"choice": ["leading", "nnoe"]}}, "nnoe"),
        ({"name": {"choice": ["a"]}}, "the search decides name itself"),
        ({"cluster.workers": {"integers": [1, 2]}}, r"the search decides cluster\.workers itself"),
        ({"engine.offload_parameters": {"choice": [False, True]}}, "needs engine.stage 3"),
        (
            {"mlc.extractor_dim": {"loguniform": [64, 1024]}},
            r"(?s)with {'mlc.extractor_dim': 369\.\d+}.*fractional part",
        ),
        ({"model.path": {"choice": ["a", "b"]}}, "all trials share one model"),
        ({"mlc.layer": {"choice": [10.0]}}, r"mlc\.layer=10\.0: an index is a whole number, written without a point"),
        ({"layer": {"choice": [1]}}, r"layer=1: no such field; did you mean 'mlc\.layer'"),
    ],
)
def test_a_value_that_no_run_takes_is_found_before_the_first_trial(space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_space(search_config(space=space))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"mlc.layer": {}}}, "give exactly one of choice, integers, uniform, loguniform; got none"),
        ({"space": {"mlc.layer": {"choice": [1], "integers": [1, 2]}}}, "exactly one of"),
        ({"space": {"mlc.weight": {"uniform": [2, 1]}}}, "the first bound must be below"),
        ({"space": {"mlc.weight": {"loguniform": [0, 1]}}}, "bounds must be positive"),
        ({"space": {"mlc.layer": {"choice": [1, 1]}}}, "names a value twice"),
        ({"space": {}}, "space"),
        ({"space": {"mlc.layer": 0.5}}, r"space\.mlc\.layer=0\.5: expected a section, with fields of choice, integers"),
        (
            {"space": {"mlc": {"layer": {"choice": [1]}}}},
            r"dotted names as one key, e\.g\. mlc\.layer: {'choice'",
        ),
        ({"space": {"optimizer.learning_rate": {"choice": ["1e-6"]}}}, r"choice has '1e-6', which is text: write"),
        ({"space": {"mlc.weight": {"choice": [[1]]}}}, r"space\.mlc\.weight\.choice\.0=\[1\]: .*valid boolean, or "),
        ({"model": {"path": "x"}}, r"model is a setting of the runs.*set: \[model\.path=/abs/model\]"),
        ({"seed": -1}, "seed=-1"),
        ({"probe": {"criterion": "luck"}}, r"probe\.criterion='luck'.*headroom"),
        ({"trials": None}, "needs trials"),
        ({"sampler": "grid"}, "needs choice or integers; mlc.weight"),
        ({"scheduler": "asha", "objective": "pareto"}, "compares trials by one number"),
        ({"grace_scores": 2}, "read by schedulers only"),
        (
            {"scheduler_metric": "validation/loss/mlc"},
            "scheduler_metric='validation/loss/mlc' is read by schedulers only",
        ),
        ({"scheduler": "asha", "scheduler_metric": "loss/total"}, "scheduler_metric='loss/total'"),
        ({"objective": {"name": "pareto", "min_benign_compliance": 0.5}}, "min_benign_compliance=0.5: no such field"),
        ({"objective": {"name": "safety_alone", "pareto": True}}, "objective.pareto=True: no such field"),
        (
            {"share_gpu": True, "scoring": {"benchmarks": [{"path": "x"}], "engine": {"replicas": 2}}},
            r"scoring\.engine\.replicas=2",
        ),
        (
            {"scoring": {"benchmarks": [{"path": "x"}], "engine": {"replicas": "auto"}}},
            "replicas='auto' would take what the trials train on",
        ),
        (
            {
                "scoring": {
                    "benchmarks": [{"path": "x"}],
                    "judge": {
                        "name": "panel",
                        "judges": [
                            {"judge": "refusal"},
                            {"judge": {"name": "qwen3guard", "model": "m", "engine": {"replicas": "auto"}}},
                        ],
                    },
                }
            },
            r"scoring\.judge\.judges\.1\.judge\.engine\.replicas='auto' would take",
        ),
        ({"share_gpu": True, "concurrency": 2}, "concurrency=2 trials would train while it answers"),
        (
            {
                "share_gpu": True,
                "scoring": {"benchmarks": [{"path": "x"}], "judge": {"name": "qwen3guard", "model": "m"}},
            },
            "no GPU to the judge's own engine",
        ),
        ({"probe": {}, "space": {"mlc.weight": {"choice": [1]}}}, "space does not vary mlc.layer"),
        ({"probe": {}, "space": {"mlc.layer": {"uniform": [0.1, 0.9]}}}, "as choice or integers"),
    ],
)
def test_settings_that_fit_no_search_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_config(**changes)


def test_values_that_do_not_go_together_are_found_before_the_first_trial() -> None:
    space = {"engine.stage": {"choice": [3, 2]}, "engine.offload_parameters": {"choice": [False, True]}}
    for sampler in ("grid", "random"):  # no corner has both 2 and True
        with pytest.raises(ConfigError, match=r"(?s)'engine.stage': 2.*needs engine\.stage 3"):
            make_space(search_config(space=space, sampler=sampler))


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_losses_are_searched_with_the_fields_that_all_of_them_have(sampler: str) -> None:
    losses = {"objective.loss": {"choice": ["dpo", "simpo", "orpo"]}, "objective.beta": {"choice": [0.1, 1.0]}}
    space = make_space(search_config(space=losses, sampler=sampler, set=["objective={}"]))
    runs = [space.run(values, name="t") for values in space.grid()]
    assert [(run.objective.loss, run.objective.beta) for run in runs] == [  # type: ignore[attr-defined]
        (loss, beta) for loss in ("dpo", "simpo", "orpo") for beta in (0.1, 1.0)
    ]
    assert [run.needs_reference for run in runs] == [True, True, False, False, False, False]
    simpo = {"objective.loss": "simpo"}
    kept = {
        "loss": "simpo",
        "sft_weight": 0.0,
        "answers": "response",
        "response_share": None,
        "beta": 0.1,
        "margin": 0.5,
    }
    assert space.run(simpo, name="t").objective.model_dump() == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"objective.loss": ["dpo", "simpo"], "objective.margin": [0.1, 0.2]}},
            r"objective\.loss='dpo' has no field margin, but space varies objective\.margin for every trial \(dpo has "
            r"answers, beta, label_smoothing, response_share, sft_weight\); take objective\.margin out .*those that "
            r"have it \(simpo\)",
        ),
        (
            {"space": {"objective.loss": ["dpo", "sft"]}},
            r"objective\.loss='sft' has no field beta, but train='.*quickstart\.yaml' with set gives objective\.beta",
        ),
        (
            {"space": {"objective.loss": ["simpo", "orpo"]}, "set": ["objective.margin=1.0"]},
            r"objective\.loss='orpo' has no field margin.*set: \[objective={}\] drops",
        ),
        ({"space": {"objective.margin": [0.1]}}, r"objective\.margin=0\.1: no such field \(valid here: answers, beta"),
        ({"space": {"objective.loss": ["dpo", "dpoo"]}}, "no loss is called 'dpoo'"),
        (
            {"space": {"objective.loss": ["dpo", "simpo"]}, "set": ["reference=online"]},
            r"(?s)with {'objective\.loss': 'simpo'}: .*reference='online' is not read by objective\.loss='simpo'",
        ),
        (
            {"space": {"terms.t.name": ["contrast", "variance"], "terms.t.temperature": [0.1]}},
            r"terms\.t\.name='variance' has no field temperature.*those that have it \(contrast\)",
        ),
    ],
)
def test_a_field_that_one_of_the_losses_lacks_is_refused_before_the_search(
    changes: dict[str, Any], message: str
) -> None:
    changes["space"] = {name: {"choice": values} for name, values in changes["space"].items()}
    with pytest.raises(MlcRayError, match=message):
        make_space(search_config(**changes))


def test_terms_are_searched_by_name() -> None:
    space = {"terms.contrast.weight": {"choice": [0, 0.5]}, "mlc.weight": {"choice": [0, 0.8]}}
    found = make_space(search_config(space=space, sampler="grid"))
    active = [list(found.run(values, name="t").active_terms) for values in found.grid()]
    assert active == [[], ["mlc"], ["contrast"], ["mlc", "contrast"]]


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set 'mlc\.layer=7' has no effect: space varies mlc\.layer"):
        make_space(search_config(set=["mlc.layer=7"]))
    with pytest.raises(ConfigError, match=r"scheduler='asha' stops trials at their scores.*set score_every"):
        search_config(scheduler="asha")
    make_space(search_config(scheduler="asha", score_every=2))
    with pytest.raises(ConfigError, match=r"set 'output_dir=/x' has no effect: give output_dir at the top"):
        make_space(search_config(set=["output_dir=/x"]))


HELD_OUT = "data.validation={sources: [{path: 'sample:test'}], every: 2}"
RATES: dict[str, Any] = {"optimizer.learning_rate": {"choice": [1e-5, 1e-6]}}


def compared_by(metric: str, *overrides: str, space: dict[str, Any] = RATES, **changes: Any) -> SearchConfig:
    settings = {"score_every": 4, **changes}
    return search_config(scheduler="asha", scheduler_metric=metric, set=list(overrides), space=space, **settings)


def test_trials_can_be_compared_on_held_out_bundles() -> None:
    lower = ("loss/total", "harmful/loss/alignment", "loss/mlc", "benign/loss/contrast")
    higher = ("reward/margin", "harmful/reward/accuracy", "log_prob/chosen_change", "benign/mlc/leading_share")
    for name in (*lower, *higher):
        config = compared_by(f"validation/{name}", HELD_OUT, "terms.contrast.weight=0.5")
        make_space(config)
        scheduler = make_scheduler(config)
        assert (scheduler.metric, scheduler._metric_op) == (f"validation/{name}", -1.0 if name in lower else 1.0)
    make_space(compared_by("validation/loss/mlc", HELD_OUT, objective={"name": "pareto"}))


@pytest.mark.parametrize("loss", names("loss"))
def test_runs_of_every_loss_can_be_compared(loss: str) -> None:
    overrides = [HELD_OUT, f"objective={{loss: {loss}}}"]
    make_space(compared_by("validation/loss/alignment", *overrides))
    rewarded = compared_by("validation/reward/accuracy", *overrides)
    if loss in ("dpo", "ipo", "kto", "simpo", "orpo"):
        make_space(rewarded)
    else:
        with pytest.raises(ConfigError, match=f"objective.loss='{loss}' measure "):
            make_space(rewarded)


def test_trials_can_be_compared_by_an_sft_part() -> None:
    overrides = [HELD_OUT, "objective.sft_weight=0.1"]
    make_space(compared_by("validation/benign/loss/sft", *overrides))
    with pytest.raises(ConfigError, match="log_prob/chosen_change, "):
        make_space(compared_by("validation/loss/sft", HELD_OUT))
    with pytest.raises(ConfigError, match=r"cannot compare trials that differ in objective\.answers"):
        space = {"objective.answers": {"choice": ["response", "all"]}}
        make_space(compared_by("validation/loss/sft", *overrides, space=space))


@pytest.mark.parametrize("field", ["mlc.start", "mlc.ramp", "mlc.every", "terms.contrast.start"])
@pytest.mark.parametrize("name", ["loss/total", "loss/mlc", "loss/contrast"])
def test_when_a_term_begins_is_no_part_of_what_is_measured(field: str, name: str) -> None:
    space = {field: {"choice": [1, 2] if field == "mlc.every" else [0.0, 0.5]}}
    make_space(compared_by(f"validation/{name}", HELD_OUT, "terms.contrast.weight=0.5", space=space))


@pytest.mark.parametrize(
    ("metric", "overrides", "fault"),
    [
        ("validation/loss/mlc", [], "measured on data.validation, which the runs do not have"),
        (
            "validation/loss/mlc",
            [HELD_OUT.replace("every: 2", "every: 3")],
            r"score_every=4 steps, but measured every data\.validation\.every=3",
        ),
        ("validation/loss/anchor", [HELD_OUT], "for each NAME of loss/total, .*, loss/mlc$"),
        (
            "validation/mlc/leading_share",
            [HELD_OUT, "terms.contrast.weight=0.5", "mlc.weight=0"],
            "log_prob/chosen_change, loss/contrast$",
        ),
        (
            "validation/mlc/leading_share",
            [HELD_OUT, "mlc={name: cosine}"],
            "log_prob/chosen_change, loss/mlc$",
        ),
        (
            "validation/reward/margin",
            [HELD_OUT, "objective={loss: sft}"],
            "objective.loss='sft' measure .* loss/alignment, log_prob/chosen, ",
        ),
    ],
)
def test_what_trials_do_not_measure_compares_none(metric: str, overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler_metric='{metric}'.*{fault}"):
        make_space(compared_by(metric, *overrides))


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("loss/total", "mlc.weight", [0.1, 8.0]),
        ("loss/alignment", "objective.loss", ["dpo", "simpo"]),
        ("reward/margin", "objective.beta", [0.1, 0.5]),
        ("loss/mlc", "mlc.layer", [1, 2]),
        ("mlc/leading_share", "mlc.layer", [1, 2]),
        ("mlc/leading_share", "mlc.centring", [False, True]),
        ("mlc/leading_share", "mlc.name", ["mlc", "cosine"]),
        ("mlc/leading_share", "train.group_bundles", [4, 8]),
        ("loss/contrast", "train.group_bundles", [4, 8]),
        ("loss/total", "train.group_bundles", [4, 8]),
        ("reward/accuracy", "objective.answers", ["response", "all"]),
        ("reward/accuracy", "objective.loss", ["dpo", "orpo"]),
        ("loss/contrast", "terms.contrast.temperature", [0.1, 0.2]),
    ],
)
def test_a_number_that_means_another_thing_in_each_trial_compares_none(
    name: str, field: str, values: list[Any]
) -> None:
    overrides = [HELD_OUT, "terms.contrast.weight=0.5", "objective={}", "mlc={}"]
    space = {field: {"choice": values}}
    with pytest.raises(ConfigError, match=rf"validation/{name}' cannot compare trials that differ in {field}, .*; use"):
        make_space(compared_by(f"validation/{name}", *overrides, space=space))
    make_space(compared_by("validation/log_prob/chosen_change", *overrides, space=space))


def test_trials_are_compared_by_a_term_on_decisions() -> None:
    make_space(compared_by("validation/loss/decision", HELD_OUT, "terms.decision.weight=0.5"))


def test_what_no_held_out_bundle_has_compares_none(tmp_path: Path) -> None:
    rows = [row for row in random_rows(6) if row.kind == "harmful"]
    alone = [replace(row, languages=["en"], prompts=row.prompts[:1], tapped=[0], response_prompt=0) for row in rows]
    found = []
    for name, stored in {"two": rows, "one": alone}.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, [rows_to_table(stored)], fingerprint=name, rejected={})
        found.append(TokenArtifact.open(tmp_path / name))
    two, one = found
    check_held_out("validation/loss/sft", one)
    for metric in ("validation/loss/total", "validation/harmful/loss/mlc", "validation/mlc/leading_share"):
        check_held_out(metric, two)
    check_held_out("validation/loss/alignment", one)
    with pytest.raises(ConfigError, match=r"data\.validation has no benign bundles, only harmful"):
        check_held_out("validation/benign/loss/total", two)
    for metric in ("validation/harmful/loss/mlc", "validation/mlc/leading_share"):
        with pytest.raises(ConfigError, match=r"no such bundle of data\.validation has two languages"):
            check_held_out(metric, one)


def test_paths_of_held_out_bundles_are_those_of_the_folder_the_search_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out.jsonl").touch()
    space = make_space(search_config(set=["data.validation={sources: [{path: held-out.jsonl}]}"]))
    assert space.base["data"]["validation"]["sources"] == [{"path": str(tmp_path / "held-out.jsonl")}]


@pytest.mark.parametrize("override", ["optimizer.learing_rate=1e-5", "data=foo", "data.train=5"])
def test_what_is_wrong_for_all_trials_is_not_blamed_on_the_values_of_one(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_space(search_config(set=[override]))
    assert str(caught.value).startswith(f"train={QUICKSTART!r} with set=[{override!r}]: invalid configuration")
    assert override.partition("=")[0] in str(caught.value)


def test_a_grid_that_nobody_means_is_refused() -> None:
    space = {"mlc.layer": {"integers": [1, 1000]}, "mlc.every": {"integers": [1, 100]}}
    with pytest.raises(ConfigError, match="has 100,000 points"):
        make_space(search_config(space=space, sampler="grid"))


def test_a_grid_has_every_combination_once() -> None:
    space = Space({}, {"a": ParameterSection(choice=["x", "y"]), "b": ParameterSection(integers=(3, 5))})
    assert space.grid() == [{"a": a, "b": b} for a in "xy" for b in (3, 4, 5)]


def test_distributions_draw_from_the_range_that_is_written() -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(
        {
            "choice": distribution(ParameterSection(choice=["only"])),
            "integers": distribution(ParameterSection(integers=(7, 8))),
            "uniform": distribution(ParameterSection(uniform=(0.5, 0.6))),
            "log": distribution(ParameterSection(loguniform=(1e-6, 1e-4))),
        }
    )
    assert trial.params["choice"] == "only"
    assert trial.params["integers"] in (7, 8)
    assert 0.5 <= trial.params["uniform"] <= 0.6
    assert 1e-6 <= trial.params["log"] <= 1e-4
    assert trial.distributions["log"].log  # type: ignore[attr-defined]


def test_every_loss_of_the_space_finds_the_answers_it_needs_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, Any] = {"objective.loss": {"choice": ["sft", "orpo"]}}
    config = search_config(space=losses, set=["objective={}"])
    space = make_space(config)
    (row,) = random_rows(1)
    (bundle,) = (r.parsed for r in itertools.islice(read_file(SourceFile(str(sample_path("train")))), 1))
    assert isinstance(bundle, Bundle)
    stored = replace(row, bundle_id=bundle.bundle_id, rejected=None)
    write_rows(tmp_path, [rows_to_table([stored])], fingerprint="x", rejected={})
    data = PreparedData(TokenArtifact.open(tmp_path), None, {})
    monkeypatch.setattr(prepare, "model_depth", lambda *_, **__: 3)
    monkeypatch.setattr(prepare, "prepare_data", lambda *_, **__: data)
    base = space.run({"objective.loss": "sft"}, name="base")
    with pytest.raises(MissingAnswersError, match=r"objective\.loss='orpo' needs chosen and rejected answers"):
        prepare._prepare_data(config, base, space, Place(tmp_path), "cpu")


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_values_that_together_leave_a_term_no_step_are_found_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    late: dict[str, Any] = {"mlc.start": {"choice": [0.0, 0.6]}, "mlc.every": {"choice": [1, 4]}}
    config = search_config(space=late, sampler=sampler, set=["train.batch_bundles=2", "train.epochs=1"])
    space = make_space(config)
    write_rows(tmp_path, [rows_to_table(random_rows(8))], fingerprint="x", rejected={})  # four steps
    data = PreparedData(TokenArtifact.open(tmp_path), None, {})
    monkeypatch.setattr(prepare, "model_depth", lambda *_, **__: 3)
    monkeypatch.setattr(prepare, "prepare_data", lambda *_, **__: data)
    base = space.run({}, name="base")
    with pytest.raises(ConfigError, match=r"with {'mlc\.start': 0\.6, 'mlc\.every': 4}: mlc\.start=.* no step of 4"):
        prepare._prepare_data(config, base, space, Place(tmp_path), "cpu")


def test_a_trial_whose_term_needs_both_kinds_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied: dict[str, Any] = {"terms.decision.weight": {"choice": [0.0, 0.5]}}
    config = search_config(space=varied, sampler="grid", set=["train.epochs=1"])
    space = make_space(config)
    harmful = [row for row in random_rows(8) if row.kind == "harmful"]
    write_rows(tmp_path, [rows_to_table(harmful)], fingerprint="x", rejected={})
    data = PreparedData(TokenArtifact.open(tmp_path), None, {})
    monkeypatch.setattr(prepare, "model_depth", lambda *_, **__: 3)
    monkeypatch.setattr(prepare, "prepare_data", lambda *_, **__: data)
    with pytest.raises(ConfigError, match=r"with {'terms\.decision\.weight': 0\.5}: terms\.decision.* are harmful"):
        prepare._prepare_data(config, space.run({}, name="base"), space, Place(tmp_path), "cpu")


def test_a_search_is_planned_in_the_type_that_its_nodes_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: auto` is decided first: on CPUs without bfloat16 weights take twice as much."""
    config = search_config(set=["model.path=Qwen/Qwen2.5-0.5B", "model.dtype=auto"], concurrency=1)
    space = make_space(config)
    asked: list[str] = []
    for name in ("connect", "check_device", "check_feasible", "check_nodes"):
        monkeypatch.setattr(checks, name, lambda *_, **__: None)
    monkeypatch.setattr(checks, "model_depth", lambda *_, **__: 24)
    monkeypatch.setattr(checks, "use_gpu", lambda _: False)
    monkeypatch.setattr(cluster, "native_dtype", lambda **_: asked.append("native") or "float32")
    seen: list[tuple[str, str]] = []

    def planned(config: SearchConfig, space: Space, *, gpu: bool) -> None:
        run = space.run({}, name="corner")
        seen.append((run.model.dtype, config.scoring.engine.dtype))

    monkeypatch.setattr(checks, "check_plan", planned)
    checks.check_search(config, space)
    assert asked and seen == [("float32", "float32")]


def test_trials_and_engines_that_do_not_fit_together_are_refused() -> None:
    node = Cluster(None, 1, 1, 44 * 2**30)

    def check(dtype: str) -> None:
        scoring = {"benchmarks": [{"path": "sample:select"}], "engine": {"dtype": dtype, "replicas": 4}}
        config = search_config(set=["model.path=Qwen/Qwen2.5-0.5B", f"model.dtype={dtype}"], scoring=scoring)
        checks.check_plan(config, make_space(config), gpu=False, cluster=node)

    check("bfloat16")
    with pytest.raises(
        PlanError, match=r"concurrency=1 trials of .* the engines beside them 26\.7, .* have 40\.2 for them"
    ):
        check("float32")


ONE_GPU, TWO_GPUS, NO_GPU = ({"CPU": 8.0, **gpu} for gpu in ({"GPU": 1.0}, {"GPU": 2.0}, {}))


@pytest.mark.parametrize("nodes", [[TWO_GPUS], [ONE_GPU, ONE_GPU], [ONE_GPU, NO_GPU]])
def test_a_gpu_is_shared_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]]
) -> None:
    config = search_config(share_gpu=True, set=["cluster.workers=1"])
    base = make_space(config).run({}, name="base")
    for module in (cluster, checks):
        monkeypatch.setattr(module, "nodes_there", lambda: [Node(each) for each in nodes])
    monkeypatch.setattr(cluster, "may_grow", Growth)
    with pytest.raises(ClusterError, match=r"share_gpu=True, but the Ray cluster has .*GPUs.*one node with one GPU"):
        checks.check_feasible(config, base, "gpu")
    nodes[:] = [ONE_GPU]
    checks.check_feasible(config, base, "gpu")
    with pytest.raises(ClusterError, match="runs on CPU, where engines cannot sleep"):
        checks.check_feasible(config, base, "cpu")
