"""What each command does: it reads its settings, then calls one function of a package, which imports torch and Ray."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlc_ray.cli.arguments import (
    calibration_config,
    judge_changes,
    parse_benchmark,
    probe_model,
    refuse_settings,
    score_config,
    translate_config,
    utility_config,
    written_out,
)
from mlc_ray.cli.searching import scale_command as scale_command
from mlc_ray.cli.searching import search_command as search_command
from mlc_ray.cli.searching import study_command as study_command
from mlc_ray.config import (
    ChatSection,
    ConfigError,
    OpeningsSection,
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    SimulationConfig,
    SourceSection,
    StudyConfig,
    TrainConfig,
    TranslateConfig,
    UtilityConfig,
    config_schema,
    dump_yaml,
    load_config,
    parse_config,
    parse_yaml,
    read_config_file,
)

if TYPE_CHECKING:
    from mlc_ray.score.results import ScoreResult

SCHEMAS: dict[
    str,
    type[TrainConfig]
    | type[ScoreConfig]
    | type[SearchConfig]
    | type[StudyConfig]
    | type[ScaleConfig]
    | type[UtilityConfig]
    | type[TranslateConfig]
    | type[SimulationConfig],
] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "search": SearchConfig,
    "study": StudyConfig,
    "scale": ScaleConfig,
    "utility": UtilityConfig,
    "translate": TranslateConfig,
    "simulation": SimulationConfig,
}
"""The kinds of config files; `cli.SCHEMAS` has their names."""


def train_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray train`."""
    if arguments.resume is not None:
        if arguments.config is not None:
            raise ConfigError(
                f"--config cannot go with --resume {arguments.resume}: a resumed run keeps its own settings, which are "
                "in that folder; change those that may change by --set, or start a new run"
            )
        from mlc_ray.train.run_folder import load_run_config

        config = load_run_config(arguments.resume, arguments.overrides)
    elif arguments.config is None:
        raise ConfigError("train needs --config FILE (see configs/) or --resume FOLDER")
    else:
        config = load_config(TrainConfig, arguments.config, arguments.overrides)

    from mlc_ray.train.run import train

    result = train(config, resume=arguments.resume)
    print(f"run         {result.run_folder}")
    print(f"checkpoint  {result.checkpoint}")
    print(f"to export   mlc-ray export {result.run_folder} OUT")
    merge = "" if config.model.lora is None else f"mlc-ray export {result.run_folder} OUT --merge-lora && "
    print(f"to score    {merge}mlc-ray score {'OUT' if merge else result.run_folder} --benchmark sample:test")


def score_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray score`."""
    if arguments.resume is not None:
        refuse_settings(arguments, "score")
        from mlc_ray.score.run import resume_score

        _show_score(lambda: resume_score(arguments.resume))
        return
    config = score_config(arguments)

    from mlc_ray.score.run import score

    _show_score(lambda: score(config))


def _show_score(make: Callable[[], ScoreResult]) -> None:
    """Print the tables of a score and draw its heat map; also of one of which too much is unparsed, before it fails."""
    from mlc_ray.report.console import score_tables, show
    from mlc_ray.report.figures import scores_png
    from mlc_ray.runs import HEATMAP_FILE
    from mlc_ray.score.run import TooManyUnparsedError

    failure = None
    try:
        result = make()
    except TooManyUnparsedError as error:
        if error.result is None:
            raise
        result, failure = error.result, error
    scores_png([result], result.folder / HEATMAP_FILE)
    show(score_tables(result))
    print(f"score in {result.folder}")
    if failure is not None:
        raise failure


def judge_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray judge`."""
    if (arguments.scored is None) == (not arguments.calibrate):
        raise ConfigError(
            "judge needs either SCORE, to judge it again, or --calibrate LABELLED, before each of several "
            "(--calibrate A --calibrate B); see `mlc-ray judge -h`"
        )
    if arguments.calibrate:
        _calibrate(arguments)
        return
    if arguments.min_labels is not None:
        raise ConfigError("--min-labels is read with --calibrate only; remove it")
    from mlc_ray.score.request import load_request
    from mlc_ray.score.run import judge_again

    changes = judge_changes(arguments, load_request(arguments.scored).config)
    _show_score(lambda: judge_again(arguments.scored, out=arguments.out, **changes))


def _calibrate(arguments: argparse.Namespace) -> None:
    config = calibration_config(arguments)

    from mlc_ray.report.calibration import errors_table
    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.score.calibrate import calibrate

    found, file = calibrate(config)
    show(console(errors_table(found)))
    print(f"calibration in {file}; to correct rates by it: mlc-ray score ... --set calibration={file}")


def utility_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray utility`."""
    config = utility_config(arguments)

    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.report.utility import utility_table
    from mlc_ray.runs import UTILITY_FILE
    from mlc_ray.utility.run import measure_utility

    utility = measure_utility(config)
    asked = utility_table({utility.model: [row for row in utility.rows if row.task in config.tasks]})
    if asked is not None:  # a group's own tasks may be all that the harness gives
        show(console(asked))
    print(f"utility in {utility.folder / UTILITY_FILE}")


