"""`mlc-ray search`, `study` and `scale`: many runs, in one folder."""

from __future__ import annotations

import argparse
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
    """`mlc-ray study`."""
    if arguments.resume is not None:
        refuse_settings(arguments, "study")
        from mlc_ray.study.run import resume_study

        _show_study(resume_study(arguments.resume))
        return
    if arguments.config is None:
        raise ConfigError("study needs --config FILE (see configs/study/) or --resume FOLDER")
    config = load_config(StudyConfig, arguments.config, arguments.overrides)

    from mlc_ray.study.run import study

    _show_study(study(config))


def scale_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray scale`."""
    if arguments.resume is not None:
        refuse_settings(arguments, "study")
        from mlc_ray.study.scale import resume_scale

        _show_study(resume_scale(arguments.resume))
        return
    if arguments.config is None:
        raise ConfigError("scale needs --config FILE (see configs/study/) or --resume FOLDER")
    config = load_config(ScaleConfig, arguments.config, arguments.overrides)

    from mlc_ray.cli.plan import named_cluster
    from mlc_ray.study.scale import scale, scale_budget

    cluster = named_cluster(arguments)
    if arguments.budget:
        from mlc_ray.report.console import show
        from mlc_ray.report.scale import budget_table
        from mlc_ray.report.tables import console

        show(console(budget_table(scale_budget(config, cluster))))
        return
    if cluster is not None:
        raise ConfigError(f"--gpus {arguments.gpus} is read with --budget only: a study runs on the cluster it joins")
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
