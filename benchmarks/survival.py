"""Runs that die at random moments, compared with one that was left alone.

On a Ray of two nodes on this machine, the same run (float32, two workers, ZeRO-2, dropout off, a checkpoint every two
steps) is struck again and again, and started again by the same command, `mlc-ray train --set resume=auto`. In the end
the losses of all steps and the weights must be those of the run that nobody struck, and nothing may be left: no file
half written, no actor, no placement group, no lease. The deaths:

    worker   SIGKILL of a training worker
    driver   SIGKILL of the process that was started
    node     SIGKILL of a Ray node with all that runs on it; another one takes its place
    write    SIGKILL of a worker while a checkpoint is being written
    term     SIGTERM of the driver
    damage   SIGKILL of the driver, then a file of the newest checkpoint is cut short or one of its bits is flipped
    nan      a loss that is NaN once
    full     the disk is full when a checkpoint is due (needs the right to mount a tmpfs)

    python benchmarks/survival.py --deaths worker=20,driver=10,node=5,write=5,damage=5,nan=3,full=3 --out survival.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import Field

from mlc_ray.losses.dpo import Dpo
from mlc_ray.runs import read_metrics

STEPS, EVERY = 12, 2
SECONDS = 400  # the longest that anything is waited for
RAY = str(Path(sys.executable).parent / "ray")


class Stumbling(Dpo):
    """DPO whose steps take a while, so that moments can be met, and whose loss is NaN once when a file asks for it."""

    class Settings(Dpo.Settings):
        """When."""

        pause: float = Field(0.3, description="Seconds that a forward takes longer.")
        stumble: str = Field("", description="A file: the first forward that finds it removes it, and its loss is NaN.")

    settings: Settings

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The loss of each bundle [B]."""
        time.sleep(self.settings.pause)
        found = super().__call__(*arguments, **named)
        with suppress(FileNotFoundError):
            os.unlink(self.settings.stumble)
            return replace(found, loss=found.loss * float("nan"))
        return found


# ------------------------------------------------------------------------------------------------------------ the scene


