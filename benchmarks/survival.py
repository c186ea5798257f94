"""Runs that die at random moments, compared with one that was left alone.

On a Ray of two nodes on this machine, the same run (float32, two workers, ZeRO-2, dropout off, a checkpoint every two
steps) is struck again and again, and started again by the same command, `mlc-ray train --set resume=auto`. In the end
the losses of all steps and the weights must be those of the run that nobody struck, and nothing may be left: no file
half written, no actor, no placement group, no lease. A death that found nothing to strike, since the run was over by
then or the process had ended, is not counted, and is repeated in a later run. The deaths:

    worker   SIGKILL of a training worker
    driver   SIGKILL of the process that was started
    prepare  SIGKILL of the process that was started while it prepares the data
    node     SIGKILL of a Ray node with all that runs on it; another one takes its place
    write    SIGKILL of a worker while a checkpoint is being written
    term     SIGTERM of the driver
    damage   SIGKILL of the driver, then a file of the newest checkpoint is cut short or one of its bits is flipped
    last     the same with the last checkpoint of a run that has ended, and the same command again
    nan      a loss that is NaN once
    full     the disk is full until it has refused a checkpoint, and longer (needs the right to mount a tmpfs)
    server   SIGKILL of the object store that the run is on, a SeaweedFS, which is started again some seconds later
    away     the same, for 90 s: longer than a lease lives that is not renewed

    python benchmarks/survival.py --out survival.json \\
        --deaths worker=20,driver=10,prepare=3,node=5,write=5,damage=5,last=3,nan=3,full=3,server=3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

from survival_deaths import DEATHS
from survival_scene import SECONDS, STEPS, Run, Scene, small_disk, wait

from mlc_ray.runs import LEASE_FILE, STOP_FILE, artifact_cache, checkpoint_folder, read_metrics
from mlc_ray.storage import Place

sys.path.append(str(Path(__file__).parents[1]))
from tests import warm_workers
from tests.s3_server import running

TENSORBOARD = ["logging.tensorboard=true"]
RESTARTING = ("worker", "driver", "node")
"""Deaths behind which the seconds to the next step are taken."""
ON_THE_STORE = ("server", "away")
"""Deaths of runs that are on an object store."""
APART = ("prepare", "full", *ON_THE_STORE)
"""Deaths that a run dies alone, in a place of its own."""
TRIES = 3
"""How often a death is repeated, at most, until it strikes."""


def differences(run: Place, undisturbed: Place) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of a parameter by norm; steps and bundles must be equal."""
    from safetensors.torch import load

    rows, before = (list(read_metrics(folder)) for folder in (run, undisturbed))
    counted = [[(row["step"], row["bundles_consumed"]) for row in each] for each in (rows, before)]
    assert counted[0] == counted[1], f"steps and bundles of {run}: {counted[0]}"
    losses = max(
        abs(row[name] - other[name]) / abs(other[name])
        for row, other in zip(rows, before, strict=True)
        for name in ("loss/total", "loss/alignment")
    )
    ours, theirs = ({}, {})
    for folder, weights_of in ((run, ours), (undisturbed, theirs)):
        with (checkpoint_folder(folder, STEPS) / "model" / "model.safetensors").open() as file:
            weights_of |= load(file.read())
    assert ours.keys() == theirs.keys()
    weights = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    return {"losses": losses, "weights": weights}


SWEEP = "from mlc_ray.storage import scratch_folder\nwith scratch_folder(): pass"


def half_made(run: Run) -> list[str]:
    """Files that are half written, in the run's folder, in what it prepared, and in what it keeps on this machine."""
    kept = (".validate_storage_marker", ".lock")  # Ray Train's, and those of copies
    found = []
    for place in (run.folder, artifact_cache(Place(run.output_dir)), Place(run.scene.folder / "cache")):
        files = [Path(name) for name in place.sizes() if not name.endswith(kept)]
        found += [f"{place}/{path}" for path in files if any(part[0] == "." for part in path.parts)]
    return found


