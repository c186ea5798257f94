"""What the runs of `survival.py` run on: a Ray of two nodes on this machine, an object store, a disk that gets full."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import Field

from mlc_ray.losses.dpo import Dpo
from mlc_ray.runs import METRICS_FILE, checkpoint_folders, read_metrics
from mlc_ray.storage import MANIFEST, Place

STEPS, EVERY = 12, 2
SECONDS = 400  # the longest that anything is waited for
MOST_STARTS = 20  # of one run
RAY = str(Path(sys.executable).parent / "ray")


class Stumbling(Dpo):
    """DPO whose steps take a while, so that moments can be met, and whose loss is NaN once when a file asks for it."""

    class Settings(Dpo.Settings):
        """When."""

        pause: float = Field(0.3, description="Seconds that a forward takes longer.")
        stumble: str = Field("", description="A file: the first forward that finds it removes it, and its loss is NaN.")
        hold: str = Field("", description="A file: forwards wait while it is there.")

    settings: Settings

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The loss of each bundle [B]."""
        time.sleep(self.settings.pause)
        while self.settings.hold and os.path.exists(self.settings.hold):
            time.sleep(0.1)
        found = super().__call__(*arguments, **named)
        with suppress(FileNotFoundError):
            os.unlink(self.settings.stumble)
            return replace(found, loss=found.loss * float("nan"))
        return found


@dataclass
class Scene:
    """A Ray of two nodes, a model, bundles, and the settings of the run."""

    folder: Path
    seed: int
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""
    kept: set[str] = field(default_factory=set)  # temporary files that no run leaves
    server: Any = None  # a `tests.s3_server.S3Server`, where a run writes to one
    warm: bool = False  # whether workers are forked from a process of `tests.warm_workers`

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
            # A node whose raylet is gone is dead after 3 looks, 1.5 s; by default after 5 looks, 15 s.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            "OMP_NUM_THREADS": "1",
            # Nothing is compiled on CPU, but DeepSpeed's Muon would be: 3 s of imports in every worker.
            "TORCHDYNAMO_DISABLE": "1",
            "MLC_RAY_CACHE": str(self.folder / "cache"),
        }

    def start_server(self, server: Any) -> Place:
        """Have the nodes, which are not started yet, know an object store; returns a place in it."""
        self.server = server
        os.environ |= server.environment
        self.environment |= server.environment
        return Place(server.make_bucket("survival")) / "runs"

    def fork_workers(self, python: str) -> None:
        """Have runs start Ray's workers by this command, one of `tests.warm_workers`."""
        self.warm = True
        self.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"py_executable": python}})

    # -------------------------------------------------------------------------------------------------------- cluster

    def start_head(self) -> None:
        """Start the first node, which holds the cluster's state and lives throughout."""
        ports = _free_ports(3)
        self.address = f"127.0.0.1:{ports[0]}"
        options = [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
        self._start_node("--head", "--include-dashboard=true", *options)
        self.environment["RAY_ADDRESS"] = self.address
        wait(lambda: _answers(self.address), "the head node")

    def start_worker_node(self) -> None:
        """Start the second node."""
        self._start_node(f"--address={self.address}")

    def wait_for_nodes(self) -> None:
        """Wait until the living nodes are those that were started; this process has joined the cluster."""
        import ray

        started = len(self.nodes)
        wait(lambda: sum(node["Alive"] for node in ray.nodes()) == started, f"{started} nodes")

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

    def workers(self, *, last_node: bool = False) -> list[psutil.Process]:
        """The training workers; with `last_node`, those on the node that was started last."""
        # A forked one is no child of its node; of two, each is on a node of its own, which has no room for another.
        roots = [os.getpid()] if self.warm else [node.pid for node in (self.nodes[-1:] if last_node else self.nodes)]
        found: list[psutil.Process] = []
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(root).children(recursive=True)
        workers = [process for process in found if "RayTrainWorker" in _title(process)]
        return workers if not (self.warm and last_node) or len(workers) == 2 else []

    def kill_node(self) -> None:
        """SIGKILL for the second node."""
        node = self.nodes.pop()
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            kill(process)
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
            "objective": {
                "loss": "survival_scene:Stumbling",
                "stumble": str(self.folder / "stumble"),
                "hold": str(self.folder / "hold"),
            },
            "mlc": {"extractor_dim": 16, "every": 2},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"epochs": 10, "max_steps": STEPS, "batch_bundles": 4},
            "engine": {"stage": 2},
            "cluster": {"address": "auto", "workers": 2, "cpus_per_worker": 0.6, "max_failures": 100},
            "checkpoint": {"every": EVERY, "keep": 3},
            "logging": {"tensorboard": False},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def start(self, name: str, output_dir: Path | Place, settings: Sequence[str]) -> subprocess.Popen[bytes]:
        """The one command; `settings` are `section.field=value`."""
        command = [sys.executable, "-m", "mlc_ray", "train", "--config", str(self.folder / "run.yaml")]
        given = [f"--set={each}" for each in (f"name={name}", f"output_dir={output_dir}", *settings)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *given], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )


