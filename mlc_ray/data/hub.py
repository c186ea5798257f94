"""Data sets of the Hugging Face hub: `NAME[@CONFIG][:SPLIT][#REVISION]`, and the commit that a revision stands for.

The driver asks for the commit once; tasks on any machine then load that one, and the fingerprint of the data names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlc_ray.data.bundles import BundleFileError
from mlc_ray.storage.hub import HubError, commit_of, first_line, is_commit, unreachable

_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(#(?P<revision>[\w./-]+))?"
)


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

    def pinned(self) -> HubName:
        """The same with its commit, which the hub is asked for unless it is named.

        Where the hub cannot be asked, the only commit that is in the cache of `datasets` on this machine.

        Raises:
            BundleFileError: The hub has no such data set or revision; or it cannot be asked, and the cache has no
                commit of it, or several.
        """
        if is_commit(self.revision):
            return self
        try:
            commit = commit_of(
                "data set", self.name, self.revision, given=str(self), cached=lambda: cached_commits(self.name)
            )
        except HubError as error:
            raise BundleFileError(str(error)) from None
        return replace(self, revision=commit)

    def load(self) -> Any:
        """The `datasets.Dataset`, or a `DatasetDict` where no split is named.

        Raises:
            BundleFileError: It cannot be loaded; or the hub could not be reached, and what `datasets` took from its
                cache is of another commit.
        """
        import datasets  # two seconds

        try:
            loaded = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        except unreachable() as error:
            raise BundleFileError(
                f"{str(self)!r} cannot be loaded as a Hugging Face dataset: {first_line(error)}"
            ) from None
        every = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
        files = [file["filename"] for one in every for file in one.cache_files]
        # Where it cannot reach the hub it takes what is newest in its cache, whatever the revision.
        other = [file for file in files if self.revision not in Path(file).parts]
        if is_commit(self.revision) and other:
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
    return sorted({path.name for path in found if path.is_dir() and is_commit(path.name)})