def left_behind(run: Run) -> list[str]:
    """Files half written, processes, actors and placement groups that the run should have taken with it."""
    import ray
    from ray.util.state import list_actors

    scene, found = run.scene, half_made(run)
    found += [str(path) for path in run.checkpoints() if path not in run.checkpoints(whole=True)]
    found += [name for name in (LEASE_FILE, STOP_FILE) if (run.folder / name).is_file()]

    def held() -> list[str]:
        scratch = list(scene.temporary.glob(".mlc_ray-scratch-*"))
        for path in scratch:
            os.utime(path, (0, 0))  # it is taken for abandoned after some seconds
        if scratch:  # killed processes cannot remove them: the next one does, but for those in use
            subprocess.run([sys.executable, "-c", SWEEP], env=scene.environment, check=True)
        groups = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
        alive = list_actors(address=scene.address, filters=[("state", "=", "ALIVE")])
        own = {"TrainController", "RayTrainWorker", "PlacementGroupCleaner"}
        return [
            *(str(path) for path in scene.temporary.iterdir() if path.name not in scene.kept),
            *(f"placement group {each['placement_group_id']}" for each in groups),
            *(f"actor {each.class_name}" for each in alive if any(name in each.class_name for name in own)),
        ]

    deadline = time.monotonic() + 60
    while (now := held()) and time.monotonic() < deadline:
        time.sleep(1)
    return found + now


def strike(run: Run, deaths: Sequence[str], row: dict[str, list[str]]) -> None:
    """Have a run die these deaths, in their order, and see it to its end.

    Each is then in the row's `deaths` or, where it did not strike or was not come to, in `missed`. One that raises an
    error has struck.
    """
    at = [0] if deaths == ["prepare"] else sorted(run.scene.random.sample(range(1, STEPS - 1), len(deaths)))
    try:
        for step, death in zip(at, deaths, strict=True):
            while not run.until(step) and run.driver.returncode != 0:
                run.start_again()  # an earlier death ended it
            row["deaths"].append(f"{death} at {run.step()}")
            before = run.rows()
            if run.ended() or not DEATHS[death](run):
                row["missed"].append(row["deaths"].pop())
            elif death in RESTARTING:
                row["restarts"].append([death, seconds_to_a_step(run, before)])
        while True:
            wait(run.ended, f"the end of {run.name}")
            if run.driver.returncode == 0:
                break
            run.start_again()
    finally:
        row["missed"] += deaths[len(row["deaths"]) + len(row["missed"]) :]


def seconds_to_a_step(run: Run, before: tuple[int, int]) -> float:
    """Seconds until a run that was struck has taken a step again, started by the same command where its driver ended.

    `before` are its rows before; each start writes a new file of them.
    """
    began, kept = time.monotonic(), None
    while True:
        if run.ended() and run.driver.returncode != 0:
            run.start_again()
        now = run.rows()
        if now[0] != before[0]:
            kept = now if kept is None or kept[0] != now[0] else kept
            if now[1] > kept[1] or run.ended():
                return time.monotonic() - began
        assert time.monotonic() - began < 2 * SECONDS, run.log()[-4000:]
        time.sleep(0.05)


def lived(run: Run, deaths: Sequence[str], alone: Run) -> dict[str, Any]:
    """What became of a run with these deaths, as a row."""
    began = time.monotonic()
    row: dict[str, Any] = {
        "name": run.name,
        "deaths": [],
        "missed": [],
        "restarts": [],
        "losses": inf,
        "weights": inf,
        "error": None,
    }
    try:
        strike(run, deaths, row)
        row |= differences(run.folder, alone.folder)
    except Exception as error:  # whatever it is, the other runs are still worth to be seen
        row["error"] = f"{type(error).__name__}: {error}"
        run.kill_driver()
    try:
        row["left"] = left_behind(run)
    except Exception as error:
        row["left"] = [f"not known: {type(error).__name__}: {error}"]
    row |= {"starts": run.starts, "seconds": time.monotonic() - began}
    row["ok"] = row["losses"] <= 1e-6 and row["weights"] <= 1e-6 and not row["left"]
    return row


