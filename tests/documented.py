"""What a documented command or block of settings must pass: the loader of its own command, with all that it checks."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mlc_ray.cli import arguments as given
from mlc_ray.cli.commands import SCHEMAS, parse_openings
from mlc_ray.config import (
    ChatSection,
    ConfigError,
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    Section,
    SimulationConfig,
    SourceSection,
    StudyConfig,
    TrainConfig,
    load_config,
    parse_config,
    parse_yaml,
)
from mlc_ray.errors import MlcRayError
from mlc_ray.report.rules import parse_rule
from mlc_ray.storage import Place

REPOSITORY = Path(__file__).resolve().parent.parent
_SCORED = {"benchmarks": [{"path": "sample:select"}]}
_TRAINED = {"data": {"train": [{"path": "sample:train"}]}}
_SPACE = {"mlc.layer": {"choice": [0.5, "last"]}, "mlc.weight": {"choice": [0.4, 0.8]}}
_SEARCHED = {"space": _SPACE, "sampler": "grid", "scoring": _SCORED}
LEAST: dict[str, dict[str, Any]] = {
    "train": {"name": "x", "model": {"path": "m"}, **_TRAINED, "terms": {"decision": {}}},  # which reads `openings`
    "score": {"model": "m", **_SCORED},
    "search": {"name": "x", "train": "recipe:quickstart", **_SEARCHED},
    "study": {
        "name": "x", "models": {"m": {"path": "m"}}, "methods": {"dpo": ["mlc.weight=0"], "mlc": []}, "seeds": [1],
        "train": _TRAINED, "scoring": _SCORED,
    },
    "scale": {"name": "x", "sizes": {"a": {}}, "train": "recipe:quickstart", "search": _SEARCHED},
    "utility": {"model": "m", "tasks": ["mmlu"]},
    "translate": {"name": "x", "sources": [{"path": "b.jsonl"}], "languages": ["zh"], "translator": {"model": "t"}},
    "judge --calibrate": {"labelled": ["l.jsonl"]},
    "plan --simulate": {
        "gpus": 8, "bundles": 1000, "step_seconds": 1, "state_gb": 1, "model_gb": 1, "storage_gb_per_second": 1,
    },
}  # fmt: skip
"""The least that a file of each command's settings must hold: a documented one of the user's own is not there."""
OTHERS = {"jobs", "scrape_configs"}
"""Keys of YAML that is another program's: a workflow of a CI, and what Prometheus reads."""


def schemas() -> dict[str, type[Section]]:
    """The settings of every command that has some, by its name."""
    found, waiting = dict[str, type[Section]](), [Section]
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        if each.command is not None and each.__module__.startswith("mlc_ray."):
            found[each.command] = each
    return found


def check_settings(config: Section, folder: Path) -> None:
    """What validates only when a command begins: the runs of a search, of a study, and of a scaling study."""
    if isinstance(config, SearchConfig):
        from mlc_ray.search.space import make_space

        make_space(config)
    elif isinstance(config, StudyConfig):
        from mlc_ray.study.cells import make_cells

        make_cells(config)
    elif isinstance(config, ScaleConfig):
        from mlc_ray.study.searches import make_searches

        make_searches(config, Place(folder))


# ------------------------------------------------------------------------------------------------------------- commands


def check_command(arguments: argparse.Namespace, folder: Path) -> None:
    """Load the settings of a parsed command as the command does; one of the user's own files holds `LEAST`.

    Raises:
        MlcRayError: A setting, a rule or a benchmark is none, or options do not go together.
    """
    command = arguments.command.removesuffix("_command")
    if command in LOADERS:
        resumes = getattr(arguments, "resume", None) is not None
        if resumes and command not in ("train", "search"):  # whose --set may change some settings of their own
            given.refuse_settings(arguments, command)
            return
        own = getattr(arguments, "config", None)
        if resumes or own is not None:
            kind = getattr(arguments, "kind", None) or getattr(arguments, "schema_of", command)
            arguments.config = shipped(own) or written(
                LEAST["train" if kind in ("plan", "quickstart") else kind], folder
            )
        config = LOADERS[command](arguments)
        if config is not None:
            check_settings(config, folder)
    else:
        assert command in WITHOUT_SETTINGS, f"mlc-ray {command}: nothing says how its settings are loaded"
        for rule in getattr(arguments, "fail_if", ()):
            parse_rule(rule)


