"""Which judge can score which benchmark: the table in docs/judges.md, from what judges and formats declare.

python benchmarks/judge_table.py    # prints it; a test compares it with the page
"""

from __future__ import annotations

from mlc_ray._registry import names, resolve
from mlc_ray.data.formats.base import Published
from mlc_ray.types import Measure

ALL_LANGUAGES = "all"


def published() -> list[Published]:
    """The benchmarks that shipped formats were made for, by name."""
    found = [resolve("format", name).published for name in names("format")]
    return sorted((each for each in found if each is not None), key=lambda each: each.name)


def judges() -> dict[tuple[tuple[Measure, ...], frozenset[str] | None], list[str]]:
    """The shipped judges that declare the same measures and languages."""
    found: dict[tuple[tuple[Measure, ...], frozenset[str] | None], list[str]] = {}
    for name in names("judge"):
        judge = resolve("judge", name)
        if not judge.__module__.startswith("mlc_ray.") or name == "panel":  # a panel reads what its judges do
            continue
        # Of the refusal judge the phrase lists say it, which are read when it is made.
        languages = judge.languages if hasattr(judge, "languages") else judge().languages
        found.setdefault((judge.measures, languages), []).append(name)
    return found


def cell(measures: tuple[Measure, ...], languages: frozenset[str] | None, benchmark: Published) -> str:
    """Of how many of the benchmark's languages the judge can read the responses, and which, or which not."""
    if "safe" not in measures and not benchmark.refusals:
        return "–"
    total = len(benchmark.languages)
    read = benchmark.languages if languages is None else benchmark.languages & languages
    lacking = benchmark.languages - read
    if not lacking:
        return ALL_LANGUAGES
    if not read:
        return "none"
    return f"{len(read)} of {total}" + (
        f": {' '.join(sorted(read))}" if len(read) < len(lacking) else f": not {' '.join(sorted(lacking))}"
    )


def table() -> str:
    """The table in Markdown: a row per benchmark, a column per group of judges."""
    groups = sorted(judges().items(), key=lambda item: (-len(item[0][1] or ()) if item[0][1] else -1000, item[1]))
    head = ["benchmark", "languages", "sides"]
    head += [f"{', '.join(f'`{name}`' for name in found)}: {', '.join(measures)}" for (measures, _), found in groups]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for benchmark in published():
        cells = [benchmark.name, str(len(benchmark.languages)), ", ".join(benchmark.kinds)]
        cells += [cell(measures, languages, benchmark) for (measures, languages), _ in groups]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
