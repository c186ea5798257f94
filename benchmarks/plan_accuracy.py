"""Plans against measurements on a CPU: memory above the process's start, and the time of a step.

Each point trains the shipped sample for a few optimizer steps in processes of its own (`plan_worker.py`). A calibration
of each model and type comes first, in the same run and file. What is in the file already is not measured again, so that
the command can be repeated after whatever ended it:

    python benchmarks/plan_accuracy.py --smollm2 FOLDER --qwen FOLDER --out plan_accuracy.json
    python benchmarks/plan_accuracy.py --smollm2 FOLDER --out plan_accuracy.json --only smollm2-stage2
    python benchmarks/plan_accuracy.py --out plan_accuracy.json --table

Goals: memory within 10 %, time within 25 % (median of 7 steps).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_worker import config_of, measure
from step_data import sample_rows

from mlc_ray.data.store import TokenArtifact, finish_artifact, shard_file, write_shard
from mlc_ray.data.stream import plans
from mlc_ray.data.tables import rows_to_table
from mlc_ray.plan.activations import Row
from mlc_ray.plan.cutting import cutting_of, order_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Cut, of_artifact, row_of
from mlc_ray.plan.memory import holding_of, peak
from mlc_ray.plan.rates import Rates
from mlc_ray.plan.runs import plan_run
from mlc_ray.plan.seconds import seconds
from mlc_ray.plan.shapes import config_of as model_config
from mlc_ray.plan.shapes import counted, shape_of
from mlc_ray.storage import Place, write_json_atomic
from mlc_ray.train.calibrate import calibrate

MEMORY_GOAL, TIME_GOAL = 0.10, 0.25
BUNDLES = 96

_PLAIN: dict[str, Any] = {
    "dtype": "bfloat16", "stage": 2, "workers": 1, "threads": 1, "tokens": 2048, "bundles": 2, "checkpointing": False,
    "lora": None, "steps": 8,
}  # fmt: skip

POINTS: dict[str, dict[str, Any]] = {
    "smollm2-stage0": {"stage": 0},
    "smollm2-stage1": {"stage": 1},
    "smollm2-stage2": {},
    "smollm2-stage3": {"stage": 3},
    "smollm2-stage0-2workers": {"stage": 0, "workers": 2},
    "smollm2-stage1-2workers": {"stage": 1, "workers": 2},
    "smollm2-stage2-2workers": {"workers": 2},
    "smollm2-stage3-2workers": {"stage": 3, "workers": 2},
    "smollm2-1024tokens": {"tokens": 1024},
    "smollm2-4096tokens": {"tokens": 4096, "bundles": 4, "steps": 6},
    "smollm2-checkpointed": {"checkpointing": True},
    "smollm2-selective": {"checkpointing": "selective"},
    "smollm2-lora": {"lora": {"rank": 16}},
    "smollm2-float32": {"dtype": "float32"},
    "qwen-stage2": {"bundles": 1},
    "qwen-stage3": {"bundles": 1, "stage": 3},
    "qwen-checkpointed": {"bundles": 1, "checkpointing": True},
    "qwen-lora": {"bundles": 1, "lora": {"rank": 16}},
    "qwen-lora-2workers": {"bundles": 2, "workers": 2, "lora": {"rank": 16}},
}
"""What each differs in; the name begins with the model."""


def planned(point: Mapping[str, Any], model: str, tokens: TokenArtifact, rates: Rates) -> dict[str, float]:
    """What the planner says of a point whose batches it knows; as `drawn`, what `mlc-ray plan` says of the run, for
    which it draws batches of the bundles, looks at the largest and takes the mean."""
    config = config_of(point, model)
    of_model, _ = model_config(model)
    shape = counted(shape_of(of_model, Path(model).name), of_model)
    workers, steps = point["workers"], point["steps"]
    cluster = Cluster(None, workers, workers, None)
    drawn = plan_run(config, shape, cluster, of_artifact(tokens), rates, dtype=point["dtype"], workers=workers)
    held = holding_of(config, shape, workers=workers, dtype=point["dtype"], device="cpu")
    cutting = cutting_of(config, tokens, tokens_per_forward=point["tokens"], world_size=workers)
    of_steps: list[Cut] = []
    for plan in plans(tokens, order_of(config, tokens), cutting, range(steps)):
        rows = [
            row_of(tokens.lengths(list(forward.rows)), cutting, plan, said)
            for micro, of_micro in zip(plan.forwards, plan.tokens, strict=True)
            for forward, said in zip(micro, of_micro, strict=True)
            if not forward.idle
        ]
        mean = [round(sum(column) / len(rows)) for column in zip(*(vars(row).values() for row in rows), strict=True)]
        largest = max(rows, key=lambda row: row.tokens)
        of_steps.append(Cut(sum(row.tokens for row in rows), len(plan.forwards), largest, Row(*mean), 1.0, len(rows)))
    given = {"kept_share": rates.kept, "grown": rates.grown}
    each = [peak(config, shape, held, cut.largest, forwards=cut.forwards, **given) for cut in of_steps]
    parts = max(each, key=lambda parts: sum(part.bytes for part in parts))
    spent = [seconds(config, shape, held, cut, rates=rates, cluster=cluster)[0].step for cut in of_steps[1:]]
    return {
        "memory": sum(part.bytes for part in parts),
        "seconds": statistics.median(spent),
        "drawn/memory": drawn.memory.worker_bytes,
        "drawn/seconds": drawn.seconds.step,
        **{f"memory/{part.name}": part.bytes for part in parts},
    }


def measured(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the worker with the most memory, and the median of the steps after the first."""
    return {
        "memory": max(answer["memory"]["peak"] for answer in answers),
        "seconds": statistics.median(answers[0]["seconds"][1:]),
    }


