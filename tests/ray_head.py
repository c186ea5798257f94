"""A Ray of its own on this machine, beside any other: own ports, own folder, own token."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

RAY = str(Path(sys.executable).parent / "ray")
START_SECONDS = 90


@dataclass(frozen=True)
class Head:
    """`address` is its dashboard's, which jobs are submitted to; `gcs` what nodes and drivers join."""

    address: str
    gcs: str
    environment: dict[str, str]
    folder: Path


def die_with_the_tests() -> None:
    """In the head, before it starts: end it when the tests are killed and no fixture can (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@contextmanager
def running(*options: str) -> Iterator[Head]:
    """A head of two CPUs, with a dashboard, in a process group of its own; its folder has a short path for sockets.

    `options` are further ones of `ray start`.
    """
    folder = Path(tempfile.mkdtemp(prefix="mlcray", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 2)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the job's `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    port, dashboard, client, agent_http, agent_grpc, metrics = free_ports(6)
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", f"--temp-dir={folder / 'ray'}",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent_http}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
        *options,
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_the_tests,
        )
    try:
        started = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment, folder / "ray")
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(
            [RAY, "job", "list", "--address", started.address], env=environment, capture_output=True
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the Ray head did not start:\n{(folder / 'head.log').read_text()}")
            time.sleep(1)
        yield started
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):  # the whole group: told alone, `ray start --block` lingers
            with suppress(ProcessLookupError):
                os.killpg(process.pid, stop)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
