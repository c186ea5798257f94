"""The deaths that `survival.py` has a run die, each a function that is called at a random moment of a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from survival_scene import Run, kill, wait


def worker(run: Run) -> None:
    """SIGKILL of a worker."""
    wait(lambda: bool(run.scene.workers()) or run.driver.poll() is not None, "workers")
    if workers := run.scene.workers():
        kill(run.scene.random.choice(workers))


def driver(run: Run) -> None:
    """SIGKILL of the driver, and the same command again."""
    run.kill_driver()
    run.start()


def node(run: Run) -> None:
    """SIGKILL of a node, and another in its place."""
    run.scene.kill_node()
    run.scene.start_worker_node()
    run.scene.wait_for_nodes()


def write(run: Run) -> None:
    """SIGKILL of a worker while a checkpoint is written."""

    def writing() -> bool:
        if len(run.checkpoints()) > len(run.checkpoints(whole=True)):
            for process in run.scene.workers()[:1]:
                kill(process)
            return True
        return run.driver.poll() is not None

    wait(writing, "a checkpoint that is written", every=0.001)


def term(run: Run) -> None:
    """SIGTERM of the driver, which ends cleanly; then the same command again."""
    run.driver.send_signal(signal.SIGTERM)
    wait(lambda: run.driver.poll() is not None, "the end after SIGTERM")
    run.start()


def damage(run: Run) -> None:
    """A damaged newest checkpoint, where there is one before it: a run whose checkpoints are all damaged ends."""

    wait(lambda: len(run.checkpoints(whole=True)) > 1 or run.driver.poll() is not None, "a second checkpoint")
    run.kill_driver()
    wait(lambda: not run.scene.workers(), "the end of the workers")
    if len(checkpoints := run.checkpoints(whole=True)) > 1:
        files = sorted(Path(checkpoints[-1]).rglob("*"))
        victim = run.scene.random.choice([path for path in files if path.is_file() and path.stat().st_size > 8])
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
    """A disk that is full until it has refused a checkpoint, or the run has ended, and a random while longer."""
    filler = Path(run.output_dir) / "filler"
    before = run.log().count(_REFUSED)

    def refused() -> bool:
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:  # again and again: what is removed leaves room
                file.write(bytes(1 << 16))
        return run.log().count(_REFUSED) > before or run.driver.poll() is not None

    wait(refused, "a refused checkpoint")
    until = time.monotonic() + run.scene.random.uniform(0, 15)
    while time.monotonic() < until:
        refused()
        time.sleep(0.05)
    filler.unlink()


def server(run: Run) -> None:
    """SIGKILL of the object store that the run writes to; it is back before the retries are over, or after that."""
    run.scene.server.kill()
    time.sleep(run.scene.random.choice([run.scene.random.uniform(2, 8), run.scene.random.uniform(20, 40)]))
    run.scene.server.start()


_REFUSED = "could not be written: "

DEATHS: dict[str, Callable[[Run], None]] = {
    each.__name__: each for each in (worker, driver, node, write, term, damage, nan, full, server)
}
