"""Reading and writing files and folders, on disk or elsewhere, and verifying that they are complete.

`base` has the storages and `Place`, `local` the one for plain paths, `atomic` whole-or-nothing writing on this machine,
`leftovers` what removes the half made things of killed processes, `manifests` and `fingerprints` how a folder is known
to be complete and what is in it, `copies` what a machine keeps of models that are elsewhere, `mirror` what sends files
that grow.
"""

from mlc_ray.storage.atomic import atomic_file, atomic_folder, scratch_folder, sync_folders, write_json_atomic
from mlc_ray.storage.base import (
    MANIFEST,
    Place,
    Storage,
    StorageDeniedError,
    StorageError,
    StorageFaultError,
    absolute_if_here,
    new_folder,
    storage_of,
    working_folder,
)
from mlc_ray.storage.copies import CacheError, fetched_bytes, local_model, local_side, model_for_now, user_cache
from mlc_ray.storage.fingerprints import (
    fingerprint,
    fingerprint_model,
    fingerprint_source,
    fingerprint_tokenizer,
)
from mlc_ray.storage.hub import NO_COMMITS, Commits, HubError, HubModel, pinned_model, without_commit
from mlc_ray.storage.leftovers import remove_abandoned
from mlc_ray.storage.manifests import (
    SEAL,
    ArtifactError,
    IncompleteArtifactError,
    artifact_folder,
    checksum,
    engine_named,
    engine_versions,
    fault_of,
    installed_engines,
    library_versions,
    read_manifest,
    sealed,
    verify_checksums,
    verify_files,
    write_manifest,
)

__all__ = [
    "MANIFEST",
    "NO_COMMITS",
    "SEAL",
    "ArtifactError",
    "CacheError",
    "Commits",
    "HubError",
    "HubModel",
    "IncompleteArtifactError",
    "Place",
    "Storage",
    "StorageDeniedError",
    "StorageError",
    "StorageFaultError",
    "absolute_if_here",
    "artifact_folder",
    "atomic_file",
    "atomic_folder",
    "checksum",
    "engine_named",
    "engine_versions",
    "fault_of",
    "fetched_bytes",
    "fingerprint",
    "fingerprint_model",
    "fingerprint_source",
    "fingerprint_tokenizer",
    "installed_engines",
    "library_versions",
    "local_model",
    "local_side",
    "model_for_now",
    "new_folder",
    "pinned_model",
    "read_manifest",
    "remove_abandoned",
    "scratch_folder",
    "sealed",
    "storage_of",
    "sync_folders",
    "user_cache",
    "verify_checksums",
    "verify_files",
    "without_commit",
    "working_folder",
    "write_json_atomic",
    "write_manifest",
]
