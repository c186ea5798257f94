"""Scores on a terminal: the report's own tables and warnings, printed by the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.text import Text

from mlc_ray.report.calibration import corrected_table
from mlc_ray.report.collect import Model
from mlc_ray.report.in_language import in_language_table
from mlc_ray.report.rates import benchmarks, grid, keys
from mlc_ray.report.remarks import warnings
from mlc_ray.report.summaries import language_table, overview_table
from mlc_ray.report.tables import console as on_console
from mlc_ray.report.text import clean, percent, whole
from mlc_ray.score.results import ScoreResult, cut_share, load_in_language
from mlc_ray.stats.marks import mark_lines

_UNBOUNDED = 10_000


def show(renderable: RenderableType, console: Console | None = None) -> None:
    """Print tables at their full width: on a narrower terminal lines wrap, but no number is left out."""
    console = console or Console()
    wide = console.options.update(max_width=_UNBOUNDED)
    needed = Measurement.get(console, wide, renderable).maximum
    # Rich fits to the console's width, whatever print() is told.
    console.width = max(console.width, needed)
    console.print(renderable, crop=False)


def score_tables(*results: ScoreResult) -> Group:
    """One score, or several side by side: per benchmark a row per language and a summary, then the warnings.

    Scores need not share benchmarks or languages: what one lacks is a dot. With several the change is that from the
    first to the last.
    """
    models = [Model(result.name, result, in_language=load_in_language(result)) for result in results]
    parts: list[RenderableType] = []
    if keys(models) != [model.label for model in models]:
        parts += [Text(clean(f"{key}: {model.label}")) for key, model in zip(keys(models), models, strict=True)]
    for name in sorted(benchmarks(models), key=lambda name: name == benchmarks(models)[0]):
        parts += [on_console(language_table(models, grid(models, name), limits=False))]
        parts += [on_console(overview_table(models, name))]
        if (told := in_language_table(models, name, limits=False)) is not None:
            parts += [on_console(told)]
        if (corrected := corrected_table(models, name)) is not None:
            parts += [on_console(corrected)]
    parts += [Text(clean(line)) for line in _accounts(results)]
    parts += [Text(f"WARNING: {clean(line)}", "bold red") for line in warnings(models)]
    parts += [Text(line) for line in mark_lines(row.via for result in results for row in result.rows)]
    return Group(*parts)


def _accounts(results: Sequence[ScoreResult]) -> Iterator[str]:
    for result in results:
        judges = ", ".join(f"{measure} by {judge}" for measure, judge in result.measured_by.items())
        cost = "".join(
            f"; {what}: {usage['requests']:.0f} requests, {usage['cached']:.0f} cached, "
            f"{usage['not_asked']:.0f} not asked, ${usage['cost_usd']:.4f}"
            for what, usage in result.usage.items()
        )
        cut = f", {whole(100 * cut_share(result))}% cut off at max_new_tokens" if result.finish.get("length", 0) else ""
        yield (
            f"{result.name}: judged: {judges}{cost}; {result.responses} responses, {result.degenerate} degenerate, "
            f"{result.unparsed} without a verdict ({percent(100 * result.unparsed_share)}%){cut}"
        )
