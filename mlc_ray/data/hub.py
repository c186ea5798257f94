"""Data sets of the Hugging Face hub: `NAME[@CONFIG][:SPLIT][#REVISION]`, and the commit that a revision stands for.

The driver asks for the commit once; tasks on any machine then load that one, and the fingerprint of the data names it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlc_ray.data.bundles import BundleFileError

logger = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(#(?P<revision>[\w./-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A data set of the hub; `revision` is a branch, a tag or a commit, None for what is newest."""

    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """The parts of a name, or None where `text` is none."""
        found = _NAME.fullmatch(text)
        return None if found is None else cls(**found.groupdict())

    def __str__(self) -> str:
        parts = (("@", self.config), (":", self.split), ("#", self.revision))
        return self.name + "".join(mark + part for mark, part in parts if part is not None)

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def pinned(self) -> HubName:
        """The same with its commit, which the hub is asked for unless it is named.

        Where the hub cannot be asked, the only commit that is in the cache of `datasets` on this machine.

        Raises:
            BundleFileError: The hub has no such data set or revision; or it cannot be asked, and the cache has no
                commit of it, or several.
        """
        if self.is_pinned:
            return self
        from huggingface_hub import HfApi  # half a second, and only hub names need it
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            commit = HfApi().dataset_info(self.name, revision=self.revision).sha
        except RevisionNotFoundError:
            raise BundleFileError(
                f"{str(self)!r}: {self.name!r} has no branch, tag or commit {self.revision!r}; give one that it "
                "has, or none for its newest commit"
            ) from None
        except RepositoryNotFoundError:
            raise BundleFileError(
                f"{str(self)!r}: it is not on this machine, and the hub has no data set {self.name!r}, or shows it to "
                "others alone; correct the path, or set HF_TOKEN"
            ) from None
        except HFValidationError as error:
            raise BundleFileError(f"{str(self)!r} is no name of the hub: {_first_line(error)}") from None
        except _unreachable() as error:
            commit = self._cached(error)
        return replace(self, revision=commit)

    def _cached(self, error: Exception) -> str:
        commits = cached_commits(self.name)
        if self.revision is None and len(commits) == 1:
            logger.warning("the hub cannot be asked about %s: its cached commit %s is read", self, commits[0])
            return commits[0]
        fix = f"name its commit, {replace(self, revision='COMMIT')}"
        if commits:
            fix += f"; the cache of `datasets` has {', '.join(commits)}"
        raise BundleFileError(
            f"{str(self)!r}: the hub cannot be asked which commit that is ({_first_line(error)}): {fix}"
        ) from None

    def load(self) -> Any:
        """The `datasets.Dataset`, or a `DatasetDict` where no split is named.

        Raises:
            BundleFileError: It cannot be loaded; or the hub could not be reached, and what `datasets` took from its
                cache is of another commit.
        """
        import datasets  # two seconds

        try:
            loaded = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        except _unreachable() as error:
            raise BundleFileError(
                f"{str(self)!r} cannot be loaded as a Hugging Face dataset: {_first_line(error)}"
            ) from None
        every = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
        files = [file["filename"] for one in every for file in one.cache_files]
        # Where it cannot reach the hub it takes what is newest in its cache, whatever the revision.
        if self.is_pinned and (other := [file for file in files if self.revision not in Path(file).parts]):
            raise BundleFileError(
                f"{str(self)!r}: the hub could not be reached, and the copy of it here is of another commit, "
                f"{other[0]!r}; load that commit on every node while the hub can be reached"
            )
        return loaded


def cached_commits(name: str) -> list[str]:
    """The commits of a data set that `datasets` has in its cache on this machine."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, own = name.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(own)}" if owner else camelcase_to_snakecase(own)
    found = Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/*/*/*")
    return sorted({path.name for path in found if path.is_dir() and _COMMIT.fullmatch(path.name)})


def _unreachable() -> tuple[type[Exception], ...]:
    """What is raised where the hub, or what it should have sent, is not there."""
    from huggingface_hub import errors

    # Its HTTP client's, which is httpx in some releases and httpx2 in others; `datasets` lets the latter through.
    return (OSError, vars(errors)["HTTPError"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
