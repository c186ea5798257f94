"""Models of the Hugging Face hub, `NAME[#REVISION]`, and the commit that a revision of a model or data set stands for.

The driver asks for the commit once (`pinned_model`); every process on any machine then loads that one (`snapshot`), and
fingerprints name it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlc_ray.config.paths import scheme_of
from mlc_ray.errors import MlcRayError

logger = logging.getLogger(__name__)

Repository = Literal["model", "data set"]
Commits = Mapping[Repository, Mapping[str, str]]
"""What names of the hub stand for, by their kind, since a model and a data set may have one name, and as given."""
NO_COMMITS: Commits = {"model": {}, "data set": {}}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(#(?P<revision>[\w./-]+))?")
_CONFIG = "config.json"
# Pickles and other formats are never loaded, and `consolidated*` holds the same weights once more.
_NEVER_LOADED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "*.ot", "*.tflite", "consolidated*",
)  # fmt: skip


class HubError(MlcRayError, ValueError):
    """The hub has no such model, data set or revision, or cannot be asked; the message quotes the name and the fix."""


@dataclass(frozen=True)
class HubModel:
    """A model of the hub; `revision` is a branch, a tag or a commit, None for what is newest."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, path: str) -> HubModel | None:
        """The parts of a name; None where `path` is a folder on this machine, a URL, or no name.

        Raises:
            HubError: it is a folder on this machine with a revision.
        """
        if scheme_of(path) is not None or Path(path).expanduser().exists():
            return None
        folder, mark, revision = path.rpartition("#")
        if mark and folder and Path(folder).expanduser().exists():
            raise HubError(
                f"{path!r}: {folder!r} is on this machine, where it has no revision {revision!r}; leave out #{revision}"
            )
        found = _NAME.fullmatch(path)
        return None if found is None else cls(**found.groupdict())

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}#{self.revision}"


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which names the same files for ever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def pinned_model(path: str) -> str:
    """A model's name with its commit, which the hub is asked for unless it is named; a folder or URL unchanged.

    Where the hub cannot be asked, the only commit that is in its cache on this machine.

    Raises:
        HubError: the hub has no such model or revision; it cannot be asked, and the cache has no commit of it, or
            several; or `path` is a folder on this machine with a revision.
    """
    model = HubModel.parse(path)
    if model is None or is_commit(model.revision):
        return path
    commit = commit_of("model", model.name, model.revision, given=path, cached=lambda: _cached_commits(model.name))
    return f"{model.name}#{commit}"


def without_commit(path: str) -> str:
    """The name of a model of the hub alone where `path` has its commit; anything else unchanged."""
    name, _, revision = path.rpartition("#")
    return name if is_commit(revision) and _NAME.fullmatch(path) else path


def commit_of(
    kind: Repository, name: str, revision: str | None, *, given: str, cached: Callable[[], Sequence[str]]
) -> str:
    """The commit that `revision` stands for now, None for the newest.

    Args:
        kind: what `name` is a name of.
        name: of the hub.
        revision: a branch, a tag or a commit.
        given: what the user wrote, for messages.
        cached: the commits of it in a cache on this machine, which are looked at where the hub cannot be asked.

    Raises:
        HubError: the hub has no such thing; or it cannot be asked, and the cache has none or several.
    """
    from huggingface_hub import HfApi  # half a second, and only hub names need it
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        return str(ask(name, revision=revision).sha)
    except RevisionNotFoundError:
        raise HubError(
            f"{given!r}: {name!r} has no branch, tag or commit {revision!r}; give one that it has, or none for its "
            "newest commit"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{given!r}: it is not on this machine, and the hub has no {kind} {name!r}, or shows it to others alone; "
            "correct the path, or set HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise HubError(f"{given!r} is no name of the hub: {first_line(error)}") from None
    except unreachable() as error:
        commits = cached()
        if revision is None and len(commits) == 1:
            logger.warning("the hub cannot be asked about %s: its cached commit %s is read", given, commits[0])
            return commits[0]
        plain = given.rpartition("#")[0] or given
        fix = f"name its commit, {plain}#COMMIT"
        if commits:
            fix += f"; the cache on this machine has {', '.join(commits)}"
        raise HubError(
            f"{given!r} is no path on this machine, and the hub cannot be asked which commit that is "
            f"({first_line(error)}): {fix}"
        ) from None


def snapshot(model: HubModel, *, weights: bool = True) -> Path:
    """The folder in the hub's cache on this machine with a model's files at its commit, fetched unless they are there.

    Args:
        model: one that names a commit.
        weights: whether the safetensors are needed too.

    Raises:
        HubError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    ignored = [*_NEVER_LOADED, *([] if weights else ["*.safetensors"])]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, ignore_patterns=ignored))
    except unreachable() as error:
        raise HubError(
            f"{str(model)!r} cannot be fetched from the hub: {first_line(error)}; correct the name, set HF_TOKEN, or "
            "fetch it on every node while the hub can be reached"
        ) from None


def unreachable() -> tuple[type[Exception], ...]:
    """What is raised where the hub, or what it should have sent, is not there."""
    from huggingface_hub import errors

    # Its HTTP client's, which is httpx in some releases and httpx2 in others; `datasets` lets the latter through.
    return (OSError, vars(errors)["HTTPError"])


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cached_commits(name: str) -> list[str]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if is_commit(path.name) and (path / _CONFIG).is_file())
