"""The JSON lines of a run (`logging.json_lines`), in `logs/` of its folder, wherever that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

from mlc_ray.config import TrainConfig
from mlc_ray.json_logs import JsonLines, json_lines
from mlc_ray.runs import LOGS_FOLDER, names_of
from mlc_ray.storage import Place, local_side
from mlc_ray.train.mirror import Mirror


@contextmanager
def log_file(config: TrainConfig, run_folder: Place, rank: int | None = None) -> Iterator[JsonLines | None]:
    """Keep what this process logs while the block runs; None where that is not asked for.

    Args:
        config: the run's settings.
        run_folder: its folder; of one at a URL, the file is kept on this machine and sent there.
        rank: the worker's; None for the driver.
    """
    if not config.logging.json_lines:
        yield None
        return
    name = "driver" if rank is None else f"worker-{rank:05d}"
    run, trial = names_of(run_folder)
    sent: AbstractContextManager[object]
    if run_folder.is_local:
        file, sent = Path(run_folder) / LOGS_FOLDER / f"{name}.jsonl", nullcontext()
    else:
        own = local_side(run_folder) / f"{LOGS_FOLDER}-{name}"
        file = own / f"{name}.jsonl"
        sent = closing(Mirror(own, run_folder / LOGS_FOLDER, (file.name,), lambda: None, unsent=True, what="logs"))
    with sent, json_lines(file, run=run, trial=trial, worker=rank) as lines:
        yield lines