def survive(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All deaths, a few a run; returns a row a run."""
    wanted = dict(part.split("=") for part in options.deaths.split(","))
    if unknown := sorted(wanted.keys() - DEATHS.keys()):
        raise SystemExit(f"--deaths has {unknown[0]!r}; there are {', '.join(DEATHS)}")
    deaths = [name for name, number in wanted.items() for _ in range(int(number)) if name not in APART]
    scene = Scene(folder, options.seed)
    import ray  # reads the token's place at its import

    scene.random.shuffle(deaths)
    scene.prepare(Path(options.model))
    rows = []
    with ExitStack() as stack:
        stack.callback(scene.close)
        if on_the_store := [name for name in ON_THE_STORE if name in wanted]:
            bucket = scene.start_server(stack.enter_context(running(_made(folder / "server"))))
        if options.warm:
            scene.fork_workers(stack.enter_context(warm_workers.running(several=True)))
        scene.start_head()
        scene.start_worker_node()
        ray.init(address=scene.address, log_to_driver=False)
        stack.callback(ray.shutdown)
        scene.wait_for_nodes()
        began = time.monotonic()
        alone = Run(scene, "undisturbed", folder / "runs")
        alone.end()
        undisturbed = time.monotonic() - began
        # Ray's dashboard and PyTorch have folders there; a run that nobody struck leaves none of this package's.
        scene.kept = {path.name for path in scene.temporary.iterdir() if "mlc_ray" not in path.name}

        def with_prepared(output_dir: Path | Place) -> None:
            """Have what the undisturbed run prepared there too: each time it would take a third of the run."""
            where = artifact_cache(Place(output_dir))
            where.storage.publish(folder / "runs" / "cache", str(where))

        def live(name: str, deaths: Sequence[str], output_dir: Path | Place, settings: Sequence[str] = ()) -> None:
            rows.append(lived(Run(scene, name, output_dir, settings), deaths, alone) | {"undisturbed": undisturbed})
            print(json.dumps(rows[-1]), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")

        tries = Counter[str]()
        while deaths:
            now, deaths = deaths[: options.per_run], deaths[options.per_run :]
            live(f"struck-{len(rows):03d}", now, folder / "runs")
            for death in (each.split()[0] for each in rows[-1]["missed"]):
                tries[death] += 1
                if tries[death] < TRIES * int(wanted[death]):
                    deaths.append(death)

        def until_struck(death: str, number: int, output_dir: Path | Place) -> None:
            for again in range(TRIES):
                where = output_dir / str(again) if death == "prepare" else output_dir  # one without prepared data
                live(f"{death}-{number}-{again}", [death], where, TENSORBOARD)
                if rows[-1]["deaths"]:
                    break

        for number in range(int(wanted.get("prepare", 0))):
            until_struck("prepare", number, folder / f"unprepared-{number}")
        for number in range(int(wanted.get("full", 0))):
            with small_disk(folder / f"disk-{number}", mebibytes=192) as mounted:  # five checkpoints of 28 MB, and more
                if not mounted:
                    print("full: left out, no right to mount a disk")
                    break
                with_prepared(folder / f"disk-{number}")
                until_struck("full", number, folder / f"disk-{number}")
        if on_the_store:
            with_prepared(bucket)
        for name in on_the_store:
            for number in range(int(wanted[name])):
                until_struck(name, number, bucket)
    return rows


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Deaths that struck by kind, and how far the runs were from the undisturbed one; last, of all runs."""
    kinds = Counter(_kinds(rows))
    lived_through = {kind: [row for row in rows if kind in _kinds([row])] for kind in kinds} | {"all": rows}
    lines = [
        "| death | times | runs | equal, with nothing left | largest difference of losses | of weights |",
        "|---" * 6 + "|",
    ]
    for kind, of in lived_through.items():
        times = kinds[kind] if kind in kinds else kinds.total()
        losses, weights = (max((row[name] for row in of), default=0.0) for name in ("losses", "weights"))
        lines.append(
            f"| {kind} | {times} | {len(of)} | {sum(row['ok'] for row in of)} | {losses:.1e} | {weights:.1e} |"
        )
    return "\n".join(lines)


def _kinds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The kind of each death that struck."""
    return [death.split()[0] for row in rows for death in row["deaths"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a run did not end as the undisturbed one did, or a death never struck."""
    from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
    from mlc_ray.storage import user_cache

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", default="worker=1,driver=1,node=1,write=1,damage=1,nan=1")
    parser.add_argument("--per-run", type=int, default=3, help="deaths that one run lives through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="fork workers from a process that has imported much")
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
    wanted = {name: int(number) for name, number in (part.split("=") for part in options.deaths.split(","))}
    if never := Counter(wanted) - Counter(_kinds(rows)):
        print("did not strike:", ", ".join(f"{name} {times} times" for name, times in never.items()))
    return 0 if all(row["ok"] for row in rows) and not never else 1


if __name__ == "__main__":
    raise SystemExit(main())
