"""`resume: auto` of a search: what it takes for the same search, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import ConfigError, SearchConfig, load_config
from mlc_ray.search.run import _write_settings, changed_settings, search
from mlc_ray.search.space import make_space, with_commits
from mlc_ray.search.trial import SearchError
from mlc_ray.storage import Place


@pytest.fixture
def place(tmp_path: Path) -> Path:
    run: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "sample:train"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    searched = {
        "name": "found", "output_dir": str(tmp_path), "train": str(tmp_path / "run.yaml"), "sampler": "grid",
        "space": {"mlc.layer": {"choice": [1, "last"]}}, "scoring": {"benchmarks": [{"path": "sample:test"}]},
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(searched))
    config = configured(tmp_path, "scoring.engine.dtype=float32", "set=[model.dtype=float32]")
    _write_settings(config, make_space(config), Place(tmp_path / "found"))
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


def test_a_name_of_the_hub_is_the_same_at_the_commit_that_was_noted(place: Path) -> None:
    def named(name: str) -> str:
        return f"set=['data.train=[{{path: \"{name}\"}}]', model.dtype=float32]"

    commit, other = "c" * 40, "d" * 40
    config = configured(place, "scoring.engine.dtype=float32", named(f"owner/name#{commit}"))
    _write_settings(config, with_commits(make_space(config)), Place(place / "found"))
    assert changed(place, named("owner/name")) == changed(place, named(f"owner/name#{commit}")) == []
    for another in (f"owner/name#{other}", "owner/another"):
        (difference,) = changed(place, named(another))
        assert commit in difference and another in difference


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