def probe_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray probe`."""
    sources = [parse_config(SourceSection, parse_benchmark(text)) for text in arguments.bundles]
    settings = probe_model(arguments.model, arguments.overrides)
    languages = arguments.languages and [code.strip() for code in arguments.languages.split(",")]

    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.runs import model_name, output_place
    from mlc_ray.search.probe import probe, probe_table

    default = Path("runs") / "probes" / model_name(arguments.model)
    folder = output_place(str(arguments.out or default), setting="--out")
    found = probe(
        settings,
        sources,
        folder,
        chat=None if arguments.chat is None else parse_config(ChatSection, parse_yaml(arguments.chat, "--chat")),
        languages=languages,
        limit=arguments.limit,
        criterion=arguments.criterion,
        openings=None if arguments.openings is None else parse_openings(arguments.openings),
        address=arguments.address,
    )
    show(console(probe_table(found, reversed(range(len(found.layers))))))
    if found.decisions or found.left_out:
        show(console(found.decision_table))
    print(f"probe in {folder}")


def openings_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray openings`."""
    out: Path = arguments.out
    if out.exists():
        raise ConfigError(f"--out {out}: it exists already; remove it, or give another file")

    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.storage import atomic_file
    from mlc_ray.translate.openings import as_settings, openings, openings_table

    found = openings(arguments.responses, most=arguments.most)
    with atomic_file(out) as file:
        file.write(as_settings(found).encode())
    show(console(openings_table(found)))
    print(f"openings in {out}; put the section into the settings of a run, or probe by it: --openings {out}")


def parse_openings(text: str) -> OpeningsSection:
    """`--openings`: YAML, or a file of `mlc-ray openings`.

    Raises:
        ConfigError: It is neither.
    """
    if text.endswith((".yaml", ".yml")) and "{" not in text:
        raw = read_config_file(Path(text))
        if set(raw) != {"openings"}:
            raise ConfigError(
                f"--openings {text}: expected the section `openings` alone, as `mlc-ray openings` writes it"
            )
        return parse_config(OpeningsSection, raw["openings"])
    return parse_config(OpeningsSection, parse_yaml(text, "--openings"))


def translate_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray translate`."""
    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.translate.quality import summary, tables

    if arguments.resume is not None:
        refuse_settings(arguments, "translation")
        from mlc_ray.translate.run import resume_translation

        made = resume_translation(arguments.resume)
    else:
        config = translate_config(arguments)

        from mlc_ray.translate.run import plan, translate

        if arguments.plan:
            print("\n".join(plan(config).lines()))
            return
        made = translate(config)
    for each in tables(made.quality):
        show(console(each))
    print(summary(made.quality))
    print(f"bundles in {made.bundles}")


def plan_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray plan`."""
    from mlc_ray.cli.plan import plan_command as plan

    plan(arguments)


def export_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray export`."""
    from mlc_ray.train.export import export

    made = export(
        arguments.run,
        arguments.out,
        merge_lora=arguments.merge_lora,
        checkpoint=arguments.checkpoint,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(made)


def report_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray report`."""
    from mlc_ray.report.write import write_report

    written = write_report(
        arguments.runs, arguments.out, paper=arguments.paper, samples=arguments.samples, public=arguments.public,
        redact=arguments.redact,
    )  # fmt: skip
    for path in written:
        print(path)


def compare_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray compare`."""
    from mlc_ray.report.compare import as_json, check_json, compare_scores, comparison_tables, require
    from mlc_ray.report.console import show
    from mlc_ray.report.rules import parse_rule

    rules = [parse_rule(text) for text in arguments.fail_if]
    if arguments.json is not None:
        check_json(arguments.json)
    one_sided = [code.strip() for code in arguments.one_sided.split(",")] if arguments.one_sided else []
    compared = compare_scores(arguments.before, arguments.after, rules, one_sided=one_sided)
    show(comparison_tables(compared))
    if arguments.json is not None:
        arguments.json.write_json(as_json(compared))
    require(compared)


def show_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray show`."""
    from mlc_ray.show import show

    print(show(arguments.folder))


def config_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray config`."""
    if arguments.schema is not None:
        if arguments.config is not None or arguments.overrides:
            raise ConfigError("--schema prints the schema alone; --config and --set print resolved settings instead")
        print(json.dumps(config_schema(SCHEMAS[arguments.schema]), indent=2))
        return
    if arguments.config is None and not arguments.overrides:
        raise ConfigError("config needs --schema, or --config FILE and --set FIELD=VALUE to resolve")
    resolved = load_config(SCHEMAS[arguments.schema_of], arguments.config, arguments.overrides)
    if isinstance(resolved, SearchConfig):
        from mlc_ray.search.space import make_space

        make_space(resolved)  # the runs too must be valid
    if isinstance(resolved, StudyConfig):
        from mlc_ray.study.cells import make_cells

        make_cells(resolved)
    if isinstance(resolved, ScaleConfig):
        from mlc_ray.study.scale import scale_folder
        from mlc_ray.study.searches import make_searches

        make_searches(resolved, scale_folder(resolved))
    print(dump_yaml(written_out(resolved)), end="")


def doctor_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray doctor`."""
    from mlc_ray.doctor import check, doctor

    found = doctor(arguments.output_dir, address=arguments.address)
    print(*found, sep="\n")
    check(found)


def quickstart_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray quickstart`."""
    from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2, run
    from mlc_ray.storage import user_cache

    if arguments.only_model:
        print(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
        return
    run(arguments.config, arguments.overrides)