class Results:
    """The file of results: calibrations and points by name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        empty: dict[str, Any] = {"calibrations": {}, "points": {}}
        self.found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty

    def keep(self, kind: str, name: str, value: Any) -> None:
        """Add one, and write the file."""
        self.found[kind][name] = value
        write_json_atomic(self.file, self.found)


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure what is not there yet."""
    models = {"smollm2": options.smollm2, "qwen": options.qwen}
    with tempfile.TemporaryDirectory() as folder:
        tokens: dict[str, TokenArtifact] = {}
        for name, differing in POINTS.items():
            family = name.partition("-")[0]
            model = models[family]
            found = results.found["points"].get(name, {})
            if model is None or "planned" in found or (options.only and name not in options.only):
                continue
            point = {**_PLAIN, **differing}
            if family not in tokens:
                place = Path(folder) / family
                rows = sample_rows(model, BUNDLES, 1)[0]
                shard = write_shard(Place(place), shard_file(0), [rows_to_table(rows)])
                finish_artifact(Place(place), [shard], fingerprint=family, rejected={})
                tokens[family] = TokenArtifact.open(place)
            key = f"{family} {point['dtype']}"
            if key not in results.found["calibrations"]:
                rates = calibrate(config_of({**_PLAIN, "dtype": point["dtype"]}, model), threads=1)
                results.keep("calibrations", key, asdict(rates))
            rates = Rates(**results.found["calibrations"][key])
            plan = planned(point, model, tokens[family], rates)
            said = found.get("measured") or measured(measure(point, model, str(tokens[family].folder)))
            results.keep("points", name, {"point": point, "planned": plan, "measured": said})
            print(line(name, results.found["points"][name]), flush=True)


def line(name: str, found: Mapping[str, Any]) -> str:
    """A point's row of the table in docs/plan.md."""
    plan, said = found["planned"], found["measured"]
    memory, time = plan["memory"] / said["memory"] - 1, plan["seconds"] / said["seconds"] - 1
    missed = [
        what for what, off, goal in (("memory", memory, MEMORY_GOAL), ("time", time, TIME_GOAL)) if abs(off) > goal
    ]
    note = f"missed: {', '.join(missed)}" if missed else ""
    drawn = " | ".join(f"{plan[f'drawn/{what}'] / said[what] - 1:+.1%}" for what in ("memory", "seconds"))
    of_memory = f"{said['memory'] / 2**30:.2f} | {plan['memory'] / 2**30:.2f} | {memory:+.1%}"
    return f"| {name} | {of_memory} | {said['seconds']:.2f} | {plan['seconds']:.2f} | {time:+.1%} | {drawn} | {note} |"


def table(results: Results) -> str:
    """All points as Markdown."""
    head = ("point", "GiB", "planned", "off by", "s a step", "planned", "off by", "drawn: GiB", "s", "")
    rows = [line(name, found) for name, found in results.found["points"].items()]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--qwen", help="folder of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, gone on with where it is there")
    parser.add_argument("--only", nargs="*", choices=POINTS, help="these points alone")
    parser.add_argument("--table", action="store_true", help="print what is there, and measure nothing")
    options = parser.parse_args(arguments)
    results = Results(options.out)
    if not options.table:
        run(options, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
