"""`mlc-ray search`, `study` and `scale`: many runs, in one folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from mlc_ray.cli.arguments import refuse_settings
from mlc_ray.config import ConfigError, ScaleConfig, SearchConfig, StudyConfig, load_config

if TYPE_CHECKING:
    from mlc_ray.report.study import StudyResult
    from mlc_ray.search.results import SearchResult


def search_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray search`."""
    if arguments.resume is not None:
        if arguments.config is not None:
            refuse_settings(arguments, "search")
        from mlc_ray.search.run import resume_search

        _show_search(resume_search(arguments.resume, arguments.overrides))
        return
    if arguments.config is None:
        raise ConfigError("search needs --config FILE (see configs/search/) or --resume FOLDER")
    config = load_config(SearchConfig, arguments.config, arguments.overrides)

    from mlc_ray.search.run import search

    _show_search(search(config))


def _show_search(result: SearchResult) -> None:
    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.search.results import confirmation_table, trials_table, verdict

    for shown in (trials_table(result), confirmation_table(result)):
        if shown is not None:
            show(console(shown))
    for line in verdict(result):
        print(line)


def study_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray study`.

    Raises:
        DoesNotFitError: With `--budget`: what the study needs is known not to fit; the budget is printed all the same.
    """
    _check_budget(arguments)
    if arguments.resume is not None:
        refuse_settings(arguments, "study")
        from mlc_ray.study.run import resume_study

        _show_study(resume_study(arguments.resume))
        return
    if arguments.config is None:
        raise ConfigError("study needs --config FILE (see configs/study/) or --resume FOLDER")
    config = load_config(StudyConfig, arguments.config, arguments.overrides)
    if arguments.budget:
        _study_budget(arguments, config)
        return

    from mlc_ray.study.run import study

    _show_study(study(config))


def _check_budget(arguments: argparse.Namespace) -> None:
    """Refuse options that go with `--budget` alone, and it where a study goes on.

    Raises:
        ConfigError: There are some, or what says which GPUs is there without `--gpus`.
    """
    if arguments.budget and arguments.resume is not None:
        raise ConfigError(
            f"--budget cannot go with --resume {arguments.resume}: it is stated of a study's file; give --config FILE"
        )
    from mlc_ray.cli.plan import named_cluster

    if named_cluster(arguments) is not None and not arguments.budget:
        raise ConfigError(f"--gpus {arguments.gpus} is read with --budget only: a study runs on the cluster it joins")
    if arguments.json and not arguments.budget:
        raise ConfigError("--json is read with --budget only; what a study found is in its folder as results.json")


def _study_budget(arguments: argparse.Namespace, config: StudyConfig) -> None:
    from mlc_ray.cli.plan import DoesNotFitError, named_cluster
    from mlc_ray.report.console import show
    from mlc_ray.report.tables import console
    from mlc_ray.study.budget_tables import study_budget_json, study_budget_lines, study_budget_tables
    from mlc_ray.study.cell_budget import study_budget

    budget = study_budget(config, named_cluster(arguments))
    if arguments.json:
        print(json.dumps(study_budget_json(budget), indent=2))
    else:
        for shown in study_budget_tables(budget):
            show(console(shown))
        print("\n".join(study_budget_lines(budget)))
    if not budget.fits:
        raise DoesNotFitError("it does not fit; what lacks is in the budget that was printed")


def scale_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray scale`."""
    _check_budget(arguments)
    if arguments.resume is not None:
        refuse_settings(arguments, "study")
        from mlc_ray.study.scale import resume_scale

        _show_study(resume_scale(arguments.resume))
        return
    if arguments.config is None:
        raise ConfigError("scale needs --config FILE (see configs/study/) or --resume FOLDER")
    config = load_config(ScaleConfig, arguments.config, arguments.overrides)

    from mlc_ray.study.scale import scale, scale_budget

    if arguments.budget:
        from mlc_ray.cli.plan import DoesNotFitError, named_cluster
        from mlc_ray.report.console import show
        from mlc_ray.report.scale import budget_notes, budget_table
        from mlc_ray.report.tables import console

        budget = scale_budget(config, named_cluster(arguments))
        if arguments.json:
            print(json.dumps([asdict(each) for each in budget], indent=2))
        else:
            show(console(budget_table(budget, notes=False)))
            print("\n".join(budget_notes(budget)))
        if any(each.fault for each in budget):
            raise DoesNotFitError("it does not fit; what lacks is in the budget that was printed")
        return
    _show_study(scale(config))


def _show_study(result: StudyResult) -> None:
    from mlc_ray.report.console import show
    from mlc_ray.report.study import study_notes, study_tables
    from mlc_ray.report.tables import console

    for shown in study_tables(result):
        show(console(shown))
    for note in study_notes(result):
        print(note)
    print(f"study in {result.folder}")
