"""Content fingerprints: 16 hex digits that name a value, a file, a model or a tokenizer by what is in it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlc_ray.config.paths import scheme_of
from mlc_ray.storage.base import MANIFEST, PIECE_BYTES, Place
from mlc_ray.storage.hub import HubModel, is_commit
from mlc_ray.storage.manifests import ArtifactError

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_DIGITS = 16
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_AT_ONCE = 16  # reads of a storage elsewhere: each takes some 20 ms, and 64 of a file in turn more than a second
_TOKENIZER_FILES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*", "*.gguf",
)  # fmt: skip


def fingerprint(obj: Any) -> str:
    """First 16 hex digits of the SHA-256 of `obj` as canonical JSON (sorted keys, no spaces, UTF-8).

    Raises:
        TypeError: JSON cannot hold `obj`; nothing is hashed by its repr.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_DIGITS]


def fingerprint_source(kind: type, modules: Iterable[str], *, base: type) -> str:
    """Fingerprint of the code of a class: the source of the modules that it and its bases below `base` are defined in.

    Comments count, since whether only they changed is not looked at. What was typed into an interpreter has no source,
    and counts by its name.

    Args:
        kind: The class.
        modules: Names of further modules that count, which are imported.
        base: A class that it extends; modules of that one, and above it, do not count.
    """
    own = {each.__module__ for each in kind.__mro__ if issubclass(each, base)} - {base.__module__}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in {*own, *modules}}
    return fingerprint(sorted((name, file and _hash(Place(file))) for name, file in files.items()))


def fingerprint_model(path: str) -> str:
    """Fingerprint of a model: a folder, by its path or URL, or a hub name.

    A folder, wherever it is, counts by the name, size and content of its small files (config, tokenizer, template); of
    each weight file (safetensors, GGUF) the content is sampled: the first and last 64 KiB, which hold the header, and
    62 blocks of 64 KiB evenly between them. Training moves practically every weight, so samples tell two steps of one
    run apart, in milliseconds instead of minutes at 70B. A hub name counts by name and commit:
    the one that it has, or where it has none the one that is cached.
    """
    return _fingerprint_model_files(path, ("*",))


def fingerprint_tokenizer(path: str) -> str:
    """Fingerprint of what turns text into ids: tokenizer files, chat template, config; a hub name as for a model."""
    return _fingerprint_model_files(path, _TOKENIZER_FILES)


def _fingerprint_model_files(path: str, patterns: Iterable[str]) -> str:
    if scheme_of(path) is None and not Path(path).expanduser().is_dir():
        named = HubModel.parse(path)
        if named is not None and is_commit(named.revision):
            return fingerprint({"hub": named.name, "commit": named.revision})
        return fingerprint({"hub": path, "commit": _cached_commit(path)})
    folder = Place(path if scheme_of(path) else Path(path).expanduser())
    names = [
        name
        for name in folder.storage.list(folder.url)
        if name != MANIFEST and not name.startswith(".") and any(fnmatch.fnmatchcase(name, each) for each in patterns)
    ]
    if not (found := folder.sizes(names)):
        raise ArtifactError(f"cannot fingerprint {path!r}: the folder holds no model files")
    return fingerprint_files(folder, found)


def fingerprint_files(folder: Place, sizes: Mapping[str, int]) -> str:
    """Fingerprint of files of a model's folder, by name, size and content; of large weight files it is sampled."""
    return fingerprint([(name, sizes[name], _hash_model_file(folder / name, sizes[name])) for name in sorted(sizes)])


def _hash_model_file(file: Place, size: int) -> str:
    if file.name.endswith(WEIGHT_SUFFIXES) and size > _SAMPLES * _SAMPLE_BYTES:
        return _hash_samples(file, size)
    return _hash(file)


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache  # costs 0.3 s, and only hub names need it
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ArtifactError(f"{name!r} is neither a folder on this machine nor a valid hub name") from None
    return Path(cached).parent.name if isinstance(cached, str) else None  # .../snapshots/COMMIT/config.json


def _hash(file: Place) -> str:
    digest = hashlib.sha256()
    with file.open() as opened:
        while piece := opened.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _hash_samples(file: Place, size: int) -> str:
    """SHA-256 of the samples; each is read by itself, so that a storage elsewhere serves several at once."""

    def sample(index: int) -> bytes:
        with file.open() as opened:
            opened.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            return opened.read(_SAMPLE_BYTES)

    digest = hashlib.sha256()
    with ThreadPoolExecutor(1 if file.is_local else _AT_ONCE) as pool:
        for content in pool.map(sample, range(_SAMPLES)):
            digest.update(content)
    return digest.hexdigest()
