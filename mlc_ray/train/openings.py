"""The openings of refusals as tokens of a model, in the languages of data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mlc_ray.config import ChatSection, OpeningsSection, TrainConfig
from mlc_ray.data.branches import Branches
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer
from mlc_ray.judges.openings import openings_by_language
from mlc_ray.storage import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def branches_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, artefacts: Sequence[TokenArtifact]
) -> Branches | None:
    """The openings that a run reads, in the languages of its bundles; None where it reads none.

    Without `tokenizer`, the model's is loaded.

    Raises:
        OpeningsError: A language has none.
        ConfigError: Some are given for a language that none of these reads.
    """
    held_out = config.data.validation
    if not config.reads_decisions and (held_out is None or held_out.min_decision_auc is None):
        return None
    model = config.model
    tokenizer = tokenizer or load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    languages = {code for tokens in artefacts for code in tokens.languages}
    return make_branches(config.openings, tokenizer, config.chat, languages)


def fingerprint_openings(config: TrainConfig, artefacts: Sequence[TokenArtifact]) -> str:
    """Of the texts of all openings in the languages of a run's bundles: lists differ by version, and steps with them.

    Raises:
        ConfigError: Some are given for a language that no bundle is in.
    """
    return fingerprint(
        openings_by_language({code for tokens in artefacts for code in tokens.languages}, config.openings)
    )


def make_branches(
    settings: OpeningsSection, tokenizer: PreTrainedTokenizerBase, chat: ChatSection, languages: Iterable[str]
) -> Branches:
    """The openings in some languages behind a prompt, with what the chat template writes before an answer.

    Raises:
        OpeningsError: A language has none.
        ConfigError: Some are given for a language that none of these reads.
    """
    template = ChatTemplate(tokenizer, chat)
    return Branches(
        {
            code: [ids.tolist() for ids in template.opening_ids(texts)]
            for code, texts in openings_by_language(languages, settings).items()
        }
    )
