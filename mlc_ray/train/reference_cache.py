"""The frozen reference's outputs for each bundle: asked once, by workers of Ray Train, and kept as an artefact."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlc_ray.config import TrainConfig
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective
from mlc_ray.progress import Phase, phase
from mlc_ray.storage import MANIFEST, Place, fault_of, fingerprint, fingerprint_model, remove_abandoned, scratch_folder
from mlc_ray.train.entry import Asked, ReferenceSpec, reference_worker
from mlc_ray.train.reference import asked_of_reference
from mlc_ray.train.reference_shards import FORMAT, shard_files, shard_number, shard_ranges
from mlc_ray.train.watchdog import hang_error
from mlc_ray.train.workers import run_workers

logger = logging.getLogger(__name__)

_LOOKS_EVERY = 2.0  # seconds between two looks for new shards, each a request where the folder is elsewhere
_AGAIN = "give the same command again: what the reference has said is kept"


def prepare_references(
    config: TrainConfig, artefacts: Sequence[TokenArtifact], *, layer: int, cache_dir: Path | Place, gpu: bool
) -> dict[str, Place]:
    """Folders of what the objective needs of the reference, for every bundle of these artefacts; asked unless there.

    One group of as many workers as a run trains with at least asks all that is missing. Shards that an earlier pass
    left, whatever ended it, are kept where they are whole.

    Returns:
        The folders, by the fingerprint of the token rows.

    Raises:
        BatchError: A bundle lacks an answer.
        ModelError: The model cannot be loaded.
        HangError: Workers made no progress for `cluster.hang_timeout` seconds, more often than `cluster.max_failures`.
        KeyboardInterrupt: Ctrl-C; the workers have ended by then.
    """
    found, missing = dict[str, Place](), dict[Asked, int]()
    for tokens in artefacts:
        asked = asked_of(config, tokens, layer=layer, cache_dir=cache_dir, gpu=gpu)
        found[tokens.fingerprint] = asked.folder
        if (fault := fault_of(asked.folder)) is not None:
            missing[asked] = len(tokens)
            if (asked.folder / MANIFEST).is_file():
                logger.warning("%s; making again what is missing", fault)
    if missing:
        _ask(config, missing, layer=layer, cache_dir=Place(cache_dir), gpu=gpu)
    return found


def asked_of(config: TrainConfig, tokens: TokenArtifact, *, layer: int, cache_dir: Path | Place, gpu: bool) -> Asked:
    """What the reference is asked about a token artefact, and the folder for it, which is named by its key.

    The key holds the token rows' fingerprint, the model's weights, the type and the kernels of the forward, the device,
    and what is needed: log-probs, and of which answers behind which prompts (`Pairing`); tapped states at `layer`;
    states of whole sequences, and how they are pooled (`Pooling`). It holds neither the engine nor the number of
    workers nor the tokens of a forward: by these, numbers differ by rounding alone.
    """
    key = fingerprint(
        {
            "format": FORMAT,
            "tokens": tokens.fingerprint,
            "model": fingerprint_model(config.model.path),
            "dtype": config.model.dtype,
            "attention": config.model.attention,
            "kernels": config.model.kernels,
            "device": "gpu" if gpu else "cpu",
            **asked_of_reference(Objective(config), layer),
        }
    )
    return Asked(tokens.folder, Place(cache_dir).absolute() / f"reference-{key}", key)


def _ask(config: TrainConfig, missing: Mapping[Asked, int], *, layer: int, cache_dir: Place, gpu: bool) -> None:
    """Have workers ask the reference about artefacts, of so many bundles each, and make their folders complete."""
    spec = ReferenceSpec(
        config=config.model_dump(mode="json", exclude_unset=True),
        layer=layer,
        asked=tuple(missing),
        folder=cache_dir.absolute(),
        id=uuid.uuid4().hex,
    )
    for asked in missing:
        remove_abandoned(asked.folder)
    total = sum(missing.values())
    try:
        with (
            scratch_folder() as storage,
            phase("reference", total=total, unit="bundles", done=_bundles_in(missing)) as progress,
            _following(missing, progress),
        ):
            run_workers(
                reference_worker,
                spec,
                config.cluster,
                workers=config.cluster.least_workers,
                gpu=gpu,
                name="reference",
                storage=storage,
                goes_on="and ask the reference what is missing",
                to_go_on=_AGAIN,
            )
            progress.update(total)
    except MlcRayError:
        raise
    except Exception as error:
        what = f"the reference pass into {str(spec.folder)!r}"
        if (hung := hang_error(spec.folder, spec.id, what=what, to_go_on=_AGAIN)) is not None:
            raise hung from error
        raise


@contextmanager
def _following(missing: Mapping[Asked, int], progress: Phase) -> Iterator[None]:
    """Within, progress is what shards hold, of which workers on any machine write the files."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_LOOKS_EVERY):
            with suppress(OSError):  # it is looked at again
                progress.update(_bundles_in(missing))

    following = threading.Thread(target=follow, name="reference-progress", daemon=True)
    following.start()
    try:
        yield
    finally:
        ended.set()
        following.join()


def _bundles_in(missing: Mapping[Asked, int]) -> int:
    """Bundles of the shards that are there, damaged ones too."""
    done = 0
    for asked, bundles in missing.items():
        ranges = shard_ranges(bundles)
        done += sum(len(ranges[number]) for number in set(map(shard_number, shard_files(asked.folder))))
    return done
