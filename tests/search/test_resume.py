"""`resume: auto` of a search: what it takes for the same search, before anything is started."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import ConfigError, SearchConfig, load_config
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.judges.guards.base import GuardSettings
from mlc_ray.judges.panel import PanelJudge
from mlc_ray.score.prompts import Prompts
from mlc_ray.search.folder import changed_config, changed_settings, load_search, write_config, write_settings
from mlc_ray.search.prepare import check_same, identity_of
from mlc_ray.search.run import resume_search, search
from mlc_ray.search.selection import AskedPrompts
from mlc_ray.search.space import make_space, with_commits
from mlc_ray.search.trial import SearchError
from mlc_ray.storage import NO_COMMITS, Commits, Place, library_versions
from tests.data.hub_server import Hub, running


@pytest.fixture
def place(tmp_path: Path) -> Path:
    run: dict[str, Any] = {
        "name": "r",
        "model": {"path": str(tmp_path / "m")},
        "data": {"train": [{"path": "sample:train"}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    searched = {
        "name": "found", "output_dir": str(tmp_path), "train": str(tmp_path / "run.yaml"), "sampler": "grid",
        "space": {"mlc.layer": {"choice": [1, "last"]}}, "scoring": {"benchmarks": [{"path": "sample:select"}]},
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(searched))
    config = configured(tmp_path, "scoring.engine.dtype=float32", "set=[model.dtype=float32]")
    write_settings(config, make_space(config), Place(tmp_path / "found"), NO_COMMITS)
    return tmp_path


def configured(place: Path, *overrides: str) -> SearchConfig:
    return load_config(SearchConfig, place / "search.yaml", overrides)


def changed(place: Path, *overrides: str) -> list[str]:
    config = configured(place, *overrides)
    return changed_settings(config, make_space(config), place / "found")


def test_the_same_settings_are_the_same_search(place: Path) -> None:
    assert changed(place) == []  # types were decided when it began
    assert changed(place, "resume=auto", "objective=average", "set=[model.dtype=float32]") == []
    assert changed(place, "set=[model.dtype=bfloat16]") == ["train.model.dtype was 'float32', now 'bfloat16'"]


def test_engines_of_a_panel_keep_the_types_that_were_decided(place: Path) -> None:
    def panel(guard: str, translator: str = "auto") -> str:
        judges = f"[{{judge: refusal}}, {{judge: {{name: llama-guard, model: m, engine: {{dtype: {guard}}}}}}}]"
        translate = f"{{model: t, engine: {{dtype: {translator}}}}}"
        return f"scoring.judge={{name: panel, judges: {judges}, translate: {translate}}}"

    begun = configured(place, "scoring.engine.dtype=float32", panel("float32", "bfloat16"))
    write_config(begun, make_space(begun), Place(place / "found"))
    assert changed(place, panel("auto")) == changed(place, panel("float32", "bfloat16")) == []
    (other,) = changed(place, panel("bfloat16"))
    assert other.startswith("scoring.judge.judges was ")
    (other,) = changed(place, panel("auto", "float32"))
    assert other == "scoring.judge.translate.engine.dtype was 'bfloat16', now 'float32'"


def test_a_search_keeps_the_commits_that_it_began_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, dev = (letter * 40 for letter in "abc")
    hub = Hub("owner/pairs", dict.fromkeys((first, second, dev), b"{}"), {"main": first, "dev": dev})

    def named(name: str) -> list[str]:
        given = f'[{{path: "{name}"}}]'
        return [
            f"set=['data.train={given}', model.dtype=float32]", f"scoring.benchmarks={given}",
            f"confirm.benchmarks={given}",
        ]  # fmt: skip

    with running(hub):
        use(hub, monkeypatch)
        config = configured(place, "scoring.engine.dtype=float32", *named("owner/pairs#main"))
        begin(place, config)
    hub.refs["main"] = second
    stored = load_search(Place(place / "found"))
    assert stored.confirm.benchmarks is not None
    sources = [*stored.scoring.benchmarks, *stored.confirm.benchmarks, *make_space(stored).run({}, name="r").data.train]
    assert [source.path for source in sources] == [f"owner/pairs#{first}"] * 3
    assert changed(place, *named("owner/pairs#main")) == changed(place, *named(f"owner/pairs#{first}")) == []
    for another in (f"owner/pairs#{second}", "owner/pairs#dev", "owner/pairs", "owner/another"):
        differences = changed(place, *named(another))
        assert len(differences) == 3 and all(first in each and another in each for each in differences)


def test_a_search_keeps_the_commits_of_its_models(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "a" * 40, "b" * 40
    hub = Hub("owner/model", dict.fromkeys((first, second), b"{}"), {"main": first}, "models")

    def named(name: str) -> list[str]:
        guard = f'{{name: llama-guard, model: "{name}"}}'
        translate = f'{{model: "{name}", engine: {{dtype: float32}}}}'
        return [
            f"set=['model.path=\"{name}\"', model.dtype=float32]",
            f"scoring.judge={{name: panel, judges: [{{judge: {guard}}}], translate: {translate}}}",
        ]  # fmt: skip

    with running(hub):
        use(hub, monkeypatch)
        begin(place, configured(place, "scoring.engine.dtype=float32", *named("owner/model")))
    hub.refs["main"] = second
    stored = load_search(Place(place / "found"))
    judge = stored.scoring.judge
    assert isinstance(judge, PanelJudge.Settings) and judge.translate is not None
    member = judge.judges[0].judge
    assert isinstance(member, GuardSettings)
    models = [make_space(stored).run({}, name="r").model.path, member.model, judge.translate.model]
    assert models == [f"owner/model#{first}"] * 3
    assert changed(place, *named("owner/model")) == changed(place, *named(f"owner/model#{first}")) == []
    for another in (f"owner/model#{second}", "owner/model#main", "owner/another"):
        differences = changed(place, *named(another))
        assert len(differences) == 3 and all(first in each and another in each for each in differences)


def test_a_model_and_a_data_set_of_one_name_are_told_apart(place: Path) -> None:
    model, data_set = ("owner/name#" + digit * 40 for digit in "ab")

    def named(model: str, data_set: str) -> list[str]:
        return [f"set=['model.path=\"{model}\"', model.dtype=float32]", f'scoring.benchmarks=[{{path: "{data_set}"}}]']

    config = configured(place, "scoring.engine.dtype=float32", *named(model, data_set))
    commits: Commits = {"model": {"owner/name": model}, "data set": {"owner/name": data_set}}
    write_settings(config, make_space(config), Place(place / "found"), commits)
    assert changed(place, *named("owner/name", "owner/name")) == []
    assert len(changed(place, *named(data_set, model))) == 2


def test_paths_of_a_panels_judges_hold_in_any_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for folder in ("guard", "translator"):
        (place / folder).mkdir()
    (place / "wording.txt").write_text("words")
    guard = "{name: wildguard, model: guard, prompt: wording.txt}"
    asked = "{name: endpoint, endpoint: {base_url: 'http://localhost:1/v1', model: m, cache_dir: replies}}"
    judge = f"{{name: panel, judges: [{{judge: {guard}}}, {{judge: {asked}}}], translate: {{model: translator}}}}"
    config = configured(place, "set=[model.dtype=float32]", f"scoring.judge={judge}")
    write_config(config, make_space(config), Place(place / "found"))
    monkeypatch.chdir("/")
    stored = load_search(Place(place / "found")).scoring.judge.model_dump(mode="json")
    guard_settings, endpoint = (member["judge"] for member in stored["judges"])
    assert [guard_settings["model"], guard_settings["prompt"]] == [str(place / "guard"), str(place / "wording.txt")]
    assert endpoint["endpoint"]["cache_dir"] == str(place / "replies")
    assert stored["translate"]["model"] == str(place / "translator")


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def begin(place: Path, config: SearchConfig) -> None:
    """Write what a search of `config` begins with."""
    config, space, commits = with_commits(config, make_space(config))
    write_settings(config, space, Place(place / "found"), commits)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("objective=pareto", r"objective\.name was 'average', now 'pareto'"),
        ("objective.min_benign_compliance=0.5", r"objective\.min_benign_compliance was 0\.8, now 0\.5"),
        ("set=[train.max_steps=3]", r"train\.train\.max_steps was None, now 3"),
        ("space={mlc.layer: {choice: [1, 2]}}", r"space\.mlc\.layer\.choice was \[1, 'last'\], now \[1, 2\]"),
        ("scoring.judge.allow_uncovered=true", r"scoring\.judge\.allow_uncovered was False, now True"),
    ],
)
def test_another_search_is_refused(place: Path, override: str, difference: str) -> None:
    with pytest.raises(SearchError, match=rf"resume='auto': .*other settings \(.*{difference}"):
        search(configured(place, "resume=auto", override))


def test_a_folder_that_is_there_is_refused_by_default(place: Path) -> None:
    with pytest.raises(SearchError, match=r"exists already.*--resume .*found.*resume=auto"):
        search(configured(place))
    with pytest.raises(ConfigError, match="resume='always'"):
        configured(place, "resume=always")


def test_trials_are_added_and_hours_are_changed(place: Path) -> None:
    assert changed(place, "resume=auto", "trials=1", "max_hours=3") == []
    folder = Place(place / "found")
    config = changed_config(load_search(folder), ["trials=1", "max_hours=8.5"])
    assert (config.trials, config.max_hours) == (1, 8.5)
    write_config(config, make_space(config), folder)
    more = changed_config(load_search(folder), ["trials=2"])
    assert (more.trials, more.max_hours) == (2, 8.5)  # the folder has kept them
    assert changed_config(more, ["scoring.max_unparsed=0.5"]).scoring.max_unparsed == 0.5
    assert changed(place, "resume=auto", "max_hours=3", "scoring.max_unparsed=0.5") == []
    assert changed_config(more, ["trials=null"]).trials is None  # of a grid all
    with pytest.raises(ConfigError, match="trials=1, but this search has 2 already"):
        changed_config(more, ["trials=1"])
    with pytest.raises(ConfigError, match=r"'concurrency=2' cannot .*trials, max_hours, scoring.max_unparsed may"):
        resume_search(folder, ["concurrency=2"])


def test_trials_by_another_judge_or_engine_are_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(*overrides: str) -> dict[str, str]:
        return identity_of(prompts, str(place / "m"), configured(place, *overrides).scoring)

    (place / "m").mkdir()
    (place / "m" / "config.json").write_text("{}")
    table = PROMPTS.empty_table()
    prompts, folder = AskedPrompts(Prompts(table, "one"), Prompts(table, "other")), Place(place / "found")
    check_same(folder, shared())  # nothing was scored yet
    (folder / "search.json").write_json({"fingerprints": shared()})
    check_same(folder, shared())
    with pytest.raises(SearchError, match=r"the judge of search .* changed since it began \(refusal .* is now likelih"):
        check_same(folder, shared("scoring.judge=likelihood"))
    for name, fault in (("vllm", "the engine of"), ("mlc_ray", "the version of mlc_ray of")):
        versions = {**library_versions(), name: "99"}
        monkeypatch.setattr("mlc_ray.search.prepare.library_versions", lambda versions=versions: versions)
        with pytest.raises(SearchError, match=fault):
            check_same(folder, shared())


@pytest.mark.parametrize("answered", [None, "kept/pass-0/0123.parquet", "responses.parquet"])
def test_what_is_answered_of_the_baseline_stays_where_a_search_ends_before_its_trials(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answered: str | None
) -> None:
    folder = place / "again"

    def prepared(*_: Any) -> None:
        if answered is not None:
            (folder / "baseline" / answered).parent.mkdir(parents=True)
            (folder / "baseline" / answered).write_bytes(b"answers")
        raise KeyboardInterrupt

    monkeypatch.setattr("mlc_ray.search.run.check_search", lambda *_: None)
    monkeypatch.setattr("mlc_ray.search.run.prepare", prepared)
    monkeypatch.setattr("mlc_ray.search.checks.use_gpu", lambda _: False)
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda **_: "float32")
    with pytest.raises(KeyboardInterrupt):
        search(configured(place, "name=again"))
    stays = answered is not None
    assert (folder / "config.json").exists() is (folder / "base.yaml").exists() is stays
    assert (folder / "baseline").exists() is stays
    assert (f"search --resume {folder}" in caplog.text) is stays
    if answered is not None:  # and the search goes on with it
        assert (folder / "baseline" / answered).read_bytes() == b"answers"
        with pytest.raises(KeyboardInterrupt):
            monkeypatch.setattr("mlc_ray.search.run.prepare", lambda *_: prepared_again())
            resume_search(folder)


def prepared_again() -> None:
    raise KeyboardInterrupt


def test_a_search_keeps_its_log_where_its_runs_are_to_keep_theirs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*_: Any) -> None:
        logging.getLogger("mlc_ray.search.prepare").info("probe: layers are tried")
        raise ConfigError("the layers")

    monkeypatch.setattr("mlc_ray.search.run.check_search", lambda *_: None)
    monkeypatch.setattr("mlc_ray.search.run.prepare", prepared)
    monkeypatch.setattr("mlc_ray.search.checks.use_gpu", lambda _: False)
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda **_: "float32")
    for name, kept in (("quiet", "false"), ("told", "true")):
        config = configured(place, f"name={name}", f"set=[logging.json_lines={kept}, model.dtype=float32]")
        with pytest.raises(ConfigError, match="the layers"):
            search(config)
    assert not (place / "quiet" / "logs").exists()
    lines = [json.loads(line) for line in (place / "told" / "logs" / "driver.jsonl").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["probe: layers are tried", "ended by ConfigError: the layers"]
    assert {(line["run"], line["trial"], line["worker"]) for line in lines} == {("told", "", None)}
