"""What becomes of a score whose engines and driver die: engines killed (SIGKILL) and hung (SIGSTOP), a driver killed.

The same prompts are answered undisturbed, undisturbed again, and then while something strikes at random moments drawn
from `--seed`. Checked, with exit status 1 otherwise: one row for every prompt, in order, none marked as failed; every
row that had landed before a death is in the result as it was, byte for byte. Measured: how many answers differ from the
undisturbed ones. Where they do is rounding: greedy answers in bfloat16 vary with what shares their batch.

    python benchmarks/engine_deaths.py engines --kills 10 --hangs 3 --out engines.json
    python benchmarks/engine_deaths.py drivers --kills 5 --out drivers.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from mlc_ray.cluster import connect
from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Generator
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.runs import KEPT_FOLDER, RESPONSES_FILE
from mlc_ray.score.kept import row_keys
from mlc_ray.score.passes import made_by
from mlc_ray.score.prompts import read_prompts
from mlc_ray.score.request import load_request
from mlc_ray.storage import scratch_folder, user_cache


def main() -> int:
    """Strike, print what came of it, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["engines", "drivers", "score"], help="what dies; score: one driver's work")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--hangs", type=int, default=3, help="engines only")
    parser.add_argument("--hang-seconds", type=float, default=20.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--limit", type=int, default=8, help="bundles of each kind of the sample (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--block-rows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="score: where to")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.what == "score":
        from mlc_ray.score.run import score

        score(config_of(arguments, Path(arguments.folder)))
        return 0
    with scratch_folder() as scratch:
        figures = (engines if arguments.what == "engines" else drivers)(arguments, scratch)
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    broken = [figures.get("broken"), *(figures.get(name, {}).get("broken") for name in ("killed", "hung"))]
    return 1 if any(broken) else 0


def config_of(arguments: argparse.Namespace, folder: Path) -> ScoreConfig:
    """A score of the sample, which goes on where an earlier one in `folder` ended."""
    return parse_config(
        ScoreConfig,
        {
            "model": str(arguments.model or prepare_smollm2(user_cache() / "models" / MODEL_NAME)),
            "benchmarks": [{"path": "sample:test"}], "limit": arguments.limit, "accelerator": "cpu",
            "max_new_tokens": arguments.max_new_tokens, "name": folder.name, "output_dir": str(folder.parent),
            "resume": "auto", "address": "local",
            "engine": {
                "replicas": arguments.replicas, "cpus_per_replica": 0.9, "max_model_len": 512, "cpu_kv_cache_gib": 1,
                "dtype": arguments.dtype, "block_rows": arguments.block_rows, "retries": 4,
                "hang_seconds": arguments.hang_seconds,
            },
        },
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- engines that die


def engines(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Kill engines in the middle of their blocks, then stop some."""
    config = config_of(arguments, scratch / "score")
    connect("local")
    prompts = read_prompts(config, rejects=scratch).table
    settings = {
        "model": config.model, "settings": config.engine, "max_new_tokens": arguments.max_new_tokens, "device": "cpu"
    }  # fmt: skip
    part = Part("answering", Generator, settings, config.engine)
    figures: dict[str, Any] = {"prompts": len(prompts), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    draw = random.Random(arguments.seed)
    with EnginePool.open(part, "cpu") as pool:
        began = time.monotonic()
        undisturbed = pool.map(prompts)
        alone = time.monotonic() - began
        again = pool.map(prompts)
        figures |= {"undisturbed seconds": alone, "undisturbed rerun": differing(undisturbed, again)}
        for name, number, sign in (
            ("killed", arguments.kills, signal.SIGKILL), ("hung", arguments.hangs, signal.SIGSTOP),
        ):  # fmt: skip
            figures[name] = struck(pool, prompts, undisturbed, number, sign, alone, draw)
    ray.shutdown()
    return figures


def struck(
    pool: EnginePool, prompts: pa.Table, undisturbed: pa.Table, number: int, sign: signal.Signals, seconds: float,
    draw: random.Random,
) -> dict[str, Any]:  # fmt: skip
    """Passes over the prompts until `number` engines were struck, at most five in each; `seconds` is what one takes."""
    done, safe, different, times = 0, 0, [], []
    broken: list[str] = []
    while done < number:
        striker = Striker(pool, min(number - done, 5), sign, seconds, draw)
        began = time.monotonic()
        striker.start()
        found = pool.map(prompts, landed=striker.land)
        times.append(time.monotonic() - began)
        striker.end()
        done += striker.struck
        safe += striker.safe
        broken += wrong(prompts, found, striker.landed)
        different.append(differing(undisturbed, found))
    return {
        "engines": done, "seconds of each pass": times, "rows landed before a strike": safe, "broken": broken,
        "answers of each pass that differ from the undisturbed ones": different,
    }  # fmt: skip


class Striker(threading.Thread):
    """Sends a signal to engines in the middle of a block, at random moments of the time that one pass takes."""

    def __init__(
        self, pool: EnginePool, number: int, sign: signal.Signals, seconds: float, draw: random.Random
    ) -> None:
        super().__init__(daemon=True)
        self.pool, self.sign, self.draw = pool, sign, draw
        self.waits = [draw.uniform(0, seconds / number) for _ in range(number)]
        self.landed: list[tuple[int, pa.Table]] = []
        self.struck = self.safe = 0
        self._over = False

    def land(self, first: int, columns: pa.Table) -> None:
        """Told by the pool."""
        self.landed.append((first, columns))

    def run(self) -> None:
        """Strike, as often as asked."""
        for wait in self.waits:
            time.sleep(wait)
            while not self._over:
                busy = [each for each in self.pool.replicas if each.method == "run" and each.doing is not None]
                if busy and (where := self.draw.choice(busy).where) is not None:
                    self.safe = sum(len(columns) for _, columns in self.landed)
                    os.kill(where.pid, self.sign)
                    self.struck += 1
                    break
                time.sleep(0.05)

    def end(self) -> None:
        """The pass is over."""
        self._over = True
        self.join()


def wrong(prompts: pa.Table, found: pa.Table, landed: list[tuple[int, pa.Table]]) -> list[str]:
    """What must not be: rows too many or too few, marked ones, ones that are not as they landed, ones landed twice."""
    faults = []
    if len(found) != len(prompts):
        faults.append(f"{len(found)} rows for {len(prompts)} prompts")
    if found["fault"].null_count != len(found):
        faults.append(f"{len(found) - found['fault'].null_count} rows are marked as failed")
    for first, columns in landed:
        if not found.slice(first, len(columns)).equals(columns):
            faults.append(f"the {len(columns)} rows from {first} on are not as they landed")
    firsts = [first for first, _ in landed]
    if len(set(firsts)) != len(firsts):
        faults.append("a block landed twice")
    return faults


def differing(one: pa.Table, other: pa.Table) -> int:
    """How many answers are not the same."""
    pairs = zip(one["response"].to_pylist(), other["response"].to_pylist(), strict=True)
    return sum(a != b for a, b in pairs)


# ----------------------------------------------------------------------------------------------------- drivers that die


def drivers(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Kill the driver of a score again and again; each time the same command goes on."""
    draw = random.Random(arguments.seed)
    undisturbed = scratch / "undisturbed"
    subprocess.run(command(arguments, undisturbed), check=True, stdout=subprocess.DEVNULL)
    expected = pq.read_table(undisturbed / RESPONSES_FILE)
    folder = scratch / "struck"
    kept: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    blocks = -(-len(expected) // arguments.block_rows)
    kept_at = []
    for strike in range(arguments.kills):
        driver = subprocess.Popen(command(arguments, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # After so many more blocks, and a random moment into the next: each driver gets about as far.
        goal = len(blocks_of(folder)) + draw.randint(0, max(1, blocks // (arguments.kills + 1)))
        while len(blocks_of(folder)) < goal and driver.poll() is None:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 2))
        driver.kill()
        if driver.wait() != -signal.SIGKILL:
            broken.append(f"driver {strike + 1} had ended by itself")
            break
        time.sleep(3)  # its engines end when they find it gone
        rows = {row["key"]: row for file in blocks_of(folder) for row in pq.read_table(file).to_pylist()}
        broken += [f"row {key} changed" for key, row in kept.items() if rows.get(key) != row]
        kept = rows
        kept_at.append(len(kept))
    subprocess.run(command(arguments, folder), check=True, stdout=subprocess.DEVNULL)
    found = pq.read_table(folder / RESPONSES_FILE)
    named = ["benchmark", "bundle_id", "kind", "language", "prompt"]
    if not found.select(named).equals(expected.select(named)):
        broken.append("the rows are not the prompts, one for each")
    if found["fault"].null_count != len(found):
        broken.append(f"{len(found) - found['fault'].null_count} rows are marked as failed")
    broken += astray(kept, found, made_by(load_request(folder)))
    return {
        "prompts": len(expected), "drivers killed": len(kept_at), "rows landed at each death": kept_at,
        "answers that differ from the undisturbed ones": differing(expected, found), "broken": broken,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }  # fmt: skip


def astray(kept: Mapping[str, Mapping[str, Any]], found: pa.Table, by: Any) -> list[str]:
    """What must not be: rows that landed, by their keys, and that the result has not, or not as they landed."""
    keys = row_keys(by, found, PROMPTS.names)
    answers = dict(zip(keys, found.select(ANSWERS.names).to_pylist(), strict=True))
    return [
        f"row {key} is not in the result as it landed"
        for key, row in kept.items()
        if key not in answers or {**answers[key], "key": key} != row
    ]


def blocks_of(folder: Path) -> list[Path]:
    """The blocks of answers that have landed."""
    return sorted((folder / KEPT_FOLDER / "answering").glob("*.parquet"))


def command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """This program, as the driver of a score."""
    names = ("limit", "max_new_tokens", "block_rows", "replicas", "dtype", "hang_seconds")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    given += [] if arguments.model is None else ["--model", str(arguments.model)]
    return [sys.executable, __file__, "score", "--folder", str(folder), *given]


if __name__ == "__main__":
    sys.exit(main())
