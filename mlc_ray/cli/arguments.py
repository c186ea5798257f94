"""What a command's arguments say, as settings."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from typing import Any

from mlc_ray.config import (
    CalibrationConfig,
    ConfigError,
    ModelSection,
    ScoreConfig,
    Section,
    SourceSection,
    TranslateConfig,
    UtilityConfig,
    apply_override,
    load_config,
    parse_config,
    read_config_file,
)

JUDGE_READS = ("judge", "calibration", "max_unparsed", "address", "env", "accelerator", "plan", "logging")
"""What `mlc-ray judge` reads of a score's settings: the rest was decided when the responses were made."""

PROBE_READS = ("dtype", "attention", "kernels", "trust_remote_code")
"""Settings of a run's `model` that a forward of the whole model reads."""


def refuse_settings(arguments: argparse.Namespace, what: str) -> None:
    """Refuse settings beside --resume: what is resumed keeps those that it was started with.

    Raises:
        ConfigError: Settings are given with --resume.
    """
    flags = {"config": "--config", "overrides": "--set", "model": "MODEL"}
    named = {flags.get(name, f"--{name.replace('_', '-')}"): value for name, value in vars(arguments).items()}
    given = [flag for flag, value in named.items() if value and flag not in ("--command", "--resume")]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} cannot go with --resume {arguments.resume}: a resumed {what} keeps its own "
            f"settings, which are in that folder; start a new {what} to change them"
        )


def score_config(arguments: argparse.Namespace) -> ScoreConfig:
    """The settings of a score: file, then --set, then the named options, which win."""
    overrides = list(arguments.overrides)
    if arguments.benchmark:
        overrides.append(f"benchmarks={json.dumps([parse_benchmark(text) for text in arguments.benchmark])}")
    languages = arguments.languages and [code.strip() for code in arguments.languages.split(",")]
    options = {
        "model": arguments.model,
        "judge.name": arguments.judge,
        "judge.model": arguments.judge_model,
        "limit": arguments.limit,
        "languages": languages,
    }
    if arguments.out is not None:
        options |= {"name": arguments.out.name, "output_dir": str(arguments.out.parent)}
    overrides += [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(ScoreConfig, arguments.config, overrides)


def calibration_config(arguments: argparse.Namespace) -> CalibrationConfig:
    """The settings of a calibration: file, then --set, then the named options, which win."""
    options = {
        "labelled": arguments.calibrate,
        "judge.name": arguments.judge,
        "judge.model": arguments.judge_model,
        "min_labels": arguments.min_labels,
        "out": None if arguments.out is None else str(arguments.out),
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(CalibrationConfig, arguments.config, [*arguments.overrides, *overrides])


def judge_changes(arguments: argparse.Namespace, scored: ScoreConfig) -> dict[str, Any]:
    """What is to differ from the settings of the score: by a file, then --set, then the named options.

    A judge of another name starts from its own defaults; otherwise the score's judge is changed field by field.

    Raises:
        ConfigError: Judging does not read one of the settings.
    """
    raw = {} if arguments.config is None else read_config_file(arguments.config)
    options = {"judge.name": arguments.judge, "judge.model": arguments.judge_model}
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    for override in [*arguments.overrides, *given]:
        apply_override(raw, override)
    if unread := sorted(set(raw) - set(JUDGE_READS)):
        raise ConfigError(
            f"{unread[0]}={raw[unread[0]]!r}: `mlc-ray judge` reads {', '.join(JUDGE_READS)} only; the responses are "
            "there already"
        )
    judge = raw.get("judge")
    if isinstance(judge, dict) and judge.get("name", scored.judge.name) == scored.judge.name:
        raw["judge"] = {**scored.judge.model_dump(mode="json", exclude_unset=True), **judge}
    base = scored.model_dump(mode="json", exclude_unset=True)
    resolved = parse_config(ScoreConfig, {**base, **raw})
    return {name: getattr(resolved, name) for name in raw}


def parse_benchmark(text: str, flag: str = "--benchmark") -> dict[str, str]:
    """`PATH[,format=F][,kind=K][,only=K]` as a `SourceSection` mapping.

    Raises:
        ConfigError: A part after the path is none of these.
    """
    kinds = ("harmful", "benign")
    allowed: dict[str, Sequence[str] | None] = {"format": None, "kind": kinds, "only": kinds}  # None: checked later
    path, *marks = text.split(",")
    source = {"path": path}
    for mark in marks:
        name, separator, value = mark.partition("=")
        if not separator or name not in allowed:
            raise ConfigError(f"{flag} {text}: {mark!r} is neither format=..., kind=... nor only=...")
        if (choices := allowed[name]) is not None and value not in choices:
            raise ConfigError(f"{flag} {text}: {name}={value!r}, expected one of {', '.join(choices)}")
        source[name] = value
    if not path:
        raise ConfigError(f"{flag} {text!r}: the path is empty")
    parse_config(SourceSection, source)
    return source


def utility_config(arguments: argparse.Namespace) -> UtilityConfig:
    """The settings of a utility run: file, then --set, then the named options, which win."""
    options = {
        "model": arguments.model,
        "tasks": arguments.tasks and [name.strip() for name in arguments.tasks.split(",")],
        "scores": arguments.scores,
        "limit": arguments.limit,
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(UtilityConfig, arguments.config, [*arguments.overrides, *overrides])


def translate_config(arguments: argparse.Namespace) -> TranslateConfig:
    """The settings of a translation: file, then --set, then the named options, which win."""
    options = {
        "sources": [parse_benchmark(text, "--bundles") for text in arguments.bundles] or None,
        "languages": arguments.languages and [code.strip() for code in arguments.languages.split(",")],
        "translator.model": arguments.translator,
        "limit": arguments.limit,
    }
    if arguments.out is not None:
        options |= {"name": arguments.out.name, "output_dir": str(arguments.out.parent)}
    overrides = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(TranslateConfig, arguments.config, [*arguments.overrides, *overrides])


def probe_model(path: str, overrides: Sequence[str]) -> ModelSection:
    """The model to look at.

    Raises:
        ConfigError: A probe does not read one of the settings.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override)
    if unread := sorted(set(raw) - set(PROBE_READS)):
        raise ConfigError(f"{unread[0]}={raw[unread[0]]!r}: `mlc-ray probe` reads {', '.join(PROBE_READS)} only")
    return parse_config(ModelSection, {**raw, "path": path})


def written_out(config: Section) -> dict[str, Any]:
    """All settings, defaults too, as a mapping that can be loaded again.

    A default that nothing reads beside the other settings would be refused if it were written out, and is left out:
    `reference` of a loss without one, `grace_scores` without a scheduler, vLLM's settings with `backend: hf`.
    """
    given = config.model_dump(mode="json", exclude_unset=True)

    def keep(section: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        kept = {}
        for name, value in section.items():
            here = (*path, name)
            if isinstance(value, dict) and value:
                if inner := keep(value, here):
                    kept[name] = inner
            elif accepts(type(config), given, here, value):
                kept[name] = value
        return kept

    return keep(config.model_dump(mode="json"), ())


def accepts(schema: type[Section], given: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    """Whether the settings `given` may have `value` at `path` beside them."""
    raw = copy.deepcopy(given)
    node = raw
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node.setdefault(path[-1], value)
    try:
        parse_config(schema, raw)
    except ConfigError:
        return False
    return True
