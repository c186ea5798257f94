"""The commands. Each reads its settings, then calls one function of a room; torch and Ray are imported only there."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from mlc_ray import __version__
from mlc_ray.config import BundleFormat, ConfigError, ScoreConfig, TrainConfig, config_schema, load_config, parse_config
from mlc_ray.errors import MlcRayError

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C

_SETTINGS = """\
Settings come from the YAML file, then from each --set in order, e.g.
  --set mlc.layer=20 --set data.train.0.path=my.jsonl --set data.languages=[en,ur]
`mlc-ray config --schema` lists all of them.
"""
_BENCHMARKS = """\
A benchmark is a file, folder, hub name, or sample:test / sample:train (the shipped bundles), with two optional marks:
  --benchmark PATH                      format and kind are found in the data
  --benchmark PATH,kind=benign          kind of every prompt, for formats that do not record it
  --benchmark multi.csv,format=multijail,kind=harmful
A score has a harmful and a benign side: give prompts of both kinds, or the answer "how much more does the model refuse
what is harmful?" cannot be given.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake that the message explains, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except MlcRayError as error:
        cause = getattr(error, "cause", error)  # Ray hands on a worker's error wrapped in one of the same type
        print(f"mlc-ray: error: {cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlc-ray: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `mlc-ray config --schema | head`
        sys.stderr.close()
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; it imports no room, so `--help` costs nothing."""
    parser = argparse.ArgumentParser(
        prog="mlc-ray", description="Multilingual-consistency safety alignment on Ray: train, export, score."
    )
    parser.add_argument("--version", action="version", version=f"mlc-ray {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], None], text: str, more: str = "") -> Any:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=function)
        return sub

    train = add("train", train_command, "Align a model, or go on with a run that stopped.", _SETTINGS)
    _add_settings(train)
    train.add_argument(
        "--resume", metavar="RUN", type=Path, help="run folder to go on with; takes no --config or --set"
    )

    score = add("score", score_command, "Generate answers, judge them, count refusals.", f"{_BENCHMARKS}\n{_SETTINGS}")
    score.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint or exported folder, or a hub name")
    score.add_argument(
        "--benchmark", metavar="WHAT", action="append", default=[], help="prompts to score on; repeatable"
    )
    score.add_argument("--judge", metavar="NAME", help="judge of the answers (default: refusal)")
    score.add_argument("--limit", metavar="N", type=int, help="at most N bundles per benchmark and kind")
    score.add_argument("--languages", metavar="CODES", help="score only these, e.g. en,ur,sw (default: all)")
    score.add_argument("--output-dir", metavar="FOLDER", help="where score folders go (default: runs/scores)")
    _add_settings(score)

    export = add("export", export_command, "Write a run's model as a plain Hugging Face folder.")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    export.add_argument("--merge-lora", action="store_true", help="fold low-rank adapters into the weights")
    export.add_argument("--checkpoint", metavar="NAME", help="checkpoint of the run (default: the last complete one)")

    config = add("config", config_command, "Print the resolved settings, or the JSON schema.", _SETTINGS)
    _add_settings(config)
    config.add_argument(
        "--schema", nargs="?", const="train", choices=["train", "score"], help="print the JSON schema (default: train)"
    )
    config.add_argument("--for", dest="schema_of", choices=["train", "score"], default="train", help="kind of the file")

    quickstart = add("quickstart", quickstart_command, "Score, align, export and score SmolLM2-135M on the sample.")
    _add_settings(quickstart)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with the settings")
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", dest="overrides", action="append", default=[], help="change one; repeatable"
    )


# --------------------------------------------------------------------------------------------------- commands


def train_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray train`."""
    if arguments.resume is not None:
        given = [name for name, value in (("--config", arguments.config), ("--set", arguments.overrides)) if value]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} cannot go with --resume {arguments.resume}: a resumed run keeps its own "
                f"settings, {arguments.resume / 'config.yaml'}; start a new run to change them"
            )
        from mlc_ray.train.ray_train import load_run_config

        config = load_run_config(arguments.resume)
    elif arguments.config is None:
        raise ConfigError("train needs --config FILE (see configs/) or --resume RUN")
    else:
        config = load_config(TrainConfig, arguments.config, arguments.overrides)

    from mlc_ray.train.ray_train import train

    result = train(config, resume=arguments.resume)
    print(f"run         {result.run_folder}")
    print(f"checkpoint  {result.checkpoint}")
    print(f"to export   mlc-ray export {result.run_folder} OUT")
    print(f"to score    mlc-ray score {result.run_folder} --benchmark sample:test")


