"""`mlc-ray report`: read the runs, write the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mlc_ray.report.collect import ReportError, collect
from mlc_ray.report.page import render
from mlc_ray.report.study_pages import write_study_report
from mlc_ray.runs import kind_of, output_folder
from mlc_ray.storage import Place

DEFAULT_FILE = "report.html"


def write_report(
    runs: Sequence[str | Path | Place],
    out: str | Path = DEFAULT_FILE,
    *,
    paper: str | Path | None = None,
    samples: int = 0,
    public: bool = False,
    redact: bool = False,
) -> list[Path]:
    """Write the HTML report of `runs` to `out`, replacing an older one, and for papers `report.md` and PNGs to `paper`.

    Args:
        runs: Run folders, score folders, or folders of those; or a study, alone.
        out: The HTML file.
        paper: Folder of Markdown tables and figures.
        samples: Responses per model where an attack succeeded that are shown.
        public: Leave out settings, paths and hosts.
        redact: Of these responses show the opening alone.

    Returns:
        The files written.

    Raises:
        ReportError: A run cannot be read, `out` is not an HTML file, `samples` is negative, or `redact` without any;
            nothing is written then.
        ScoresFileError: A score cannot be read; nothing is written then.
        StudyFileError: The same of a study's results.
        OutputFolderError: `out` or `paper` is a URL, or relative inside a Ray job; nothing is written then.
    """
    output_folder(out, setting="out")
    if paper is not None:
        output_folder(paper, setting="paper")
    out = Path(out)  # as given: it is printed
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ReportError(f"--out {str(out)!r}: the report is an HTML file; give a name that ends in .html")
    if out.is_dir():
        raise ReportError(f"--out {str(out)!r} is a folder; give a file name that ends in .html")
    if samples < 0:
        raise ReportError(f"--samples {samples} is below 0; give the number of responses to show, 0 for none")
    if redact and not samples:
        raise ReportError(
            "--redact without --samples N: no response to a harmful prompt is shown that could be redacted"
        )
    studies = [place for place in map(Place, runs) if kind_of(place) in ("study", "scale")]
    if studies and len(runs) > 1:
        raise ReportError(f"{str(studies[0])!r} is a study, whose report is of it alone; give it alone")
    if studies:
        page, written = write_study_report(
            studies[0], samples=samples, paper=None if paper is None else Path(paper), public=public
        )
        _write_page(page, out)
        return [out, *written]
    collection = collect(runs)
    page = render(collection, samples=samples, public=public, redact=redact)
    _write_page(page, out)
    if paper is None:
        return [out]
    from mlc_ray.report.paper import write_paper  # matplotlib takes a second to import

    return [out, *write_paper(collection, Path(paper), public=public)]


def _write_page(page: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part-{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
