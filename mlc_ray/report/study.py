"""A study's `results.json`, and its tables: what each method does on either side, what it cost, what is told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mlc_ray.errors import MlcRayError
from mlc_ray.report.scale import Scaling, scale_notes, scale_tables
from mlc_ray.report.tables import Cell, Table, cell, row, table
from mlc_ray.report.text import ABSENT, fraction, p_value, percent, signed, variance
from mlc_ray.result_files import RESULT_FILE, ResultFileError, read_result
from mlc_ray.runs import STUDY_RESULTS_FILE
from mlc_ray.stats.rates import Interval
from mlc_ray.stats.significance import FLIPS
from mlc_ray.stats.study import LEVEL, MethodRates, MethodSide, MethodTest
from mlc_ray.stats.study_languages import MethodLanguages
from mlc_ray.storage import Place
from mlc_ray.types import Kind, primary_language

FORMAT = 2
CellState = Literal["waiting", "trained", "scored", "diverged", "failed"]
NEVER = "†"
"""Marks a language that the bundles of no run of the study have."""
_SPLIT = "trained: in the bundles of any run of the study, whether or not the loss of a row's method reads them"


class StudyFileError(MlcRayError):
    """A study's results.json is missing, damaged or of another format; the message names the path."""


@dataclass(frozen=True)
class CellOutcome:
    """A cell, or the model before training (`seed` None): how far it came, and what it took.

    `message` says why it diverged or failed. `seconds` are those of its optimizer steps times its workers, which on
    GPUs have one each; `score_seconds` those of answering and judging. `prompt_tokens` and `answer_tokens` are those
    that its loss reads, by language, each bundle that it trained on counted once. `utility` has a value for each task
    and metric, in the metric's own unit.
    """

    name: str
    model: str
    method: str
    seed: int | None
    state: CellState
    message: str = ""
    steps: int = 0
    workers: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    answer_tokens: Mapping[str, int] = field(default_factory=dict)
    utility: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodRow:
    """A method on a model; `rates` is None where none of its models is scored.

    `in_language` is empty where the language of responses was not told, or not in the same way in all scores.
    `benchmarks` are the sides of each benchmark by itself, where there are several of a kind.
    """

    model: str
    method: str
    rates: MethodRates | None
    in_language: tuple[MethodLanguages, ...] = ()
    benchmarks: Mapping[str, tuple[MethodSide, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyResult:
    """A whole study, or what there is of it.

    `models` maps the models' names to what was loaded, `methods` the methods' to their overrides. `trained` are the
    languages of the bundles of any run, whether or not its loss reads them. `bundles` counts scored bundles by kind.
    `scaling` is there where the cells are searches, one of each model. `told_by` is what told the language of responses
    in each of the scores, "" where nothing did.
    """

    __pydantic_config__ = RESULT_FILE

    name: str
    models: Mapping[str, str]
    methods: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    trained: tuple[str, ...]
    gpu: bool
    judge: str
    bundles: Mapping[Kind, int]
    rows: tuple[MethodRow, ...]
    tests: tuple[MethodTest, ...]
    cells: tuple[CellOutcome, ...]
    told_by: tuple[str, ...] = ()
    scaling: Scaling | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    folder: Place = field(default_factory=lambda: Place("."))

    def row(self, model: str, method: str) -> MethodRow:
        """The row of a method on a model.

        Raises:
            KeyError: There is none.
        """
        for found in self.rows:
            if (found.model, found.method) == (model, method):
                return found
        raise KeyError(f"no method {method!r} on model {model!r}")


_RESULTS = TypeAdapter(StudyResult)


def save_study(result: StudyResult) -> Place:
    """Write `result` as `results.json` into its folder; returns the file."""
    content = asdict(result)
    del content["folder"]
    file = result.folder / STUDY_RESULTS_FILE
    file.write_json({"format": FORMAT, **content})
    return file


def load_study(folder: str | Path | Place) -> StudyResult:
    """The results in a study's folder.

    Raises:
        StudyFileError: They are missing, damaged, or of another format.
    """
    place = Place(folder).absolute()
    try:
        result = read_result(place / STUDY_RESULTS_FILE, _RESULTS, FORMAT)
    except ResultFileError as error:
        raise StudyFileError(f"{error}; `mlc-ray study --resume {place}` writes it anew") from None
    return replace(result, folder=place)


# -------------------------------------------------------------------------------------------------------------- tables


def study_tables(result: StudyResult) -> list[Table]:
    """All tables: of each model both sides, and either by language; then costs, utility, tests, and what failed."""
    found = [] if result.scaling is None else scale_tables(result.scaling, gpu=result.gpu)
    for model in result.models:
        rows = [each for each in result.rows if each.model == model and each.rates is not None]
        if rows:
            found += [_both_sides(model, rows), *(_both_by_language(result, model, rows, side) for side in _SIDES)]
            found += _by_benchmark(result, model, rows)
            found += [_in_language(model, rows)] if any(each.in_language for each in rows) else []
    further = [_costs(result), _supervision(result), _utility(result)]
    further += [_tests(result, model) for model in result.models]
    found += [each for each in further if each is not None]
    if (failed := _failed(result)) is not None:
        found.append(failed)
    return found


_SIDES: tuple[Kind, Kind] = ("harmful", "benign")


def _side(rates: MethodRates, kind: Kind) -> MethodSide:
    return rates.harmful if kind == "harmful" else rates.benign


def _counted(side: MethodSide) -> str:
    return "complied" if (side.kind, side.measure) == ("benign", "refused") else side.measure


def _both_sides(model: str, rows: Sequence[MethodRow]) -> Table:
    rates = [each.rates for each in rows if each.rates is not None]
    harmful = _counted(rates[0].harmful)
    heads = [
        "method",
        f"harmful {harmful} %",
        "benign complied %",
        "harmful − benign refused",
        f"harmful {harmful} % trained",
        f"harmful {harmful} % never trained",
        "benign complied % trained",
        "benign complied % never trained",
        "seeds",
    ]
    lines = []
    for each, found in zip(rows, rates, strict=True):
        parts = [found.harmful.trained, found.harmful.never, found.benign.trained, found.benign.never]
        lines.append(
            row(
                each.method,
                [
                    _rate(found.harmful.avg),
                    _rate(found.benign.avg),
                    cell(signed(found.difference.value), _limits(found.difference, signed)),
                    *(_rate(part) for part in parts),
                    str(found.seeds),
                ],
            )
        )
    return table(
        f"{model}: both sides", heads, lines,
        f"means over languages, with 95 % intervals over bundles and seeds; {_SPLIT}",
    )  # fmt: skip


def _both_by_language(result: StudyResult, model: str, rows: Sequence[MethodRow], kind: Kind) -> Table:
    sides = [_side(each.rates, kind) for each in rows if each.rates is not None]
    return _by_language(result, f"{model}: {kind} prompts", rows, sides)


def _by_benchmark(result: StudyResult, model: str, rows: Sequence[MethodRow]) -> list[Table]:
    found = []
    for name in dict.fromkeys(name for each in rows for name in each.benchmarks):
        for kind in _SIDES:
            there = [(each, side) for each in rows for side in each.benchmarks.get(name, ()) if side.kind == kind]
            if there:
                own, sides = [each for each, _ in there], [side for _, side in there]
                found.append(_by_language(result, f"{model}: {kind} prompts of {name}", own, sides))
    return found


def _by_language(result: StudyResult, title: str, rows: Sequence[MethodRow], sides: Sequence[MethodSide]) -> Table:
    codes = list(dict.fromkeys(code for side in sides for code in side.languages))
    heads = [f"{code} {NEVER}" if code in _never(result, sides) else code for code in codes]
    lines = []
    for each, side in zip(rows, sides, strict=True):
        numbers: list[str | Cell] = [
            percent(side.languages[code].value) if code in side.languages else ABSENT for code in codes
        ]
        numbers += [
            _rate(side.avg),
            ABSENT if side.var is None else cell(variance(side.var.value), _limits(side.var, variance)),
            ABSENT if side.pag is None else cell(fraction(side.pag.value), _limits(side.pag, fraction)),
        ]
        lines.append(row(each.method, numbers))
    note = f"% {_counted(sides[0])}"
    if any(head.endswith(NEVER) for head in heads):
        note += f"; {NEVER} never trained: in the bundles of no run of the study"
    return table(title, ["method", *heads, "avg", "var", "PAG"], lines, note)


def _in_language(model: str, rows: Sequence[MethodRow]) -> Table:
    parts = ("avg", "trained", "never")
    heads = ["method", *(f"{kind} %{_PART_NAMES[part]}" for kind in _SIDES for part in parts)]
    lines = []
    for each in rows:
        of = {found.kind: found for found in each.in_language}
        rates = [getattr(of[kind], part) if kind in of else None for kind in _SIDES for part in parts]
        lines.append(row(each.method, map(_rate, rates)))
    note = (
        "of those whose language could be told; means over languages, with 95 % intervals over bundles and seeds; "
        f"{_SPLIT}"
    )
    return table(f"{model}: responses in the prompt's language", heads, lines, note)


_PART_NAMES = {"avg": "", "trained": " trained", "never": " never trained"}


def _never(result: StudyResult, sides: Iterable[MethodSide]) -> set[str]:
    primary = set(map(primary_language, result.trained))
    return {code for side in sides for code in side.languages if primary_language(code) not in primary}


def _rate(found: Interval | None) -> Cell:
    return cell(ABSENT) if found is None else cell(percent(found.value), _limits(found, percent))


def _limits(found: Interval, shown: object) -> str:
    assert callable(shown)
    return f"{shown(found.low)} to {shown(found.high)}"


def _costs(result: StudyResult) -> Table:
    who = "GPU" if result.gpu else "worker"
    heads = ["model", "method", "answer tokens", "of them not English", "prompt tokens", "steps", f"{who} seconds",
             "scoring seconds"]  # fmt: skip
    lines = []
    for model, method, cells in _groups(result):
        ran = [each for each in cells if each.steps]
        if not ran:
            continue
        known = [each for each in ran if each.prompt_tokens]  # token rows may be gone
        answers = [sum(each.answer_tokens.values()) for each in known]
        foreign = [sum(n for code, n in each.answer_tokens.items() if code.partition("-")[0] != "en") for each in known]
        numbers: list[list[float]] = [[*answers], [*foreign], [sum(each.prompt_tokens.values()) for each in known]]
        numbers += [[each.steps for each in ran], [each.seconds for each in ran]]
        numbers.append([each.score_seconds for each in ran if each.score_seconds])
        lines.append(row(model, [method, *(f"{_mean(n):,.0f}" if n else ABSENT for n in numbers)]))
    return table(
        "Supervision and time", heads, lines,
        "means over seeds that took steps, also where they failed; tokens that the loss of a whole run reads, each "
        "bundle counted once; seconds of optimizer steps x workers",
    )  # fmt: skip


def _supervision(result: StudyResult) -> Table | None:
    codes = sorted({code for each in result.cells for code in (*each.prompt_tokens, *each.answer_tokens)})
    lines = []
    for model, method, cells in _groups(result):
        if ran := [each for each in cells if each.steps and each.prompt_tokens]:
            answers, prompts = [each.answer_tokens for each in ran], [each.prompt_tokens for each in ran]
            shown = [cell(_count(answers, code), _count(prompts, code)) for code in codes]
            lines.append(row(model, [method, *shown]))
    if not lines:
        return None
    return table("Supervision by language", ["model", "method", *codes], lines, "answer tokens, and those of prompts")


def _count(tokens: Sequence[Mapping[str, int]], code: str) -> str:
    return f"{_mean([each.get(code, 0) for each in tokens]):,.0f}"


def _groups(result: StudyResult) -> list[tuple[str, str, list[CellOutcome]]]:
    keys = list(dict.fromkeys((each.model, each.method) for each in result.rows))
    return [(m, k, [each for each in result.cells if (each.model, each.method) == (m, k)]) for m, k in keys]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _utility(result: StudyResult) -> Table | None:
    names = list(dict.fromkeys(name for each in result.cells for name in each.utility))
    if not names:
        return None
    lines = []
    for model, method, cells in _groups(result):
        found = [each.utility for each in cells if each.utility]
        if found:
            values = [[each[name] for each in found if name in each] for name in names]
            lines.append(row(model, [method, *map(_utility_over_seeds, values)]))
    note = "means over seeds, in each metric's own unit"
    if any(each.more for shown in lines for each in shown.cells):
        note += ", with the lowest and the highest of a seed"
    return table("Utility", ["model", "method", *names], lines, note)


def _utility_over_seeds(values: Sequence[float]) -> Cell:
    if not values:
        return cell(ABSENT)
    spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""
    return cell(f"{_mean(values):.4f}", spread)


_TOLD = {True: "", False: "not told apart"}


def _tests(result: StudyResult, model: str) -> Table | None:
    found = [each for each in result.tests if each.model == model]
    if not found:
        return None
    heads = ["second − first", "harmful", "benign", "harmful − benign refused"]
    lines = []
    for pair in dict.fromkeys((each.first, each.second) for each in found):
        three = {each.compared: each for each in found if (each.first, each.second) == pair}
        numbers = [_test(three[side]) for side in ("harmful", "benign", "difference")]
        lines.append(row(f"{pair[1]} − {pair[0]}", numbers))
    return table(
        f"{model}: which methods are told apart", heads, lines,
        "change in points; paired by bundle, the largest p over the seeds, after Holm's correction over all tests. "
        f"Told apart where p is at most {LEVEL} and the interval, of each test by itself, leaves 0 out",
    )  # fmt: skip


def _test(found: MethodTest) -> Cell:
    one = "one seed" if found.seeds == 1 else ""
    shown = [_limits(found.change, signed), p_value(found.p_holm), one, _TOLD[found.told_apart]]
    return cell(signed(found.change.value), *shown, tone="strong" if found.told_apart else "")


def _failed(result: StudyResult) -> Table | None:
    lines = [
        row(each.name, [each.state, each.message or ABSENT], tone="alarm" if each.state != "waiting" else "")
        for each in result.cells
        if each.state != "scored" or each.message
    ]
    return table("Cells that lack something", ["cell", "state", "why"], lines) if lines else None


def study_notes(result: StudyResult) -> list[str]:
    """What a reader must know of the numbers, a sentence each."""
    counts = " and ".join(f"{n} {kind}" for kind, n in result.bundles.items())
    judged = f", judged by {result.judge}" if result.judge else ""
    notes = [
        f"{counts} bundles{judged}. A model that refuses everything has a perfect harmful side; only both sides tell."
    ]
    if result.scaling is not None:
        notes += scale_notes(result.scaling)
    seeds = {each.rates.seeds for each in result.rows if each.rates is not None and each.method != _reference(result)}
    if seeds == {1}:
        notes.append("With one seed, intervals and tests say nothing of what another seed would give.")
    elif 2 in seeds:
        notes.append(
            "With two seeds, Student's quantile is 12.7: a small difference between them makes wide intervals."
        )
    if fewer := [
        f"{each.method} on {each.model} ({each.rates.seeds})"
        for each in result.rows
        if each.rates is not None and each.method != _reference(result) and each.rates.seeds < len(result.seeds)
    ]:
        notes.append(
            f"Fewer than the study's {len(result.seeds)} seeds are scored of {', '.join(fewer)}; with one seed, "
            "intervals say nothing of what another would give."
        )
    if len(result.told_by) > 1:
        each = "; ".join(by or "not measured" for by in result.told_by)
        notes.append(
            f"Which language responses are in was not told in the same way in all scores ({each}); what is not alike "
            "is not shown."
        )
    if result.tests:
        apart = sum(each.told_apart for each in result.tests)
        notes.append(
            f"{apart} of {len(result.tests)} tests tell two methods apart by the corrected p and their intervals."
        )
        if len(result.tests) > LEVEL * (FLIPS + 1):
            notes.append(
                f"With {len(result.tests):,} tests no p-value by {FLIPS:,} random flips is small enough for the "
                f"correction, since none is below 1/{FLIPS + 1:,}: compare fewer methods or models in one study."
            )
    return notes


def _reference(result: StudyResult) -> str:
    return next(each.method for each in result.cells if each.seed is None)


def facts_of(result: StudyResult) -> list[tuple[str, str]]:
    """The models and methods by name, with what they stand for."""
    methods = [(name, " ".join(overrides) or "as train") for name, overrides in result.methods.items()]
    return [*((name, path) for name, path in result.models.items()), *methods]
