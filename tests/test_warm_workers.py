"""Workers that are forked from a warm process are as plain ones: they say what went wrong, and draw their own ids."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from tests.warm_workers import running


def test_what_cannot_be_imported_is_an_error_of_the_worker(tmp_path: Path, repository: Path) -> None:
    for name in ("vllm", "ray"):  # shadowed, so that the warm process can import nothing
        (tmp_path / f"{name}.py").write_text("raise ImportError('a library is missing')")
    (tmp_path / "worker.py").write_text("print('begun', flush=True)\nimport vllm\n")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": f"{tmp_path}:{repository}"}
    with running() as python:
        command = [*shlex.split(python), str(tmp_path / "worker.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "begun\n"
    assert done.stderr.count("ImportError: a library is missing") == 1


def test_forks_draw_ids_of_their_own(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "from threading import Thread\n"
        "from ray._raylet import ObjectID, UniqueID\n"
        "drawn = [kind.from_random().hex() for _ in range(50) for kind in (UniqueID, ObjectID)]\n"
        "for _ in range(50):  # each with generators of its own\n"
        "    thread = Thread(target=lambda: drawn.append(UniqueID.from_random().hex()))\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "print(*drawn)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ids: list[str] = []
    with running() as python:
        for _ in range(3):
            command = [*shlex.split(python), str(script)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
            ids += done.stdout.split()
    assert len(ids) == len(set(ids)) == 450
