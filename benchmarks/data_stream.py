"""What it costs to prepare a data set that grows: speed against the bare tokenizer, memory, and the start of a run.

Synthetic bundles in ten languages, whose words are those of the shipped sample, are written as JSON lines and prepared
as `train` prepares them. Stated are CPU seconds of all processes, beside those that the tokenizer alone takes for the
same texts, by which a speed of 100 % would be that of tokenising without a template, files or checks; the
peak of anonymous memory of the driver and all workers above what they had before; the peak of what Ray says is used of
its object store, which is capped, and what it spilled to disk; and how long a worker takes to open the artefact, order
an epoch and plan its first step. A line through the sizes gives what the start would cost at ten and a hundred million
bundles.

    python benchmarks/data_stream.py --bundles 3000 10000 30000 --out data_stream.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from mlc_ray.config import DataSection, ModelSection, SourceSection
from mlc_ray.data.order import Order
from mlc_ray.data.plan import Cutting
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.sources import sample_path
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import scratch_folder, user_cache

LANGUAGES = 10
PROMPT_WORDS, ANSWER_WORDS = (8, 20), (20, 50)
STORE_BYTES = 200 << 20
SAMPLED_EVERY = 0.25
BARE_BUNDLES = 1000
EXTRAPOLATED = (10_000_000, 100_000_000)


def synthetic(number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Bundles whose prompts and answers are words of the sample in random order."""
    source = [json.loads(line) for line in sample_path("train").read_text(encoding="utf-8").splitlines()]
    codes = sorted({code for bundle in source for code in bundle["prompts"]})[:LANGUAGES]
    words = {code: [w for b in source for w in b["prompts"].get(code, "").split()] for code in codes}
    words["answer"] = [word for bundle in source for word in bundle["chosen"].split()]
    rng = random.Random(seed)

    def text(of: str, bounds: tuple[int, int]) -> str:
        return " ".join(rng.choices(words[of], k=rng.randint(*bounds)))

    for index in range(number):
        yield {
            "kind": "harmful" if index % 2 else "benign",
            "prompts": {code: text(code, PROMPT_WORDS) for code in codes} | {"en": text("en", PROMPT_WORDS)},
            "chosen": text("answer", ANSWER_WORDS),
            "rejected": text("answer", ANSWER_WORDS),
        }


