"""A run's files that grow, kept on this machine and sent to where the run is: an object store has no append."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mlc_ray.errors import MlcRayError
from mlc_ray.storage.base import Place

logger = logging.getLogger(__name__)

_EVERY = 10.0
_SHARE = 0.05  # of the time is spent sending at most: a file is sent whole, and grows
_TRIES, _PAUSE = 3, 5.0


class Mirror:
    """Sends the files of a folder that changed, every ten seconds and when told; use `close` at the end.

    What is at `place` is fetched first, so that a run that goes on adds to it. A file that this machine has from an
    earlier try, and that is not there or only its beginning, could not be sent then: with `unsent`, it is sent now.

    Args:
        local: a folder of this machine; what else it has from before is removed.
        place: of the run.
        names: files, and folders with files, that are kept; the rest of `local` stays here.
        unsent: whether what an earlier try could not send is still wanted.
        may_write: raises an `MlcRayError` where another driver has taken the run: nothing is sent from then on.
        what: the files are called in warnings.
    """

    def __init__(
        self,
        local: Path,
        place: Place,
        names: Sequence[str],
        may_write: Callable[[], None],
        *,
        unsent: bool,
        what: str = "metrics",
    ) -> None:
        self.what = what
        self.local, self.place, self.names, self.may_write = local, place, names, may_write
        fetched = local.with_name(f"{local.name}-fetched")  # beside it: where fetching fails, what is here stays
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        for name in names:
            with suppress(FileNotFoundError):
                place.storage.fetch(str(place / name), fetched / name)
        ahead = [path for path in self._states() if unsent and _is_ahead(path, fetched / path.relative_to(local))]
        for path in ahead:
            (fetched / path.relative_to(local)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, fetched / path.relative_to(local))
        shutil.rmtree(local, ignore_errors=True)
        fetched.rename(local)
        self._sent = {path: state for path, state in self._states().items() if path not in ahead}
        self._sending, self._ended, self._seconds = threading.Lock(), threading.Event(), 0.0
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def sync(self) -> bool:
        """Send what changed; False, with a warning, where the storage does not take it now.

        Raises:
            MlcRayError: of `may_write`.
        """
        with self._sending:
            started = time.monotonic()
            try:
                self.may_write()
                for path, state in self._states().items():
                    if self._sent.get(path) != state:
                        name = path.relative_to(self.local).as_posix()
                        self.place.storage.publish(path, str(self.place / name))
                        self._sent[path] = state
            except OSError as error:
                logger.warning("%s could not be sent to %s, and will be later: %s", self.what, self.place, error)
                return False
            finally:
                self._seconds = time.monotonic() - started
            return True

    def close(self) -> None:
        """Send the rest, and end; where the storage does not take it after three tries, a warning says where it is."""
        self._ended.set()
        self._thread.join()
        for _ in range(_TRIES):
            try:
                if self.sync():
                    return
            except MlcRayError:  # whoever has the run now has its own
                return
            time.sleep(_PAUSE)
        logger.warning("the last %s of %s are in %s on this machine alone", self.what, self.place, self.local)

    def _follow(self) -> None:
        while not self._ended.wait(max(_EVERY, self._seconds / _SHARE)):
            try:
                self.sync()
            except MlcRayError as error:
                logger.error("%s are not sent to %s any more: %s", self.what, self.place, error)
                return

    def _states(self) -> dict[Path, tuple[int, int]]:
        """Size and time of every file that is kept."""
        states = {}
        for name in self.names:
            for path in (self.local / name, *(self.local / name).rglob("*")):
                if path.is_file():
                    found = path.stat()
                    states[path] = (found.st_size, found.st_mtime_ns)
        return states


def _is_ahead(mine: Path, theirs: Path) -> bool:
    """Whether a file has more than another, which is its beginning or does not exist."""
    if not theirs.is_file():
        return True
    content = theirs.read_bytes()
    with mine.open("rb") as file:
        return file.read(len(content)) == content and bool(file.read(1))