@dataclass
class Run:
    """One run under way."""

    scene: Scene
    name: str
    output_dir: Path | Place
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.starts = 0
        self.start()

    @property
    def folder(self) -> Place:
        """Where it writes."""
        return Place(self.output_dir) / self.name

    def start(self) -> None:
        """Start it, or start it again."""
        self.starts += 1
        self.driver = self.scene.start(self.name, self.output_dir, self.settings)

    def start_again(self) -> None:
        """Start it where it has ended with an error, as often as is sensible."""
        assert self.starts < MOST_STARTS, self.log()[-4000:]
        self.start()

    def step(self) -> int:
        """The last optimizer step that was logged."""
        with suppress(Exception):  # a row is being written, or the store is away
            return max((int(row["step"]) for row in read_metrics(self.folder)), default=0)
        return 0

    def rows(self) -> tuple[int, int]:
        """Which file has the rows of metrics, a new one for each start, and how many they are; only on a disk."""
        if not self.folder.is_local:
            return 0, 0
        with suppress(OSError):
            file = Path(self.folder / METRICS_FILE)
            return file.stat().st_ino, file.read_bytes().count(b"\n")
        return 0, 0

    def until(self, step: int) -> bool:
        """Wait for a step, and a random moment more; False where the run has ended by then."""
        wait(lambda: self.step() >= step or self.ended(), f"step {step} of {self.name}")
        time.sleep(self.scene.random.uniform(0, 0.6))
        return not self.ended()

    def ended(self) -> bool:
        """Whether the driver has."""
        return self.driver.poll() is not None

    def kill_driver(self) -> bool:
        """SIGKILL for the process that was started; False where it had ended by itself."""
        self.driver.kill()
        return self.driver.wait() == -signal.SIGKILL

    def end(self, status: int = 0) -> None:
        """Wait for the driver's end."""
        wait(self.ended, f"the end of {self.name}")
        assert self.driver.returncode == status, self.log()[-4000:]

    def checkpoints(self, *, whole: bool = False) -> list[Place]:
        """Folders of checkpoints; with `whole`, of those that have their manifest."""
        # Stores list a folder for a while after its last file is gone.
        folders = [folder for _, folder in checkpoint_folders(self.folder) if folder.is_dir()]
        return [folder for folder in folders if (folder / MANIFEST).is_file()] if whole else folders

    def log(self) -> str:
        """What the driver said."""
        return (self.scene.folder / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")


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


def wait(done: Callable[[], bool], what: str, *, every: float = 0.05) -> None:
    """Wait until something is done, `SECONDS` at most; `what` is for the error."""
    deadline = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {SECONDS} s for {what}")
        time.sleep(every)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def kill(process: psutil.Process) -> bool:
    """SIGKILL; False where the process had ended already."""
    with suppress(psutil.NoSuchProcess):
        lives = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        process.send_signal(signal.SIGKILL)
        return lives
    return False


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
