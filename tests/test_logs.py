"""The terminal shows what we say; what libraries say, in whatever way, is in one file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

TALK = """
import logging, os, sys, time, warnings
from pathlib import Path
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import command_line, keep_in
from mlc_ray.progress import phase

def talk(when):
    logging.getLogger("ray.data").warning("%s: a library's logger", when)
    warnings.warn(f"{when}: a library's warning")
    print(f"{when}: a library's print", file=sys.stderr)
    os.write(2, f"{when}: core_worker.cc\\n".encode())
    os.system(f"echo {when}: a child >&2")

with command_line():
    talk("early")
    if sys.argv[1] != "-":
        keep_in(Path(sys.argv[1]))
        keep_in(Path(sys.argv[1]) / "second")
    talk("late")
    logging.getLogger("mlc_ray.train").info("a row")
    with phase("training", 2, "steps") as shown:
        shown.advance(1)
        time.sleep(0.6)
        shown.advance(1)
        logging.getLogger("mlc_ray.train").warning("collapse")
    print("a result")
    if len(sys.argv) > 2:
        raise {"ours": MlcRayError, "bug": KeyError}[sys.argv[2]]("what went wrong")
print("after", file=sys.stderr)
os.write(2, b"after as well\\n")
"""
SAID = ("a library's logger", "a library's warning", "a library's print", "core_worker.cc", "a child")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TALK, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_only_our_messages_are_shown_and_all_others_are_in_the_file(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    file = tmp_path / "run" / "libraries.log"
    assert done.stdout == "a result\n"
    assert re.sub(r"\d:\d\d\n", "TIME\n", done.stderr).splitlines() == [
        f"the output of Ray, vLLM and other libraries goes to {file}",
        "a row",
        "warning: collapse",
        "training: 2 steps in TIME",
        "after",
        "after as well",
    ]
    text = file.read_text()
    for when in ("early", "late"):
        for said in SAID:
            assert text.count(f"{when}: {said}") == 1, (when, said)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["libraries.log"]  # the first folder keeps it


MISTYPED = """
import sys
from pathlib import Path
from mlc_ray.cluster import ClusterError
from mlc_ray.errors import MlcRayError
from mlc_ray.lease import lease
from mlc_ray.log_files import output_kept
from mlc_ray.logs import command_line
from mlc_ray.storage import Place
place = Place(sys.argv[1])
with command_line(), lease(place, wait=False), output_kept(place):
    if sys.argv[2] == "written":
        (Path(place) / "rejects.jsonl").touch()
    raise ClusterError("no Ray") if sys.argv[2] == "cluster" else MlcRayError("no such sample")
"""


@pytest.mark.parametrize(
    ("how", "left"),
    [("setting", None), ("cluster", ["libraries.log"]), ("written", ["libraries.log", "rejects.jsonl"])],
)
def test_a_wrong_setting_leaves_no_folder_with_a_log_alone(how: str, left: list[str] | None, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-P", "-c", MISTYPED, folder, how], capture_output=True, text=True, timeout=60
    )
    assert "MlcRayError: no such sample" in done.stderr or "ClusterError: no Ray" in done.stderr
    assert (sorted(each.name for each in folder.iterdir()) if folder.exists() else None) == left


FULL = """
import logging, resource, sys
from pathlib import Path
from mlc_ray.logs import command_line, keep_in, libraries

with command_line():
    keep_in(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    for _ in range(3):
        print("a library's line", file=libraries(), flush=True)
    logging.getLogger("mlc_ray").info("goes on")
"""


def test_on_a_full_disk_what_libraries_say_is_lost_with_a_warning(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stderr.splitlines()
    assert first.endswith("libraries.log")
    assert lines == [
        "warning: what libraries write is lost while their file cannot be written: [Errno 27] File too large",
        "goes on",
    ]
    assert "a library's line" not in (tmp_path / "libraries.log").read_text()


def test_an_unexpected_error_is_shown_with_all_that_was_said_unless_a_file_has_it(tmp_path: Path) -> None:
    for said in ("early: a child", "late: core_worker.cc", "KeyError: 'what went wrong'"):
        assert said in run("-", "bug").stderr
    kept = run(tmp_path / "run", "bug").stderr
    assert "KeyError: 'what went wrong'" in kept
    assert "core_worker" not in kept
    assert "core_worker" not in run("-", "ours").stderr.partition("Traceback")[0]


def test_on_a_terminal_progress_is_redrawn_below_the_rows(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                seen.extend(os.read(ours, 1000))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    code = [sys.executable, "-c", TALK, str(tmp_path)]
    done = subprocess.run(code, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "COLUMNS": "200"}, timeout=60)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.returncode == 0
    text = seen.decode()
    assert "training: " in text
    assert "━" in text
    assert text.index("a row") < text.index("━")
    assert "\r\x1b[K\x1b[1;33mwarning: collapse" in text
    assert "library" not in text.replace("libraries", "")


def test_a_library_user_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    from mlc_ray.logs import keep_in, libraries

    stderr = sys.stderr
    keep_in(Path("/nowhere"))
    assert libraries() is None
    assert sys.stderr is stderr
    assert capfd.readouterr().err == ""


WORKER = """
import logging
from mlc_ray.logs import send_warnings

send_warnings()
send_warnings()
logging.getLogger("ray.data").warning("mlc_ray is not who says this")
logging.getLogger("mlc_ray.train.loop").warning("step %d: not finite\\n(try 1 of 4)", 2)
logging.getLogger("mlc_ray.train.loop").info("not told")
logging.getLogger("mlc_ray").error("worse")
"""
DRIVER = """
import sys
from pathlib import Path
from ray._private import worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from mlc_ray.cluster import _send_output_to
from mlc_ray.logs import command_line, keep_in, libraries

dispatcher.add_handler("ray_print_logs", print)  # what `ray.init` does
with command_line():
    keep_in(Path(sys.argv[1]))
    _send_output_to(libraries())
    told = {"pid": 7, "ip": "10.0.0.1", "localhost": "10.0.0.1", "is_err": True, "actor_name": "RayTrainWorker"}
    dispatcher.emit({**told, "lines": sys.stdin.read().splitlines()})
    # How Ray says that a worker died, which this package warns of itself.
    worker.print_to_stdstream({"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
dispatcher.emit({**told, "lines": ["said while Python ends"]})  # by Ray's thread, which ends later than the command
"""


def test_warnings_of_ours_in_a_worker_are_shown_at_once_and_its_other_output_is_not(tmp_path: Path) -> None:
    worker = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=60)
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], input=worker.stderr, capture_output=True, text=True, timeout=60
    )
    assert driver.returncode == 0
    assert driver.stderr.splitlines()[1:] == ["warning: step 2: not finite (try 1 of 4)", "error: worse"]
    assert driver.stdout == ""
    text = (tmp_path / "libraries.log").read_text()
    assert "mlc_ray is not who says this" in text
    assert "RayTrainWorker pid=7" in text
    assert "(raylet)" in text and "A worker died" in text
    assert "not told" not in worker.stderr
    assert text.count("not finite") == 1  # as a message of the driver's
