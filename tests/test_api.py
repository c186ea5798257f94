"""The package as a library: what `import mlc_ray` costs and offers."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mlc_ray
from mlc_ray import api, errors
from mlc_ray.config import ScoreConfig, TrainConfig
from mlc_ray.errors import MlcRayError

HEAVY = ("torch", "ray", "pydantic", "numpy", "yaml", "transformers", "pyarrow", "deepspeed", "vllm")


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    code = f"""
import sys, time
start = time.perf_counter()
import mlc_ray
print(time.perf_counter() - start, [name for name in {HEAVY!r} if name in sys.modules])
"""
    seconds = []
    for _ in range(5):  # the fastest counts: others are other processes'
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        taken, _, loaded = said.strip().partition(" ")
        assert loaded == "[]"
        seconds.append(float(taken))
    assert min(seconds) < 0.05


def test_every_public_name_is_there_and_is_the_one_of_its_module() -> None:
    from mlc_ray.losses.mlc import mlc_loss
    from mlc_ray.types import Bundle, Verdict

    assert set(mlc_ray.__all__) <= set(dir(mlc_ray))
    for name in mlc_ray.__all__:
        assert getattr(mlc_ray, name) is not None
    assert (mlc_ray.mlc_loss, mlc_ray.Bundle, mlc_ray.Verdict) == (mlc_loss, Bundle, Verdict)
    assert mlc_ray.errors is errors
    assert mlc_ray.MlcRayError is MlcRayError
    with pytest.raises(AttributeError, match=r"'mlc_ray' has no attribute 'mcl_loss'"):
        mlc_ray.mcl_loss  # noqa: B018


def test_every_error_that_a_user_can_cause_is_reachable_by_its_name() -> None:
    for module in pkgutil.walk_packages(mlc_ray.__path__, "mlc_ray."):
        if module.name != "mlc_ray.__main__":
            importlib.import_module(module.name)

    def below(base: type[MlcRayError]) -> set[type[MlcRayError]]:
        return {found for child in base.__subclasses__() for found in {child, *below(child)}}

    ours = {error for error in below(MlcRayError) if error.__module__.startswith("mlc_ray.")}
    assert len(ours) > 30
    for error in ours:
        assert getattr(errors, error.__name__) is error, f"{error} is hidden by another class of its name"
        assert error.__name__ in dir(errors)
    with pytest.raises(AttributeError, match="NoSuchError"):
        errors.NoSuchError  # noqa: B018


def test_the_functions_are_imported_without_what_they_run_on() -> None:
    code = (
        "import sys; from mlc_ray import api; print([n for n in ('torch', 'ray', 'vllm', 'numpy') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("as_file", [True, False])
def test_settings_are_a_mapping_or_a_file_with_overrides(as_file: bool, tmp_path: Path) -> None:
    raw: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    given: Any = tmp_path / "run.yaml" if as_file else raw
    settings = api._settings(TrainConfig, given, ["mlc.layer=20", "model.dtype=float32"])
    assert (settings.mlc.layer, settings.data.train[0].path) == (20, "d")
    assert api._settings(TrainConfig, settings, ["seed=1"]).seed == 1
    # the caller's is not touched
    assert raw == {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    with pytest.raises(errors.ConfigError, match=r"mlc\.lair=1: no such field"):
        api.train(given, overrides=["mlc.lair=1"])


def test_the_packages_docstring_names_all_that_is_in_it() -> None:
    said = str(mlc_ray.__doc__)
    for module in pkgutil.iter_modules(mlc_ray.__path__):
        name = module.name
        if not name.startswith("__"):
            assert f"{name}/" in said or f"{name}.py" in said or f"`{name}`" in said, name


def test_mistakes_of_each_function_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="benchmarks: required"):
        api.score({"model": "m"})
    with pytest.raises(errors.ModelPathError, match="does not exist"):
        api.score({"model": str(tmp_path / "none"), "benchmarks": [{"path": "sample:test"}]})
    with pytest.raises(errors.ConfigError, match="path='ftp://b': ftp:// cannot be opened"):
        api.probe("ftp://b", ["sample:train"])
    with pytest.raises(errors.OutputFolderError, match="out='ftp:/b'"):
        api.probe("m", ["sample:train"], out=Path("ftp://b"))
    with pytest.raises(errors.ConfigError, match=r"bundles are given, and so is data\.train"):
        api.train({"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}, bundles=[])


RESUMED = [
    (api.train, errors.RunError, "is not a run folder"),
    (api.score, errors.ScoreError, "is not a score folder"),
    (api.search, errors.SearchError, "is not a search folder"),
    (api.study, errors.StudyError, "is not a study folder"),
    (api.scale, errors.StudyError, "is not the folder of a scaling study"),
    (api.translate, errors.TranslationError, "is no translation"),
]


@pytest.mark.parametrize(("function", "error", "said"), RESUMED, ids=lambda value: getattr(value, "__name__", ""))
def test_each_function_takes_settings_or_a_folder_to_go_on_with(
    function: Callable[..., object], error: type[errors.MlcRayError], said: str, tmp_path: Path
) -> None:
    for given in ({}, {"config": {}, "resume": tmp_path}):
        with pytest.raises(errors.ConfigError, match="one of them, not both"):
            function(**given)
    with pytest.raises(error, match=said):
        function(resume=tmp_path)
    if function in (api.train, api.score, api.translate):
        with pytest.raises(errors.ConfigError, match="bundles cannot go with resume"):
            function(resume=tmp_path, bundles=[])
    if function not in (api.train, api.search):
        with pytest.raises(errors.ConfigError, match="cannot go with resume"):
            function(resume=tmp_path, overrides=["seed=1"])


def test_bundles_in_memory_are_the_data(tmp_path: Path) -> None:
    bundles = [{"kind": "benign", "prompts": {"en": "Hello", "sw": "Habari"}, "chosen": "Hi.", "rejected": "No."}]
    run = {"name": "r", "model": {"path": "m"}, "output_dir": str(tmp_path), "data": {"languages": ["en"]}}
    settings = api._settings(TrainConfig, run, ["seed=1"], bundles, ("data", "train"))
    (source,) = settings.data.train
    assert Path(source.path).parent == tmp_path / "cache"
    assert json.loads(Path(source.path).read_text())["prompts"] == {"en": "Hello", "sw": "Habari"}
    assert (settings.data.languages, settings.seed) == (["en"], 1)
    assert "train" not in run["data"]
    score = {"model": "m", "output_dir": str(tmp_path)}
    assert api._settings(ScoreConfig, score, (), bundles, ("benchmarks",)).benchmarks[0].path == source.path
