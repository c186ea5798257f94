"""Workers of the tests' Ray, forked from processes that have imported what workers need.

Each worker of Ray imports for itself: 8 CPU seconds where it trains (torch, transformers, DeepSpeed), 7 where it
holds an engine (vLLM). Here Ray starts `ask` in Python's place, which hands its arguments, environment and streams to
`serve`; that forks the worker from a process which has imported everything, one for each set of the variables that
are read meanwhile. Ray's own library reads job and node at its import: where workers are of several, each imports it
for itself, in a second. It also seeds there what it draws ids from, and two objects of one id end the worker that
meets them: so as many numbers are left out before each fork as the one before it may draw. Forks of one process share
the seed of its string hashes, so a set of strings has the same order in all of them; plain workers draw a seed each.
Commands that tests start have a Ray of their own, with plain workers.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read while something is imported, so that a worker with other values needs another process to be forked from.
READ_AT_IMPORT = ("DS_", "HF_", "KMP_", "MKL_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_", "VLLM_")
WITHOUT_RAY = (
    "mlc_ray.train.checks",
    "mlc_ray.train.engines.deepspeed",
    "mlc_ray.train.saving",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
TRAINS = (
    *WITHOUT_RAY,
    "mlc_ray.train.worker",
    "mlc_ray.train.reference_pass",
    "ray._private.workers.default_worker",
)
ANSWERS = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "mlc_ray.generate.engine",
    "mlc_ray.generate.pool",
    "mlc_ray.score.scorer",
)
DRAWS, THREADS = 2000, 200
"""Ids that Ray's library draws in a thread of a worker, and threads in which it does, at most."""
Message = tuple[dict[str, Any], list[int]]


@contextlib.contextmanager
def running(*, several: bool = False) -> Iterator[str]:
    """What Ray is to start as `py_executable`; `several` says whether its workers are of several jobs or nodes."""
    # The path of a socket has 107 bytes at most, and those of pytest's folders can have more.
    with tempfile.TemporaryDirectory(prefix="warm-", dir="/tmp") as folder:
        address = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(64)
            kind = "several" if several else "one"
            command = [sys.executable, __file__, "serve", str(listening.fileno()), kind]
            open_files = [listening.fileno()]
            server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=open_files, start_new_session=True)
        with server:  # closes its input, which ends it; so does the end of this process, however it comes
            yield shlex.join([sys.executable, "-I", "-S", __file__, "ask", address])


def ask(address: str, arguments: list[str]) -> None:
    """Have a worker forked that runs `arguments`, and stay as long as it does: Ray knows this process as the worker."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        told = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        _send(connection, told, [0, 1, 2])
        connection.recv(1)  # nothing, once the worker has ended


def serve(listening: socket.socket, kind: str) -> None:
    """Hand every worker that is asked for to the process that it is to be forked from."""
    warm: dict[frozenset[tuple[str, str]], socket.socket] = {}
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if (message := _receive(connection)) is None:
            continue
        told, streams = message
        environment = dict(told["environment"])
        key = frozenset((name, value) for name, value in environment.items() if name.startswith(READ_AT_IMPORT))
        if key not in warm:
            warm[key], other = socket.socketpair()
            # Ray sets it to the CPUs of an actor, a part of one here, before that imports torch.
            environment.setdefault("OMP_NUM_THREADS", "1")
            with other:
                command = [sys.executable, __file__, "fork", str(other.fileno()), kind]
                subprocess.Popen(command, env=environment, pass_fds=[other.fileno()])
        try:
            _send(warm[key], told, [*streams, connection.fileno()])
        except BrokenPipeError:  # it was killed, or has crashed; Ray asks again
            del warm[key]
        connection.close()
        for stream in streams:
            os.close(stream)


def fork(asked: socket.socket, kind: str) -> None:
    """Import, and fork a worker at each message, which keeps `ask`'s connection open until it ends."""
    trains = WITHOUT_RAY if kind == "several" else TRAINS
    for name in ANSWERS if "VLLM_ENABLE_V1_MULTIPROCESSING" in os.environ else trains:
        try:
            importlib.import_module(name)
        except Exception:  # the workers meet it again, where a test sees it; Ray would start one that ends for ever
            traceback.print_exc()
    gc.freeze()  # a collection would write into what all of them share
    atexit.register(gc.unfreeze)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while (message := _receive(asked)) is not None:
        told, descriptors = message
        _draw()
        # Not for one that Ray has given up meanwhile.
        if not select.select(descriptors[3:], [], [], 0)[0] and os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)  # as Ray's: of a worker that has died, it kills the whole group
            asked.close()
            for number, stream in enumerate(descriptors[:3]):
                os.dup2(stream, number)
                os.close(stream)
            _become(told)
        for each in descriptors:
            os.close(each)
    os._exit(0)  # to tear down what was imported takes a second or two


def _draw() -> None:
    """Have Ray's library go on with other ids than the forks so far: 0.9 us each, and 0.1 ms a thread."""
    if (raylet := sys.modules.get("ray._raylet")) is None:
        return
    for _ in range(DRAWS):
        raylet.UniqueID.from_random()
        raylet.ObjectID.from_random()  # by a generator of its own
    for _ in range(THREADS):  # a thread's generators are seeded, when it first draws, by one of the process
        thread = threading.Thread(target=raylet.UniqueID.from_random)
        thread.start()
        thread.join()


def _become(told: dict[str, Any]) -> None:
    """Run a script as Python would from the command line."""
    script, *_ = sys.argv = list(told["arguments"])
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    sys.exit()


def _send(connection: socket.socket, told: dict[str, Any], descriptors: list[int]) -> None:
    """A message is its length in 8 bytes, with the open files, and then itself."""
    content = json.dumps(told).encode()
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], descriptors)
    connection.sendall(content)


def _receive(connection: socket.socket) -> Message | None:
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 4)
    if not head:
        return None
    content = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return json.loads(content), descriptors


if __name__ == "__main__":
    role, given, *rest = sys.argv[1:]
    if role == "ask":
        ask(given, rest)
    else:
        {"serve": serve, "fork": fork}[role](socket.socket(fileno=int(given)), *rest)