def score_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray score`."""
    config = score_config(arguments)

    from mlc_ray.score.ray_score import score

    score(config)


def score_config(arguments: argparse.Namespace) -> ScoreConfig:
    """The settings of a score: file, then --set, then the named options, which win."""
    overrides = list(arguments.overrides)
    if arguments.benchmark:
        overrides.append(f"benchmarks={json.dumps([parse_benchmark(text) for text in arguments.benchmark])}")
    languages = arguments.languages and [code.strip() for code in arguments.languages.split(",")]
    options = {
        "model": arguments.model,
        "judge": arguments.judge,
        "limit": arguments.limit,
        "languages": languages,
        "output_dir": arguments.output_dir,
    }
    overrides += [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(ScoreConfig, arguments.config, overrides)


def parse_benchmark(text: str) -> dict[str, str]:
    """`PATH[,format=F][,kind=K]` as a `SourceSection` mapping; raises `ConfigError` on an unknown mark."""
    allowed: dict[str, Sequence[str]] = {"format": get_args(BundleFormat), "kind": ("harmful", "benign")}
    path, *marks = text.split(",")
    source = {"path": path}
    for mark in marks:
        name, separator, value = mark.partition("=")
        if not separator or name not in allowed:
            raise ConfigError(f"--benchmark {text}: {mark!r} is neither format=... nor kind=...")
        if value not in allowed[name]:
            raise ConfigError(f"--benchmark {text}: {name}={value!r}, expected one of {', '.join(allowed[name])}")
        source[name] = value
    if not path:
        raise ConfigError(f"--benchmark {text!r}: the path is empty")
    return source


def export_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray export`."""
    from mlc_ray.train.checkpoint import export

    print(export(arguments.run, arguments.out, merge_lora=arguments.merge_lora, checkpoint=arguments.checkpoint))


def config_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray config`."""
    schemas: dict[Literal["train", "score"], type[TrainConfig] | type[ScoreConfig]] = {
        "train": TrainConfig,
        "score": ScoreConfig,
    }
    if arguments.schema is not None:
        if arguments.config is not None or arguments.overrides:
            raise ConfigError("--schema prints the schema alone; --config and --set print resolved settings instead")
        print(json.dumps(config_schema(schemas[arguments.schema]), indent=2))
        return
    if arguments.config is None and not arguments.overrides:
        raise ConfigError("config needs --schema, or --config FILE and --set FIELD=VALUE to resolve")
    import yaml

    resolved = load_config(schemas[arguments.schema_of], arguments.config, arguments.overrides)
    print(yaml.safe_dump(_written_out(resolved), sort_keys=False, allow_unicode=True), end="")


def _written_out(config: TrainConfig | ScoreConfig) -> dict[str, Any]:
    """All settings, defaults too, as a mapping that can be loaded again.

    A default that nothing reads beside the other settings (SimPO's margin beside DPO) would be refused if it were
    written out; it is left out.
    """
    given = config.model_dump(mode="json", exclude_unset=True)

    def keep(section: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        kept = {}
        for name, value in section.items():
            here = (*path, name)
            if isinstance(value, dict):
                kept[name] = keep(value, here)
            elif _accepts(type(config), given, here, value):
                kept[name] = value
        return kept

    return keep(config.model_dump(mode="json"), ())


def _accepts(
    schema: type[TrainConfig] | type[ScoreConfig], given: dict[str, Any], path: Sequence[str], value: Any
) -> bool:
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


def quickstart_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray quickstart`."""
    from mlc_ray.quickstart import run

    run(arguments.config, arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
