"""How fast a score is read once it is answered: the refusal phrases, lingua, and the report. CPU seconds, no GPU.

    python benchmarks/reading_speed.py                         # 100,000 responses; some minutes
    python benchmarks/reading_speed.py phrases languages --responses 20000

Prints Markdown. Each part runs in a process of its own, whose largest resident memory is given.

    phrases     responses of 600 characters that are made of the labelled ones of `tests/judges/labelled`, half of them
                refusals, judged as in a score: by language, slowest and fastest
    languages   different responses of 120 characters in the twelve languages of the sample, told by lingua
    report      `mlc-ray report` of scores in 30 languages, harmful and benign, with a response of 200 characters each:
                one score, two compared, and both with the languages of their responses told
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from mlc_ray.judges.degenerate import settle
from mlc_ray.judges.languages import Identifier
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer

ROOT = Path(__file__).resolve().parents[1]
LABELLED = ROOT / "tests" / "judges" / "labelled"
SAMPLE = ("en", "ar", "bn", "es", "fr", "ja", "ru", "sw", "ur", "zh", "de", "hi")
PHRASES_SHARE = 0.02  # of the responses in each language: 2,000 of 100,000 take a second


def labelled(code: str, label: str) -> list[str]:
    """The labelled responses of one language and class."""
    lines = (LABELLED / f"{code}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["response"] for row in map(json.loads, lines) if row["label"] == label]


def texts_of(code: str, size: int, length: int) -> list[tuple[str, bool]]:
    """`size` texts of `length` characters, and whether each refuses: every second one does."""
    helpful, refusals = labelled(code, "complied"), labelled(code, "refused")
    more = " ".join(helpful) * (1 + length // len(" ".join(helpful)))
    texts = []
    for number, begins in enumerate(islice(chain.from_iterable(zip(cycle(refusals), cycle(helpful))), size)):
        turn = number // 2 % len(more)  # so that texts differ
        texts.append((f"{begins} {more[turn:]}{more[:turn]}"[:length], number % 2 == 0))
    return texts


def phrases(responses: int) -> list[list[str]]:
    """Responses a second of the refusal judge, and of the check for degenerate ones that follows every judge."""
    judge, rows = RefusalJudge(RefusalJudge.Settings()), []
    for file in sorted(LABELLED.glob("*.jsonl")):
        pairs = texts_of(file.stem, max(2, int(responses * PHRASES_SHARE)), 600)
        answers = [Answer("?", text, file.stem, "harmful", "stop") for text, _ in pairs]
        judge.judge(answers[:2])  # compiles the phrases of the language
        began = time.process_time()
        verdicts = [settle(each, answer) for each, answer in zip(judge.judge(answers), answers, strict=True)]
        seconds = time.process_time() - began
        refused = sum(verdict.behaviour == "refused" for verdict in verdicts) / len(verdicts)
        rows.append((len(answers) / seconds, [file.stem, str(len(answers)), f"{100 * refused:.0f} %"]))
    rows.sort()
    shown = [*rows[:2], *rows[-2:]] if len(rows) > 4 else rows
    return [["language", "responses", "refused", "responses a CPU second"], *([*c, f"{r:,.0f}"] for r, c in shown)]


def languages(responses: int) -> list[list[str]]:
    """CPU seconds of lingua."""
    each = -(-responses // len(SAMPLE))
    pairs = [(text, code) for code in SAMPLE for text, _ in texts_of(code, each, 120)][:responses]
    texts, codes = zip(*pairs, strict=True)
    before, began = _peak(), time.process_time()
    identifier = Identifier(SAMPLE)
    identifier.told(["A text to load its models by."], ["en"])
    models, loaded = _peak(), time.process_time()
    identifier.told(texts, codes)
    took = time.process_time() - loaded
    row = [f"{len(texts):,}", f"{len(set(texts)):,}", f"{loaded - began:.1f}", f"{models - before:.2f}", f"{took:.1f}"]
    return [["responses", "of them different", "CPU s to load", "GB that models add", "CPU s to tell"], row]


def _peak() -> float:
    """Largest resident memory of this process so far, in 10⁹ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(responses: int) -> list[list[str]]:
    """CPU seconds and memory of a report."""
    sys.path.append(str(ROOT))
    from tests.report.runs import THIRTY, grid, write_score

    rows = [["report of", "responses in each", "CPU s", "GB at most"]]
    bundles = max(1, responses // (2 * len(THIRTY)))
    with tempfile.TemporaryDirectory() as temporary:
        for told in (False, True):
            for number, refuses in enumerate((0.6, 0.7)):
                answers = grid(THIRTY, lambda kind, code, refuses=refuses: refuses, bundles=bundles, seed=number)
                for at, row in enumerate(answers):
                    row["response"] = f"{row['response']}: {at} ".ljust(200, "x")
                languages = [row["language"] for row in answers] if told else None
                write_score(Path(temporary) / f"{'told' if told else 'plain'}-{number}", answers, told=languages)
        for name in ("plain", "told"):
            for several in (1, 2):
                scores = [f"{temporary}/{name}-{number}" for number in range(several)]
                what = "one score" if several == 1 else "two scores"
                seconds, peak = _cost_of(["report", *scores, "--out", f"{temporary}/out.html"])
                told_too = ", languages told" if name == "told" else ""
                rows.append([f"{what}{told_too}", f"{2 * bundles * len(THIRTY):,}", f"{seconds:.1f}", f"{peak:.2f}"])
    return rows


def _cost_of(command: list[str]) -> tuple[float, float]:
    """CPU seconds and largest resident memory (10⁹ bytes) of a command of `mlc-ray`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "mlc_ray", *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"mlc-ray {' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


PARTS: dict[str, Callable[[int], list[list[str]]]] = {"phrases": phrases, "languages": languages, "report": report}


def _run(name: str, responses: int, results: Any) -> None:
    rows = PARTS[name](responses)
    results.put((rows, _peak()))


def main() -> None:
    """Parse arguments, run each part in a process of its own, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--responses", type=int, default=100_000, help="default: 100,000")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    print(f"Python {sys.version.split()[0]}, {', '.join(_versions('mlc_ray', 'lingua-language-detector', 'pyarrow'))}")
    for name in asked.parts or PARTS:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_run, args=(name, asked.responses, results))
        process.start()
        (head, *rows), peak = results.get()
        process.join()
        print(f"\n{name}" + (f" ({peak:.2f} GB at most)" if name != "report" else "") + "\n")
        for cells in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(cells)} |", flush=True)


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


if __name__ == "__main__":
    main()
