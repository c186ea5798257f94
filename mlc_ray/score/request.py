"""What a score folder is a score of (model, prompts, settings), written into it before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.judges.base import make_judge
from mlc_ray.result_files import ResultFileError, read_fields
from mlc_ray.runs import REQUEST_FILE
from mlc_ray.storage import Place, library_versions, write_json_atomic


class ScoreError(MlcRayError):
    """The score cannot be made as asked; the message names the setting to change."""


@dataclass(frozen=True)
class Request:
    """What a score folder is a score of; with it a failed score can be resumed.

    `versions` are of the libraries that answered: whoever judges the responses later may have others.
    """

    config: ScoreConfig
    resolved: str
    fingerprint: str
    prompts: str
    seen_languages: list[str] | None
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def save(self, folder: Path) -> None:
        """Write `request.json`."""
        content = {**vars(self), "config": self.config.model_dump(mode="json", exclude_unset=True)}
        write_json_atomic(folder / REQUEST_FILE, content)

    def asks_as(self, other: Request) -> bool:
        """Whether both would get the same answers: from the same weights, to the same prompts, decoded alike."""
        return (self.prompts, self.decoding) == (other.prompts, other.decoding)

    @property
    def decoding(self) -> list[Any]:
        """What the answer to a prompt follows from, beside the prompt itself."""
        config, engine = self.config, self.config.engine
        likelihood = make_judge(config.judge).runs == "prompts"
        chat = None if config.chat is None else config.chat.model_dump(mode="json")
        asking = config.asking.model_dump(mode="json")
        lengths = [config.max_new_tokens, engine.max_model_len]
        return [self.fingerprint, likelihood, chat, asking, lengths, engine.dtype, engine.options]


def load_request(folder: Path | Place) -> Request:
    """What the score in `folder` is of.

    Raises:
        ScoreError: it is not a score folder, or the file is damaged or of another version.
    """
    try:
        content = read_fields(Place(folder) / REQUEST_FILE, Request)
        return Request(**{**content, "config": parse_config(ScoreConfig, content["config"])})
    except (FileNotFoundError, NotADirectoryError):
        raise ScoreError(f"{str(folder)!r} is not a score folder: it has no {REQUEST_FILE}") from None
    except ResultFileError as error:
        raise ScoreError(f"{error}; score again with `mlc-ray score`") from None