class Watched:
    """CPU seconds and the peak of anonymous memory of this process and all that it started, while the block runs.

    `store_peak` are bytes of Ray's object store, which are shared memory and in none of these; `spilled` those that it
    has written to disk since Ray was started.
    """

    def __enter__(self) -> Watched:
        self._cluster = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.store_peak = self.spilled = 0
        self._look_at_store()  # what that imports is no memory of the block
        self._before, self.peak, self._cpu = self._now()[0], 0, dict[int, float]()
        self._cpu_before = self._now()[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_seconds(self) -> float:
        """Of processes that ended meanwhile, up to the last time they were seen."""
        return sum(seconds - self._cpu_before.get(pid, 0.0) for pid, seconds in self._cpu.items())

    def _watch(self) -> None:
        while True:
            memory, cpu = self._now()
            self.peak = max(self.peak, memory - self._before)
            self._cpu |= cpu
            self._look_at_store()
            if self._ended.wait(SAMPLED_EVERY):
                return

    def _look_at_store(self) -> None:
        store = get_memory_info_reply(self._cluster).store_stats
        self.store_peak = max(self.store_peak, store.object_store_bytes_used)
        self.spilled = store.spilled_bytes_total

    @staticmethod
    def _now() -> tuple[int, dict[int, float]]:
        memory, cpu = 0, {}
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                memory += anonymous(process.pid)
                times = process.cpu_times()
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
            cpu[process.pid] = times.user + times.system
        return memory, cpu


def anonymous(pid: int) -> int:
    """Bytes of memory that no file backs; a map of a file is in the page cache, which all processes share."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def bare(model: str) -> float:
    """CPU seconds a bundle of the tokenizer alone, one thread, on all texts of `BARE_BUNDLES` bundles."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(model)
    texts = [
        text
        for bundle in synthetic(BARE_BUNDLES)
        for text in (*bundle["prompts"].values(), bundle["chosen"], bundle["rejected"])
    ]
    tokenizer(texts[:100])
    began = time.process_time()
    tokenizer(texts, add_special_tokens=False)
    return (time.process_time() - began) / BARE_BUNDLES


def start(folder: str) -> dict[str, float]:
    """Seconds and bytes of a process that opens the artefact, orders an epoch and plans its first step."""
    before, began = anonymous(os.getpid()), time.perf_counter()
    tokens = TokenArtifact.open(folder)
    order = Order(tokens.keys, seed=0, batch_bundles=32)
    cutting = Cutting(8192, 8, head=tokens.head, rejected=True, taps=lambda _: True, ever_taps=True)
    next(plans(tokens, order, cutting, range(1)))
    return {"start_seconds": time.perf_counter() - began, "start_bytes": anonymous(os.getpid()) - before}


def in_child(function: Any, *args: Any) -> Any:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(number: int, model: str, folder: Path) -> dict[str, float]:
    """Everything about one size."""
    path = folder / f"{number}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(bundle, ensure_ascii=False) + "\n" for bundle in synthetic(number))
    data = DataSection(train=[SourceSection(path=str(path))])
    before = in_child(bare, model)
    with Watched() as watched:
        began = time.perf_counter()
        artifact = prepare_token_rows(data, ModelSection(path=model), cache_dir=folder / "cache")
        seconds = time.perf_counter() - began
    alone = (before + in_child(bare, model)) / 2  # around what it is compared with: other work on the machine varies
    tokens = sum(artifact.counts.prompt_tokens.values()) + artifact.counts.response_tokens
    return {
        "bundles": number, "tokens": tokens, "shards": len(artifact.manifest.shards),
        "bare_seconds": alone, "ratio": alone * number / watched.cpu_seconds,
        "seconds": seconds, "cpu_seconds": watched.cpu_seconds, "peak_bytes": watched.peak,
        "store_peak_bytes": watched.store_peak, "spilled_bytes": watched.spilled,
        **in_child(start, str(artifact.folder)),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=int, nargs="+", default=[30_000, 100_000, 300_000])
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME})")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of the local Ray, and tokenising processes")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    model = options.model or str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    limits = {"num_cpus": options.cpus, "object_store_memory": STORE_BYTES}
    ray.init("local", **limits, include_dashboard=False, log_to_driver=False)
    results = []
    with scratch_folder() as folder:
        for number in options.bundles:
            results.append(measure(number, model, folder))
            text = (
                "{bundles:>9} bundles, {tokens} tokens in {shards} shards: {seconds:.0f} s, {cpu_seconds:.0f} CPU s, "
            )
            text += "{ratio:.0%} of the bare tokenizer's speed; peak {peak:.0f} MB beside {store:.2f} MB of the object "
            text += "store, {spilled:.0f} MB spilled; a run starts in "
            text += "{start_seconds:.2f} s with {start:.1f} MB"
            last = results[-1]
            named = {
                "peak": "peak_bytes",
                "store": "store_peak_bytes",
                "spilled": "spilled_bytes",
                "start": "start_bytes",
            }
            print(text.format(**last, **{name: last[key] / 1e6 for name, key in named.items()}), flush=True)
    if len(results) > 1:
        sizes = [result["bundles"] for result in results]
        for name in ("cpu_seconds", "start_bytes", "start_seconds"):  # the peak is of a few processes, not of bundles
            slope, constant = np.polyfit(sizes, [result[name] for result in results], 1)
            ahead = ", ".join(f"{constant + slope * n:.3g} at {n:,}" for n in EXTRAPOLATED)
            print(f"{name} = {constant:.3g} + {slope:.3g} * bundles: {ahead}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