def shipped(file: Path | None) -> Path | None:
    """The file if it comes with the package, by its name, from the repository or from an image's copy of it."""
    if file is None or str(file).startswith("recipe:"):
        return file
    found = file.relative_to("/mlc_ray") if file.is_relative_to("/mlc_ray") else file
    if found.parts[0] != "configs":
        return None
    assert (REPOSITORY / found).is_file(), f"there is no {found}"
    return REPOSITORY / found


def written(settings: dict[str, Any], folder: Path) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def _of(schema: type[Section]) -> Callable[[argparse.Namespace], Section]:
    return lambda arguments: load_config(schema, arguments.config, arguments.overrides)


def _plan(arguments: argparse.Namespace) -> Section:
    if arguments.simulate is not None:
        return load_config(SimulationConfig, shipped(arguments.simulate), arguments.overrides)
    kind = arguments.kind or "train"
    defaults = {"model": "m"} if kind == "score" else None  # which `--shape` may name instead
    return load_config(SCHEMAS[kind], arguments.config, arguments.overrides, defaults=defaults)


def _judge(arguments: argparse.Namespace) -> Section | None:
    if arguments.calibrate:
        return given.calibration_config(arguments)
    given.judge_changes(arguments, parse_config(ScoreConfig, LEAST["score"]))
    return None


def _probe(arguments: argparse.Namespace) -> Section:
    for text in arguments.bundles:
        parse_config(SourceSection, given.parse_benchmark(text))
    if arguments.chat is not None:
        parse_config(ChatSection, parse_yaml(arguments.chat, "--chat"))
    if arguments.openings is not None and not arguments.openings.endswith(".yaml"):
        parse_openings(arguments.openings)
    return given.probe_model(arguments.model, arguments.overrides)


def _config(arguments: argparse.Namespace) -> Section | None:
    if arguments.schema is not None:
        return None
    return load_config(SCHEMAS[arguments.schema_of], arguments.config, arguments.overrides)


LOADERS: dict[str, Callable[[argparse.Namespace], Section | None]] = {
    "train": _of(TrainConfig),
    "score": given.score_config,
    "judge": _judge,
    "search": _of(SearchConfig),
    "study": _of(StudyConfig),
    "scale": _of(ScaleConfig),
    "probe": _probe,
    "translate": given.translate_config,
    "utility": given.utility_config,
    "plan": _plan,
    "config": _config,
    "quickstart": lambda arguments: load_config(
        TrainConfig, arguments.config or "recipe:quickstart", arguments.overrides
    ),
}
WITHOUT_SETTINGS = {"compare", "doctor", "export", "openings", "report", "show"}


# --------------------------------------------------------------------------------------------------------------- blocks


def accepting(text: str, folder: Path) -> list[str]:
    """The commands whose settings the YAML of a block are, alone or beside the `LEAST` of a file.

    Raises:
        ConfigError: They are those of none; the message has what each command whose fields they have says.
    """
    raw = parse_yaml(text, "block")
    found, faults = [], []
    for command, schema in _with_fields(raw):
        try:
            check_settings(parse_config(schema, {**copy.deepcopy(LEAST[command]), **raw}), folder)
        except MlcRayError as error:
            faults.append(f"{command}: {error}")
        else:
            found.append(command)
    if not found:
        raise ConfigError("\n".join(faults) or f"no command has settings called {', '.join(raw)}")
    return found


def _with_fields(raw: dict[str, Any]) -> Iterator[tuple[str, type[Section]]]:
    for command, schema in schemas().items():
        if raw.keys() <= schema.model_fields.keys():
            yield command, schema
