"""Content fingerprints: 16 hex digits that name a value, a file, a model or a tokenizer by what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlc_ray.storage.base import MANIFEST
from mlc_ray.storage.manifests import ArtifactError

_DIGITS = 16
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
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
