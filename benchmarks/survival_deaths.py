"""The deaths that `survival.py` has a run die, each a function that is called at a random moment of a run.

Each returns whether it struck what it was meant to: by then the run may be over, or what it strikes may have ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from survival_scene import Run, kill, wait

from mlc_ray.runs import artifact_cache, is_set_aside
from mlc_ray.storage import MANIFEST, Place


def worker(run: Run) -> bool:
    """SIGKILL of a worker."""
    wait(lambda: bool(run.scene.workers()) or run.ended(), "workers")
    workers = run.scene.workers()
    return bool(workers) and kill(run.scene.random.choice(workers))


def driver(run: Run) -> bool:
    """SIGKILL of the driver, and the same command again."""
    struck = run.kill_driver()
    run.start()
    return struck


def prepare(run: Run) -> bool:
    """SIGKILL of the driver while it makes the token rows, and the same command again."""
    cache = Path(artifact_cache(Place(run.output_dir)))
    wait(lambda: any(cache.glob(".tokens-*.tmp-*")) or run.ended(), "token rows that are being made")
    time.sleep(run.scene.random.uniform(0, 5))
    struck = run.kill_driver() and any(cache.glob(".tokens-*.tmp-*"))
    run.start()
    return struck


def node(run: Run) -> bool:
    """SIGKILL of a node that trains, and another in its place."""
    wait(lambda: bool(run.scene.workers(last_node=True)) or run.ended(), "a worker on the second node")
    struck = bool(run.scene.workers(last_node=True))
    run.scene.kill_node()
    run.scene.start_worker_node()  # it is there some seconds later, and another death may come before
    return struck


def write(run: Run) -> bool:
    """SIGKILL of a worker while a checkpoint is written, which is not completed then."""
    wait(lambda: _written(run) is None or run.ended(), "the end of what is written now, or was left by another death")
    wait(lambda: _written(run) is not None or run.ended(), "a checkpoint that is written", every=0.001)
    workers, checkpoint = run.scene.workers(), _written(run)
    if checkpoint is None or not workers or not kill(run.scene.random.choice(workers)):
        return False
    psutil.wait_procs(workers, timeout=60)  # Ray ends the others
    return not (checkpoint / MANIFEST).is_file()


def _written(run: Run) -> Place | None:
    """The checkpoint that has no manifest yet; one that is being removed has lost its own, but is not the newest."""
    newest = run.checkpoints()[-1:]
    return newest[0] if newest and newest != run.checkpoints(whole=True)[-1:] else None


def term(run: Run) -> bool:
    """SIGTERM of the driver, which ends cleanly; then the same command again."""
    run.driver.send_signal(signal.SIGTERM)
    wait(run.ended, "the end after SIGTERM")
    struck = run.driver.returncode == 128 + signal.SIGTERM
    run.start()
    return struck


def damage(run: Run) -> bool:
    """A damaged newest checkpoint, which is passed over for the one before; where there is none, a run would end."""
    wait(lambda: len(_undamaged(run)) > 1 or run.ended(), "a second checkpoint")
    struck = run.kill_driver()
    wait(lambda: not run.scene.workers(), "the end of the workers")
    return _start_on_damage(run) if struck else _start(run)


def last(run: Run) -> bool:
    """A damaged last checkpoint of a run that has ended: it has not, and goes on from the one before."""
    wait(run.ended, "the end of the run")
    return _start_on_damage(run) if run.driver.returncode == 0 else _start(run)


def _start(run: Run) -> bool:
    run.start()
    return False


def _start_on_damage(run: Run) -> bool:
    """Cut a file of the newest checkpoint short or flip one of its bits, and start the run; whether that was seen."""
    checkpoints = _undamaged(run)
    if len(checkpoints) < 2:
        return _start(run)
    files = sorted(Path(checkpoints[-1]).rglob("*"))
    victim = run.scene.random.choice([path for path in files if path.is_file() and path.stat().st_size > 8])
    content = bytearray(victim.read_bytes())
    if run.scene.random.random() < 0.5:
        del content[len(content) // 2 :]
    else:
        content[run.scene.random.randrange(len(content))] ^= 1 << run.scene.random.randrange(8)
    victim.write_bytes(content)
    run.start()
    wait(lambda: is_set_aside(checkpoints[-1]) or run.ended(), f"the warning of {victim}")
    seen = is_set_aside(checkpoints[-1])
    assert seen or run.driver.returncode != 0, f"{victim} was damaged, and was used"
    return seen  # else the run ended by itself before it looked there


def _undamaged(run: Run) -> list[Place]:
    return [folder for folder in run.checkpoints(whole=True) if not is_set_aside(folder)]


def nan(run: Run) -> bool:
    """A loss that is NaN once."""
    file = run.scene.folder / "stumble"
    file.touch()
    wait(lambda: not file.exists() or run.ended(), "a forward that stumbles")
    struck = not file.exists()
    file.unlink(missing_ok=True)
    return struck


def full(run: Run) -> bool:
    """A disk that is full until it has refused a checkpoint, or the run has ended, and a random while longer."""
    filler = Path(run.output_dir) / "filler"
    before = run.log().count(_REFUSED)

    def refused() -> bool:
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:  # again and again: what is removed leaves room
                file.write(bytes(1 << 16))
        return run.log().count(_REFUSED) > before or run.ended()

    wait(refused, "a refused checkpoint")
    until = time.monotonic() + run.scene.random.uniform(0, 15)
    while time.monotonic() < until:
        refused()
        time.sleep(0.05)
    filler.unlink()
    return run.log().count(_REFUSED) > before


def server(run: Run) -> bool:
    """SIGKILL of the object store that the run writes to; it is back before the retries are over, or after that."""
    return _is_away(run, run.scene.random.choice([run.scene.random.uniform(2, 8), run.scene.random.uniform(20, 40)]))


def away(run: Run) -> bool:
    """SIGKILL of the object store, which is back once a lease that nobody renewed has ended."""
    return _is_away(run, 90.0)  # a lease lives 60


def _is_away(run: Run, seconds: float) -> bool:
    """Have the store away for so long; whether the run, or its driver, asked for something meanwhile."""
    before = run.log().count(_NO_ANSWER)
    run.scene.server.kill()
    time.sleep(seconds)
    run.scene.server.start()
    return run.log().count(_NO_ANSWER) > before


_REFUSED = "could not be written: "
_NO_ANSWER = "cannot be used: "

DEATHS: dict[str, Callable[[Run], bool]] = {
    each.__name__: each for each in (worker, driver, prepare, node, write, term, damage, last, nan, full, server, away)
}
