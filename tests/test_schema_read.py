"""No setting without a reader: every leaf field of the schemas, those of components too, is read in the package.

Who reads what is mypy's to say, which knows the type of every expression: see `attribute_reads`.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import mlc_ray.config
from mlc_ray._registry import names, resolve
from mlc_ray.config import (
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    Section,
    SimulationConfig,
    StudyConfig,
    TrainConfig,
    TranslateConfig,
    UtilityConfig,
)
from mlc_ray.config.component import ComponentSettings

PACKAGE = Path(mlc_ray.config.__file__).parent.parent
ROOTS = (
    TrainConfig,
    ScoreConfig,
    SearchConfig,
    StudyConfig,
    ScaleConfig,
    UtilityConfig,
    TranslateConfig,
    SimulationConfig,
)
Leaf = tuple[str, ...]
MYPY = """[mypy]
plugins = {plugin}
follow_imports = skip
check_untyped_defs = True
incremental = False
cache_dir = /dev/null
"""


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation is made of: through unions, lists, mappings and `Annotated`."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def leaves(*roots: type[Section]) -> set[Leaf]:
    """All fields that hold no section: each by its full name in each class that declares it, the last one first."""
    found: set[Leaf] = set()
    for root in roots:
        for name, field in root.model_fields.items():
            nested = sections_in(field.annotation)
            for mark in (item for item in field.metadata if isinstance(item, ComponentSettings)):
                own = [resolve(mark.kind, component).Settings for component in names(mark.kind)]
                nested += [settings for settings in own if mark.base is None or issubclass(settings, mark.base)]
            owners = [base for base in root.__mro__ if name in inspect.get_annotations(base)]
            leaf = tuple(f"{owner.__module__}.{owner.__qualname__}.{name}" for owner in owners)
            found |= leaves(*nested) if nested else {leaf}
    return found


def reads(package: Path, folder: Path) -> set[str]:
    """Full names of the attributes that code in `package` reads, but for its folder `config`."""
    (folder / "mypy.ini").write_text(MYPY.format(plugin=Path(__file__).parent / "attribute_reads.py"))
    log = folder / "reads.txt"
    log.touch()
    command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), package.name]
    environment = {**os.environ, "ATTRIBUTE_READS": str(log)}
    done = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: there are type errors, which lint is for
    lines = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]
    return {name for name, path in lines if "config" not in Path(path).parts}


@pytest.fixture(scope="module")
def read_in_package(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return reads(PACKAGE, tmp_path_factory.mktemp("reads"))


def test_every_field_is_read_somewhere(read_in_package: set[str]) -> None:
    unread = sorted(leaf[0] for leaf in leaves(*ROOTS) if not read_in_package.intersection(leaf))
    assert not unread, f"no code reads these settings: {', '.join(unread)}"


def test_the_schemas_are_walked_to_the_leaves() -> None:
    found = {leaf[0] for leaf in leaves(*ROOTS)}
    assert {
        "mlc_ray.config.model.LoraSection.rank",
        "mlc_ray.config.data.SourceSection.kind",
        "mlc_ray.config.objective.TermSettings.weight",
        "mlc_ray.losses.simpo.Simpo.Settings.margin",
        "mlc_ray.losses.mlc.Mlc.Settings.temperature",
        "mlc_ray.losses.variance.Variance.Settings.target_std",
        "mlc_ray.judges.endpoint.EndpointJudge.Settings.protocol",
        "mlc_ray.judges.guards.qwen3guard.Qwen3Guard.Settings.controversial",
        "mlc_ray.train.engines.deepspeed.DeepSpeed.Settings.stage",
        "mlc_ray.config.train.TrainConfig.seed",
    } <= found
    assert not {name for name in found if name.endswith((".objective", ".mlc", ".terms", ".data"))}


SMALL = {
    "config/schema.py": """
class Term:
    weight: float = 1.0
class Run:
    seed: int = 1
    depth: int = 1
    validated: int = 1
    terms: dict[str, Term] = {}
    sources: list["Source"] = []
    def check(self) -> int: return self.validated
class Source:
    path: str = ""
""",
    "use.py": """
from small.config.schema import Run, Source, Term
class Mine:
    class Settings(Term):
        tau: float = 1.0
        unread: float = 1.0
    settings: Settings
    def loss(self) -> float: return self.settings.tau
class Other:
    depth = unread = 1
def f(run: Run | None, other: Other, *, untyped):
    if run is not None:
        alias = run
        return alias.seed, [s.path for s in run.sources], other.depth
    return [t.weight for t in Run().terms.values()], untyped.unread
""",
}


def test_types_are_followed_not_names(tmp_path: Path) -> None:
    for name, source in SMALL.items():
        file = tmp_path / "small" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        (file.parent / "__init__.py").touch()
    found = reads(tmp_path / "small", tmp_path)
    assert {name.removeprefix("small.") for name in found if name.startswith("small.")} == {
        "use.Mine.settings", "use.Mine.Settings.tau", "use.Other.depth",
        "config.schema.Run.seed", "config.schema.Run.sources", "config.schema.Run.terms",
        "config.schema.Source.path", "config.schema.Term.weight",
    }  # fmt: skip