@dataclass
class Scene:
    """A Ray of two nodes, a model, bundles, and the settings of the run."""

    folder: Path
    seed: int
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True)
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text("0123456789abcdef" * 2)
        # Of this process too, which looks at the cluster.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(self.temporary),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_worker_niceness": "0",  # else whatever runs beside it starves its workers
            "OMP_NUM_THREADS": "1",
        }

    # -------------------------------------------------------------------------------------------------------- cluster

    def start_head(self) -> None:
        """Start the first node, which holds the cluster's state and lives throughout."""
        ports = _free_ports(3)
        self.address = f"127.0.0.1:{ports[0]}"
        options = [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
        self._start_node("--head", "--include-dashboard=true", *options)
        self.environment["RAY_ADDRESS"] = self.address
        _wait(lambda: _answers(self.address), "the head node")

    def start_worker_node(self) -> None:
        """Start the second node."""
        self._start_node(f"--address={self.address}")

    def wait_for_nodes(self) -> None:
        """Wait until the living nodes are those that were started; this process has joined the cluster."""
        import ray

        started = len(self.nodes)
        _wait(lambda: sum(node["Alive"] for node in ray.nodes()) == started, f"{started} nodes")

    def _start_node(self, *options: str) -> None:
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", *options]
        if "--head" in options:  # sockets lie in it: a short path
            command += [f"--temp-dir={tempfile.mkdtemp(prefix='mr', dir='/tmp')}"]
        with (self.folder / "ray.log").open("ab") as log:
            self.nodes.append(
                subprocess.Popen(
                    [*command, "--object-store-memory=200000000"],
                    env=self.environment, stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that runs on the nodes."""
        found = []
        for node in self.nodes:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(node.pid).children(recursive=True)
        return found

    def workers(self) -> list[psutil.Process]:
        """The training workers."""
        return [process for process in self.processes() if "RayTrainWorker" in _title(process)]

    def kill_node(self) -> None:
        """SIGKILL for the second node."""
        node = self.nodes.pop()
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            _kill(process)
        node.wait()

    def close(self) -> None:
        """End all nodes."""
        while self.nodes:
            self.kill_node()

    # ------------------------------------------------------------------------------------------------------- the run

    def prepare(self, model: Path) -> None:
        """Write the run's settings: a small random Llama with the tokenizer of `model`, and bundles of the sample."""
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

        tokenizer = AutoTokenizer.from_pretrained(model)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        sample = Path(__file__).parents[1] / "mlc_ray" / "data" / "sample" / "train.jsonl"
        lines = sample.read_text(encoding="utf-8").splitlines()[:16]
        (self.folder / "bundles.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {
            "name": "run",
            "output_dir": str(self.folder / "runs"),
            "resume": "auto",
            "model": {"path": str(self.folder / "model"), "dtype": "float32"},
            "data": {"train": [{"path": str(self.folder / "bundles.jsonl")}], "languages": ["en", "sw", "zh"]},
            "objective": {"loss": "survival:Stumbling", "stumble": str(self.folder / "stumble")},
            "mlc": {"extractor_dim": 16, "every": 2},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"epochs": 10, "max_steps": STEPS, "batch_bundles": 4},
            "engine": {"stage": 2},
            "cluster": {"address": "auto", "workers": 2, "cpus_per_worker": 0.6, "max_failures": 100},
            "checkpoint": {"every": EVERY, "keep": 3},
            "logging": {"tensorboard": False},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def start(self, name: str, output_dir: Path) -> subprocess.Popen[bytes]:
        """The one command."""
        command = [sys.executable, "-m", "mlc_ray", "train", "--config", str(self.folder / "run.yaml")]
        settings = [f"--set=name={name}", f"--set=output_dir={output_dir}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *settings], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )


@dataclass
class Run:
    """One run under way."""

    scene: Scene
    name: str
    output_dir: Path

    def __post_init__(self) -> None:
        self.starts = 0
        self.start()

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.output_dir / self.name

    def start(self) -> None:
        """Start it, or start it again."""
        self.starts += 1
        self.driver = self.scene.start(self.name, self.output_dir)

    def step(self) -> int:
        """The last optimizer step that was logged."""
        with suppress(Exception):  # a row is being written
            return max((int(row["step"]) for row in read_metrics(self.folder)), default=0)
        return 0

    def until(self, step: int) -> bool:
        """Wait for a step, and a random moment more; False where the run has ended by then."""
        _wait(lambda: self.step() >= step or self.driver.poll() is not None, f"step {step} of {self.name}")
        time.sleep(self.scene.random.uniform(0, 0.6))
        return self.driver.poll() is None

    def kill_driver(self) -> None:
        """SIGKILL for the process that was started."""
        _kill(psutil.Process(self.driver.pid))
        self.driver.wait()

    def end(self, status: int = 0) -> None:
        """Wait for the driver's end."""
        _wait(lambda: self.driver.poll() is not None, f"the end of {self.name}")
        assert self.driver.returncode == status, self.log()

    def log(self) -> str:
        """What the driver said."""
        return (self.scene.folder / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")[-4000:]


# ------------------------------------------------------------------------------------------------------------- deaths


def worker(run: Run) -> None:
    """SIGKILL of a worker."""
    _wait(lambda: bool(run.scene.workers()) or run.driver.poll() is not None, "workers")
    if workers := run.scene.workers():
        _kill(run.scene.random.choice(workers))


def driver(run: Run) -> None:
    """SIGKILL of the driver, and the same command again."""
    run.kill_driver()
    run.start()


def node(run: Run) -> None:
    """SIGKILL of a node, and another in its place."""
    run.scene.kill_node()
    run.scene.start_worker_node()
    run.scene.wait_for_nodes()


def _checkpoints(run: Run, *, whole: bool = False) -> list[Path]:
    """Folders of checkpoints; with `whole`, of those that have their manifest."""
    return sorted((run.folder / "train").glob("checkpoint_??????" + ("/manifest.json" if whole else "")))


def write(run: Run) -> None:
    """SIGKILL of a worker while a checkpoint is written."""

    def writing() -> bool:
        if len(_checkpoints(run)) > len(_checkpoints(run, whole=True)):
            for process in run.scene.workers()[:1]:
                _kill(process)
            return True
        return run.driver.poll() is not None

    _wait(writing, "a checkpoint that is written", every=0.001)


def term(run: Run) -> None:
    """SIGTERM of the driver, which ends cleanly; then the same command again."""
    run.driver.send_signal(signal.SIGTERM)
    _wait(lambda: run.driver.poll() is not None, "the end after SIGTERM")
    run.start()


def damage(run: Run) -> None:
    """A damaged newest checkpoint, where there is one before it: a run whose checkpoints are all damaged ends."""

    _wait(lambda: len(_checkpoints(run, whole=True)) > 1 or run.driver.poll() is not None, "a second checkpoint")
    run.kill_driver()
    _wait(lambda: not run.scene.workers(), "the end of the workers")
    if len(checkpoints := _checkpoints(run, whole=True)) > 1:
        files = [
            path for path in sorted(checkpoints[-1].parent.rglob("*")) if path.is_file() and path.stat().st_size > 8
        ]
        victim = run.scene.random.choice(files)
        content = bytearray(victim.read_bytes())
        if run.scene.random.random() < 0.5:
            del content[len(content) // 2 :]
        else:
            content[run.scene.random.randrange(len(content))] ^= 1 << run.scene.random.randrange(8)
        victim.write_bytes(content)
    run.start()


def nan(run: Run) -> None:
    """A loss that is NaN once."""
    (run.scene.folder / "stumble").touch()


def full(run: Run) -> None:
    """A full disk, until the run has ended by it; then room, and the same command again."""
    filler = run.output_dir / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    _wait(lambda: run.driver.poll() is not None, "the end by a full disk")
    filler.unlink()
    run.start()


DEATHS: dict[str, Callable[[Run], None]] = {
    each.__name__: each for each in (worker, driver, node, write, term, damage, nan, full)
}


# ------------------------------------------------------------------------------------------------------------- the end


def differences(run: Path, undisturbed: Path) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of a parameter by norm; steps and bundles must be equal."""
    from safetensors.torch import load_file

    rows, before = (list(read_metrics(folder)) for folder in (run, undisturbed))
    counted = [[(row["step"], row["bundles_consumed"]) for row in each] for each in (rows, before)]
    assert counted[0] == counted[1], f"steps and bundles of {run}: {counted[0]}"
    losses = max(
        abs(row[name] - other[name]) / abs(other[name])
        for row, other in zip(rows, before, strict=True)
        for name in ("loss/total", "loss/alignment")
    )
    ours, theirs = (
        load_file(folder / "train" / f"checkpoint_{STEPS:06d}" / "model" / "model.safetensors")
        for folder in (run, undisturbed)
    )
    assert ours.keys() == theirs.keys()
    weights = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    return {"losses": losses, "weights": weights}


def left_behind(scene: Scene, run: Run) -> list[str]:
    """Files half written, processes, actors and placement groups that the run should have taken with it."""
    import ray
    from ray.util.state import list_actors

    kept = ".validate_storage_marker"  # Ray Train's
    names = [path for path in run.folder.rglob(".*") if path.name != kept]
    names += [path for path in _checkpoints(run) if not (path / "manifest.json").is_file()]
    names += [path for path in scene.temporary.iterdir() if path.name.startswith("mlc_ray")]
    found = [str(path) for path in names]

    def held() -> list[str]:
        groups = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
        alive = list_actors(address=scene.address, filters=[("state", "=", "ALIVE")])
        own = {"TrainController", "RayTrainWorker", "PlacementGroupCleaner"}
        return [f"placement group {each['placement_group_id']}" for each in groups] + [
            f"actor {each.class_name}" for each in alive if any(name in each.class_name for name in own)
        ]

    deadline = time.monotonic() + 60
    while (now := held()) and time.monotonic() < deadline:
        time.sleep(1)
    return found + now


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """A disk of a few MiB at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def strike(scene: Scene, name: str, deaths: Sequence[str], output_dir: Path) -> dict[str, Any]:
    """A run with these deaths, at moments in their order, to its end."""
    began = time.monotonic()
    run = Run(scene, name, output_dir)
    at = sorted(scene.random.sample(range(1, STEPS - 1), len(deaths)))
    struck = []
    for step, death in zip(at, deaths, strict=True):
        if not run.until(step):
            run.start()  # an earlier death ended it
            run.until(step)
        struck.append(f"{death} at {run.step()}")
        DEATHS[death](run)
    while True:
        _wait(lambda: run.driver.poll() is not None, f"the end of {name}")
        if run.driver.returncode == 0:
            break
        assert run.starts < 3 * len(deaths) + 3, run.log()
        run.start()
    return {"name": name, "deaths": struck, "starts": run.starts, "seconds": time.monotonic() - began, "run": run}


def survive(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All deaths, a few a run; returns a row a run."""
    wanted = dict(part.split("=") for part in options.deaths.split(","))
    if unknown := sorted(wanted.keys() - DEATHS.keys()):
        raise SystemExit(f"--deaths has {unknown[0]!r}; there are {', '.join(DEATHS)}")
    deaths = [name for name, number in wanted.items() for _ in range(int(number)) if name != "full"]
    scene = Scene(folder, options.seed)
    import ray  # reads the token's place at its import

    scene.random.shuffle(deaths)
    scene.prepare(Path(options.model))
    rows = []
    try:
        scene.start_head()
        scene.start_worker_node()
        ray.init(address=scene.address, log_to_driver=False)
        scene.wait_for_nodes()
        alone = Run(scene, "undisturbed", folder / "runs")
        alone.end()

        def judged(row: dict[str, Any]) -> None:
            run = row.pop("run")
            row |= differences(run.folder, alone.folder)
            row["left"] = left_behind(scene, run)
            row["ok"] = row["losses"] <= 1e-6 and row["weights"] <= 1e-6 and not row["left"]
            rows.append(row)
            print(json.dumps(row), flush=True)

        for number in range(0, len(deaths), options.per_run):
            judged(strike(scene, f"struck-{number:03d}", deaths[number : number + options.per_run], folder / "runs"))
        for number in range(int(wanted.get("full", 0))):
            with small_disk(folder / f"disk-{number}", mebibytes=24) as mounted:
                if not mounted:
                    print("full: left out, no right to mount a disk")
                    break
                judged(strike(scene, f"full-{number}", ["full"], folder / f"disk-{number}"))
    finally:
        ray.shutdown()
        scene.close()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Deaths by kind, and how far the runs were from the undisturbed one."""
    kinds = Counter(death.split()[0] for row in rows for death in row["deaths"])
    lines = [
        "| death | times | runs | runs that were equal | largest difference of losses | of weights |",
        "|---" * 6 + "|",
    ]
    for kind, times in kinds.items():
        of = [row for row in rows if any(death.split()[0] == kind for death in row["deaths"])]
        lines.append(
            f"| {kind} | {times} | {len(of)} | {sum(row['ok'] for row in of)} | "
            f"{max(row['losses'] for row in of):.1e} | {max(row['weights'] for row in of):.1e} |"
        )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- tools


def _wait(done: Callable[[], bool], what: str, *, every: float = 0.05) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {SECONDS} s for {what}")
        time.sleep(every)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with suppress(OSError):
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a run did not end as the undisturbed one did."""
    from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
    from mlc_ray.storage import user_cache

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", default="worker=1,driver=1,node=1,write=1,damage=1,nan=1")
    parser.add_argument("--per-run", type=int, default=3, help="deaths that one run lives through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder with a tokenizer (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="a new folder for runs and logs, which stays")
    options = parser.parse_args(arguments)
    options.model = options.model or prepare_smollm2(user_cache() / "models" / MODEL_NAME)
    with tempfile.TemporaryDirectory(prefix="survival-") as temporary:
        folder = options.keep or Path(temporary) / "survival"
        folder.mkdir(parents=True)
        rows = survive(options, folder)
    print(table(rows))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
