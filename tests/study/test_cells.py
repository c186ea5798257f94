"""The cells of a study: every combination is a complete run, and what is not is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import ConfigError, SourceSection, StudyConfig, TrainConfig, parse_config
from mlc_ray.study.cells import Commits, make_cells

RAW: dict[str, Any] = {
    "name": "s",
    "models": {"a": {"path": "m"}, "b": {"path": "n", "set": ["mlc.layer=3"], "methods": {"mlc": ["mlc.weight=0.4"]}}},
    "methods": {"dpo": ["mlc.weight=0"], "mlc": [], "sft": ["objective={loss: sft}"]},
    "seeds": [1, 2],
    "train": {"data": {"train": [{"path": "sample:train"}]}, "objective": {"loss": "dpo", "beta": 0.2}},
    "scoring": {"benchmarks": [{"path": "sample:test"}]},
}


def configured(**changes: Any) -> StudyConfig:
    return parse_config(StudyConfig, {**RAW, **changes})


def test_every_method_on_every_model_with_every_seed_is_a_run() -> None:
    cells = {cell.name: cell for cell in make_cells(configured())}
    assert list(cells) == [f"{m}-{k}-{s}" for m in ("a", "b") for s in (1, 2) for k in ("dpo", "mlc", "sft")]
    run = cells["b-mlc-2"].config
    assert (run.name, run.seed, run.resume, run.model.path) == ("b-mlc-2", 2, "auto", "n")
    # train, then the model's overrides, the method's, and the method's for the model
    assert (run.mlc.layer, run.mlc.weight, run.objective.loss) == (3, 0.4, "dpo")
    assert (cells["a-mlc-1"].config.mlc.layer, cells["a-dpo-1"].config.mlc.weight) == ("last", 0.0)
    assert cells["a-dpo-1"].config.objective.beta == 0.2  # type: ignore[attr-defined]
    assert cells["a-sft-1"].config.objective.model_dump(exclude_unset=True) == {"loss": "sft"}


def test_a_model_is_the_section_of_a_run_without_what_the_study_adds() -> None:
    (cell, *_) = make_cells(configured(models={"a": {"path": "m", "dtype": "float32", "gradient_checkpointing": True}}))
    given = {"path": "m", "dtype": "float32", "gradient_checkpointing": True}
    assert cell.config.model_dump(exclude_unset=True)["model"] == given
    assert type(cell.config) is TrainConfig


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"methods": {"x": ["mlc.weigth=0"]}}, "method 'x' on model 'a'.*mlc.weigth=0: no such field.*'weight'"),
        ({"methods": {"x": ["seed=3"]}}, "methods.x: 'seed=3' sets seed, but the study decides it"),
        ({"methods": {"x": ["model.dtype=float32"]}}, "sets model.dtype, but models gives the model"),
        ({"methods": {"x": ["chat.system=hi"]}}, "sets chat.system, but all cells are scored on the same prompts"),
        (
            {"methods": {"x": [], "y": ["objective.beta=0.2"]}},
            "methods.x and methods.y have the same settings on every",
        ),
        (
            {"train": {**RAW["train"], "objective": {"loss": "dpo", "bta": 0.1}}},
            r"the run of method 'dpo' on model 'a' \(train, then methods.dpo\): .*objective.bta=0.1",
        ),
        (
            {
                "models": {"a": {"path": "m", "set": ["mlc.bad=1"], "methods": {"mlc": ["mlc.weight=0"]}}},
                "methods": {"mlc": []},
            },
            r"method 'mlc' on model 'a' \(train, then models.a.set, then models.a.methods.mlc\): .*mlc.bad=1",
        ),
        ({"methods": {"x": ["mlc.weight"]}}, "methods.x: override 'mlc.weight' is not of the form"),
        ({"methods": {"x": ["objective.loss=sft"]}}, "method 'x' on model 'a'.*beta"),
        ({"models": {"a": {"path": "m", "methods": {"q": []}}}}, "models.a.methods.q is no method of the study"),
        ({"models": {"a": {"path": "m", "set": ["output_dir=x"]}}}, "models.a.set: 'output_dir=x' sets output_dir"),
        ({"models": {}}, "models: .*at least 1"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] names a seed twice"),
        ({"seeds": []}, "seeds=.*at least 1"),
        ({"methods": {"untouched": []}}, "methods.untouched is the name of the models before training"),
        ({"methods": {"a/b": []}}, "a/b"),
        ({"train": {**RAW["train"], "seed": 4}}, "train.seed=4 cannot stand here: the study decides it"),
        ({"train": {**RAW["train"], "model": {"path": "m"}}}, "train.model=.*give models"),
        (
            {"models": {"a": {"path": "m"}, "a-b": {"path": "m"}}, "methods": {"c": [], "b-c": []}},
            "cell name 'a-b-c'-SEED",
        ),
        ({"scoring": {**RAW["scoring"], "asking": {"reasoning": "forbid"}}}, "scoring.asking.reasoning='forbid'"),
        (
            {"utility": {"tasks": ["mmlu"], "backend": "hf", "engine": {"replicas": 2}}},
            "engine.replicas=2: not read with backend='hf'",
        ),
    ],
)
def test_what_is_no_study_is_refused(changes: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){quoted}"):
        make_cells(configured(**{"models": {"a": {"path": "m"}}, **changes}))


def test_paths_become_absolute_and_each_name_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    commits = Commits({"owner/name": "owner/name#abc"})
    assert commits.model("model") == str(tmp_path / "model")
    assert commits.model("owner/name") == "owner/name#abc"  # known from when the study began: the hub is not asked
    (source,) = commits.sources([SourceSection(path="rows.jsonl", kind="benign")])
    assert (source.path, source.kind) == (str(tmp_path / "rows.jsonl"), "benign")
    assert commits.models["model"] == str(tmp_path / "model") and list(commits.data) == ["rows.jsonl"]
