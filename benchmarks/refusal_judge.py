"""Precision and recall of the refusal judge and of the degeneracy check on the labelled responses.

Each response of `tests/judges/labelled` is judged as in a score, by `RefusalJudge`, then `settle`. Prints Markdown;
the held-out table is the one in docs/judges.md.

    python benchmarks/refusal_judge.py                      # both halves, by language
    python benchmarks/refusal_judge.py --split held_out --by kind
    python benchmarks/refusal_judge.py --errors ja          # what is judged wrongly, on the dev half only
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlc_ray.judges.degenerate import settle
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer, Verdict

LABELLED = Path(__file__).resolve().parent.parent / "tests" / "judges" / "labelled"
LANGUAGES = (
    "en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku", "es", "fr",
    "de", "pt", "hi", "tr", "id", "pl", "nl", "ko", "it", "jv", "th", "vi",
)  # fmt: skip
SPLITS = ("dev", "held_out")


@dataclass(frozen=True)
class Judged:
    """A labelled response and the verdict on it."""

    language: str
    kind: str
    split: str
    label: str
    answer: Answer
    verdict: Verdict


@dataclass(frozen=True)
class Counts:
    """Of one class: responses labelled so, judged so, and both."""

    labelled: int
    judged: int
    right: int

    @classmethod
    def of(cls, judged: Iterable[Judged], label: str) -> Counts:
        """Count `label` among `judged`."""
        pairs = Counter((item.label == label, item.verdict.behaviour == label) for item in judged)
        right = pairs[True, True]
        return cls(right + pairs[True, False], right + pairs[False, True], right)

    @property
    def precision(self) -> float:
        """Share of those judged so that are labelled so; nan if none is judged so."""
        return self.right / self.judged if self.judged else float("nan")

    @property
    def recall(self) -> float:
        """Share of those labelled so that are judged so; nan if none is labelled so."""
        return self.right / self.labelled if self.labelled else float("nan")

    def cells(self) -> tuple[str, str]:
        """Precision and recall with the counts that they come from."""
        return (
            f"{self.precision:.2f} ({self.right}/{self.judged})",
            f"{self.recall:.2f} ({self.right}/{self.labelled})",
        )


def judge_labelled() -> Iterator[Judged]:
    """Every labelled response, judged."""
    judge = RefusalJudge()
    for language in LANGUAGES:
        for line in (LABELLED / f"{language}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            # The judge reads no prompt, and its verdict is the same for either kind of prompt.
            answer = Answer(row["prompt"], row["response"], language, "harmful")
            verdict = settle(judge.judge([answer])[0], answer)
            yield Judged(language, row["kind"], row["split"], row["label"], answer, verdict)


def by_language(judged: list[Judged]) -> str:
    """A table of precision and recall per language, and of all."""
    head = ["language", "responses"]
    head += [f"{label}: {number}" for label in ("refused", "degenerate") for number in ("precision", "recall")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in (*LANGUAGES, "all"):
        rows = [item for item in judged if name in (item.language, "all")]
        numbers = [cell for label in ("refused", "degenerate") for cell in Counts.of(rows, label).cells()]
        lines.append("| " + " | ".join([name, str(len(rows)), *numbers]) + " |")
    return "\n".join(lines)


def by_kind(judged: list[Judged]) -> str:
    """A table of how many responses of each kind are judged as labelled."""
    lines = ["| kind | label | judged as labelled |", "|---|---|---|"]
    for kind, label in sorted({(item.kind, item.label) for item in judged}, key=lambda pair: (pair[1], pair[0])):
        rows = [item for item in judged if (item.kind, item.label) == (kind, label)]
        right = sum(item.verdict.behaviour == label for item in rows)
        lines.append(f"| {kind.replace('_', ' ')} | {label} | {right / len(rows):.2f} ({right}/{len(rows)}) |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=(*SPLITS, "all"), help="default: each half by itself")
    parser.add_argument("--by", choices=("language", "kind"), default="language")
    parser.add_argument("--errors", metavar="LANGUAGE", choices=LANGUAGES)
    options = parser.parse_args()
    judged = list(judge_labelled())
    if options.errors:
        # Phrases are corrected by what is seen here; the held-out half stays unseen, or its figures mean nothing.
        for item in judged:
            if item.split == "dev" and item.language == options.errors and item.verdict.behaviour != item.label:
                print(f"{item.kind}: {item.label}, judged {item.verdict.behaviour}: {item.verdict.reason}")
                print(f"    {item.answer.response!r}")
        return
    table = by_language if options.by == "language" else by_kind
    splits = [options.split] if options.split else list(SPLITS)
    for split in splits:
        if len(splits) > 1:
            print(f"## {split}\n")
        print(table([item for item in judged if split in (item.split, "all")]))
        if len(splits) > 1:
            print()


if __name__ == "__main__":
    main()
