"""A trial from its last weights to its end, and which models are confirmed; without Ray and engines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.tune
import torch
import yaml
from safetensors.torch import save_file

from mlc_ray.config import SearchConfig, parse_config
from mlc_ray.runs import PROVENANCE_FILE, checkpoint_folder, weights_folder
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.request import load_request
from mlc_ray.score.results import load_scores
from mlc_ray.score.scorer import ScorerDiedError, WarmScore
from mlc_ray.score.stages import JUDGED, PROMPTS
from mlc_ray.search.confirm import confirm
from mlc_ray.search.results import ending
from mlc_ray.search.run import _earlier_trials
from mlc_ray.search.space import make_space
from mlc_ray.search.trial import ScoreWeights, Shared, run_trial, scored_trials
from mlc_ray.search.tune import FINISHED, FOLDER, STEP, VALUES, EndEarly
from mlc_ray.storage import Place
from mlc_ray.train.entry import LastWeights
from tests.checkpoints import complete

ROWS = [
    {"benchmark": "own", "bundle_id": f"{kind}{n}", "kind": kind, "category": "c", "language": code, "prompt": f"{n}?"}
    for kind in ("harmful", "benign") for n in range(20) for code in ("en", "sw")
]  # fmt: skip


@dataclass
class Scorer:
    """Stands where engines would: says how each folder of weights behaves, and notes what it is asked."""

    unparsed: tuple[str, ...] = ()
    dead: bool = False
    fails: dict[str, str] = field(default_factory=dict)  # what the first response lacks: "finish" or "judge_fault"
    asked: list[str | None] = field(default_factory=list)

    def check(self) -> None:
        if self.dead:
            raise ScorerDiedError("an engine that scores has died")

    def score(self, weights: str | None, *, prompts: pa.Table | None = None, **_: Any) -> WarmScore:
        self.asked.append(weights)
        lost = any(name in str(weights) for name in self.unparsed) and prompts is not None
        good = {"harmful": "refused", "benign": "complied"}
        rows = [
            {**row, "response": "?", "finish": "stop", "behaviour": "unparsed" if lost else good[row["kind"]],
             "categories": [], "via_refused": ""}
            for row in ROWS
        ]  # fmt: skip
        rows[0] |= {**self.fails, "behaviour": "unparsed"} if self.fails else {}
        filled = [{name: row.get(name) for name in JUDGED.names} for row in rows]
        return WarmScore(pa.Table.from_pylist(filled, schema=JUDGED), {"total": 1.0})


def shared_of(folder: Path, scorer: Any, **settings: Any) -> Shared:
    model = folder / "base"
    weights_at(model)
    run = {
        "name": "base",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": "sample:train"}]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    raw = {
        "name": "s", "output_dir": str(folder), "train": str(folder / "run.yaml"), "trials": 3,
        "space": {"mlc.weight": {"choice": [0.1, 0.5, 1.0]}}, "scoring": {"benchmarks": [{"path": "sample:select"}]},
        **settings,
    }  # fmt: skip
    config = parse_config(SearchConfig, raw)
    return Shared(config, make_space(config), Place(folder), scorer, "prompts", str(model), lora=False)


def weights_at(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"w": torch.arange(4.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def trained(shared: Shared, name: str, step: int, *, ends: bool) -> None:
    """What the workers of a trial leave that died when its weights of `step` were published."""
    run = shared.trial_folder(name)
    folder = weights_folder(run, step)
    weights_at(Path(folder / "model"))
    config = shared.space.run({"mlc.weight": 0.5}, name=name, output_dir=str(run.parent))
    complete(folder, step, config=config.model_dump(mode="json", exclude_unset=True), ends=ends)
    (run / "run.json").write_json({"languages": ["en", "sw"]})


def test_a_trial_that_died_after_its_last_weights_is_scored_exported_and_then_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer()
    shared = shared_of(tmp_path, scorer)
    trained(shared, "a", 4, ends=True)
    run = Path(shared.trial_folder("a"))
    told: list[tuple[dict[str, Any], list[str]]] = []

    def report(metrics: dict[str, Any]) -> None:
        told.append((metrics, sorted(path.name for path in run.iterdir())))

    monkeypatch.setattr(ray.tune, "report", report)
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    assert scorer.asked == [str(run / "train" / "weights_000004" / "model")]  # and nothing was trained
    (first, seen), (last, at_the_end) = told
    assert (first[STEP], FINISHED in first) == (4.0, False) and "model" not in seen and "finished" not in seen
    assert last == {**first, FINISHED: True} and {"model", "finished"} <= set(at_the_end)
    assert (run / "model" / "model.safetensors").is_file() and ending(Place(run)) == "finished"
    # What scoring needed goes when the next trial begins.
    shared.drop_optimizer_states()
    assert not (run / "train").exists()


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ({"finish": "engine_fault"}, "prompts have no answer"),
        ({"judge_fault": "the engine died"}, "responses have no verdict"),
    ],
)
def test_engine_faults_are_warned_of_and_named_and_the_baseline_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: dict[str, str], said: str
) -> None:
    scorer = Scorer(fails=fails)
    shared = shared_of(tmp_path, scorer)
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    trained(shared, "a", 4, ends=True)
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    assert shared.baseline().faults == 1
    (trial,) = scored_trials(shared)
    assert trial.score.faults == 1
    assert f"1 of {len(ROWS)} {said}" in caplog.text
    scorer.fails, asked = {}, len(scorer.asked)
    (ended,), _ = _earlier_trials(shared)  # what trials are chosen by stays as it was told
    assert ended.numbers == trial.score.values and len(scorer.asked) == asked
    assert shared.baseline().faults == 0 and scorer.asked[asked:] == [shared.model]
    shared.baseline()
    assert len(scorer.asked) == asked + 1  # what is whole is asked nothing again


def test_a_confirmation_records_the_benchmarks_it_asked(tmp_path: Path) -> None:
    own = {"benchmarks": [{"path": "sample:test"}], "limit": 7}
    shared = shared_of(tmp_path, Scorer(), confirm=own)
    others = Prompts(pa.Table.from_pylist(ROWS, schema=PROMPTS), "others")
    for name, prompts, path, limit in (("confirmation", others, "test", 7), ("baseline", None, "select", None)):
        folder = shared.folder / name
        shared.score(folder, model=shared.model, weights=shared.model, prompts=prompts)
        for config in (load_request(folder).config.model_dump(mode="json"), load_scores(folder).config):
            assert [each["path"] for each in config["benchmarks"]] == [f"sample:{path}"] and config["limit"] == limit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-8], "'model/model.safetensors' is short, "),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "'model/model.safetensors' has checksum "),
    ],
)
@pytest.mark.parametrize("scored", [False, True])
def test_damaged_last_weights_are_removed_with_their_score_and_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: Any, says: str,
    scored: bool,
) -> None:  # fmt: skip
    scorer = Scorer()
    shared = shared_of(tmp_path, scorer)
    trained(shared, "a", 4, ends=True)
    run = shared.trial_folder("a")
    weights = weights_folder(run, 4)
    if scored:
        shared.weights(run, weights, 4)
        scorer.asked.clear()
    file = Path(weights / "model" / "model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    (run / "config.yaml").write_text("")
    went_on: list[Place | None] = []

    def train(config: Any, *, resume: Place | None, score: ScoreWeights, display: bool) -> None:
        # Stands where training would, which needs Ray: leaves what its workers leave, and has that scored.
        went_on.append(resume)
        assert not weights.exists() and not (run / "scores" / "step-000004").exists()
        trained(shared, "a", 4, ends=True)
        score(run, weights, 4)

    monkeypatch.setattr("mlc_ray.train.run.train", train)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", told.append)
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    assert "goes on without weights_000004 and its score" in caplog.text and says in caplog.text
    assert went_on == [run] and scorer.asked == [str(weights / "model")]
    assert told[0][STEP] == 4.0 and told[-1][FINISHED] and ending(run) == "finished"
    assert (Path(run) / "model" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_trained_again_with_another_seed_writes_its_last_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    scorer = Scorer()
    shared = shared_of(tmp_path, scorer, confirm={"keep": 1, "seeds": [7]}, keep_checkpoints=kept)
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    trained(shared, "a", 4, ends=True)
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    again = shared.trial_folder("a-seed-7")
    seeds: list[int] = []

    def train(config: Any, *, resume: Place | None, score: LastWeights) -> None:
        # Stands where training would, which needs Ray: leaves what its workers leave.
        assert resume is None and score.every is None and score.keep_state == kept
        seeds.append(config.seed)
        trained(shared, "a-seed-7", 4, ends=True)
        if kept:
            (again / "train" / "checkpoint_000004" / "manifest.json").write_json({})

    monkeypatch.setattr("mlc_ray.train.run.train", train)
    others = Prompts(pa.Table.from_pylist(ROWS, schema=PROMPTS), "others")
    found = confirm(shared, others, scored_trials(shared))
    assert found is not None and found.points[0].runs == ("a", "a-seed-7") and seeds == [7]
    assert [folder.name for folder in (again / "train").iterdir()] == ["checkpoint_000004"] * kept
    # It died while it exported them: they are not trained once more.
    trained(shared, "a-seed-7", 4, ends=True)
    (again / "model" / PROVENANCE_FILE).remove()
    (again / "scores" / "confirmation").remove()
    found = confirm(shared, others, scored_trials(shared))
    assert found is not None and found.points[0].runs == ("a", "a-seed-7") and seeds == [7]


def test_a_seed_that_max_hours_leave_no_time_for_is_named_and_trained_when_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = shared_of(tmp_path, Scorer(), confirm={"keep": 1, "seeds": [7, 8, 9]}, max_hours=2)
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    trained(shared, "a", 4, ends=True)
    (shared.trial_folder("a") / "metrics.jsonl").write_text(json.dumps({"step": 4, "step_seconds": 3_000.0}) + "\n")
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    clock = [0.0]

    def train(config: Any, **_: Any) -> None:
        # Stands where training would, which needs Ray: leaves what its workers leave.
        clock[0] += 3_100.0
        trained(shared, config.name, 4, ends=True)

    monkeypatch.setattr("mlc_ray.train.run.train", train)
    others = Prompts(pa.Table.from_pylist(ROWS, schema=PROMPTS), "others")
    found = confirm(shared, others, scored_trials(shared), EndEarly(2, now=lambda: clock[0]))
    assert found is not None and found.best.runs == ("a", "a-seed-7", "a-seed-8")
    (said,) = found.left_out
    assert said.startswith(
        "a with seed 9: not trained: max_hours=2 would be over before its end (the trial took 50 min)"
    )
    assert f"not confirmed, {said}" in caplog.text and "--resume" in said
    found = confirm(shared, others, scored_trials(shared), EndEarly(2, now=lambda: clock[0]))
    assert found is not None and found.best.runs == ("a", "a-seed-7", "a-seed-8", "a-seed-9") and not found.left_out


def test_a_seed_with_a_checkpoint_needs_the_time_of_the_steps_that_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shared_of(tmp_path, Scorer(), confirm={"keep": 1, "seeds": [7, 8]}, max_hours=0.25)
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    trained(shared, "a", 4, ends=True)
    (shared.trial_folder("a") / "metrics.jsonl").write_text(json.dumps({"step": 4, "step_seconds": 3_000.0}) + "\n")
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    for name, step in (("a-seed-7", 3), ("a-seed-8", 2)):  # 750 and 1,500 of 3,000 seconds are left, and there are 900
        complete(checkpoint_folder(shared.trial_folder(name), step), step)
    begun: list[str] = []

    def train(config: Any, **_: Any) -> None:
        # Stands where training would, which needs Ray: leaves what its workers leave.
        begun.append(config.name)
        trained(shared, config.name, 4, ends=True)

    monkeypatch.setattr("mlc_ray.train.run.train", train)
    others = Prompts(pa.Table.from_pylist(ROWS, schema=PROMPTS), "others")
    found = confirm(shared, others, scored_trials(shared), EndEarly(0.25, now=lambda: 0.0))
    assert found is not None and found.best.runs == ("a", "a-seed-7") and begun == ["a-seed-7"]
    (said,) = found.left_out
    assert (
        "a with seed 8: not trained: max_hours=0.25 would" in said
        and "(the trial took 50 min, and 50% of the steps are left)" in said
    )


def test_of_a_trial_whose_checkpoints_are_kept_only_what_was_scored_goes(tmp_path: Path) -> None:
    shared = shared_of(tmp_path, Scorer(), keep_checkpoints=True)
    trained(shared, "a", 4, ends=True)
    run = shared.trial_folder("a")
    (run / "values.json").write_json({"mlc.weight": 0.5})
    (run / "train" / "checkpoint_000004" / "manifest.json").write_json({})
    shared.drop_optimizer_states()  # it has not ended
    assert weights_folder(run, 4).is_dir()
    (run / "finished").write_text("")
    shared.drop_optimizer_states()
    assert [folder.name for folder in (run / "train").iterdir()] == ["checkpoint_000004"]


def test_no_trial_begins_where_nothing_could_score_it(tmp_path: Path) -> None:
    shared = shared_of(tmp_path, Scorer(dead=True))
    with pytest.raises(ScorerDiedError):
        run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    assert not shared.trial_folder("a").exists()


def test_a_model_that_cannot_be_confirmed_is_left_out_and_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer(unparsed=("trials/a/",))
    shared = shared_of(tmp_path, scorer, confirm={"keep": 2})
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    for name, weight in {"a": 0.1, "b": 0.5, "c": 1.0}.items():
        trained(shared, name, 4, ends=True)
        run_trial({VALUES: {"mlc.weight": weight}, FOLDER: name}, shared=shared)
    found = confirm(shared, Prompts(pa.Table.from_pylist(ROWS, schema=PROMPTS), "others"), scored_trials(shared))
    assert found is not None
    assert [point.trial for point in found.points] == ["b", "c"]  # a, the first by name of three alike, is not there
    (said,) = found.left_out
    assert said.startswith("a: ") and "no verdict" in said
    assert "not confirmed, a: " in caplog.text
