"""A study as Markdown, as LaTeX tables, and as one HTML page by the report's templates."""

from __future__ import annotations

from pathlib import Path

from mlc_ray import __version__
from mlc_ray.report import palette
from mlc_ray.report.collect import ReportError
from mlc_ray.report.latex import latex
from mlc_ray.report.page import environment
from mlc_ray.report.study import StudyResult, facts_of, load_study, study_notes, study_tables
from mlc_ray.report.tables import escape, markdown
from mlc_ray.report.text import without_paths
from mlc_ray.runs import STUDY_LATEX, STUDY_TEXT
from mlc_ray.storage import Place


def study_markdown(result: StudyResult) -> str:
    """Notes, what the names stand for, and all tables."""
    lines = [f"# Study {escape(result.name)}", "", *(f"{escape(note)}\n" for note in study_notes(result))]
    lines += [*(f"- `{escape(name)}`: {escape(what)}" for name, what in facts_of(result)), ""]
    for shown in study_tables(result):
        lines += markdown(shown)
    return "\n".join(lines).rstrip() + "\n"


def study_latex(result: StudyResult) -> str:
    """All tables, to be included by a document that loads booktabs."""
    return "\n".join(line for shown in study_tables(result) for line in latex(shown)).rstrip() + "\n"


def render_study(result: StudyResult, *, public: bool = False) -> str:
    """The HTML page; `public` leaves out folders and hosts, as of other reports."""
    template = environment(public=public).get_template("study.html.j2")
    return template.render(
        study=result, notes=study_notes(result), names=facts_of(result), tables=study_tables(result),
        version=__version__, colours=palette.css_rules(),
    )  # fmt: skip


def write_study_report(
    folder: Place, *, samples: int = 0, paper: Path | None = None, public: bool = False
) -> tuple[str, list[Path]]:
    """The page of the study in a folder; for papers its Markdown and LaTeX tables go into `paper`.

    Returns:
        The page, and the files written.

    Raises:
        StudyFileError: The study has no results yet, or they are damaged.
        ReportError: Samples of responses are asked for, which a study's report does not show.
    """
    if samples:
        raise ReportError(
            f"--samples {samples}: a study's report shows no responses; report one of its cells, e.g. `mlc-ray report "
            f"{folder / 'cells'}/CELL --samples {samples}`"
        )
    result = load_study(folder)
    page = render_study(result, public=public)
    if paper is None:
        return page, []
    paper.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in ((STUDY_TEXT, study_markdown(result)), (STUDY_LATEX, study_latex(result))):
        (paper / name).write_text(without_paths(text) if public else text, encoding="utf-8")
        written.append(paper / name)
    return page, written
