"""Guards whose published wording is not in their folder: the user gives it as a file, and its shape is checked.

The wording belongs to a guard as its weights do: it is what the model was trained on. This package neither holds it nor
puts words of its own in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from pydantic import Field

from mlc_ray.config.paths import StoredPath
from mlc_ray.judges.base import JudgeError
from mlc_ray.judges.guards.base import Guard, GuardSettings
from mlc_ray.storage import Place

_SLOT = re.compile(r"\{(prompt|response)\}")
SLOTS = ("{prompt}", "{response}")


class WordedSettings(GuardSettings):
    """... and of a guard that is asked in words from a file."""

    prompt: StoredPath | None = Field(
        None,
        description="File with the wording that the guard was trained on, copied from where it is published (see the "
        "table of guards in docs/judges.md); on storage that every node sees.",
    )


class WordedGuard(Guard):
    """A guard that is asked in words from `judge.prompt`.

    `holds` are pieces that the published text has, `slots` the places for the judged texts in it.
    """

    holds: ClassVar[tuple[str, ...]]
    slots: ClassVar[tuple[str, ...]] = SLOTS

    Settings: ClassVar[type[WordedSettings]] = WordedSettings
    settings: WordedSettings

    @cached_property
    def wording(self) -> str:
        """The file's text, without line breaks at its ends.

        Raises:
            JudgeError: no file is given, there is none, or it does not have the shape of the published text.
        """
        path = self.settings.prompt
        if path is None:
            raise JudgeError(
                f"judge.name={self.name!r} is asked in the words that it was trained on, and these are not in its "
                f"folder: copy them from {self.card} into a file, unchanged, and set judge.prompt to it "
                f"({self.shape})"
            )
        try:
            text = Place(path).read_text().replace("\r\n", "\n").strip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise JudgeError(f"judge.prompt={path!r} cannot be read as UTF-8 text: {error}") from None
        if fault := self.fault(text):
            raise JudgeError(
                f"judge.prompt={path!r} is not the wording of {self.name!r}: {fault}; copy it from {self.card}, "
                f"unchanged ({self.shape})"
            )
        return text

    @property
    def shape(self) -> str:
        """What the file must hold, in a few words."""
        slots = f"the slots {' and '.join(self.slots)} once each, and " if self.slots else "no slots, but "
        return f"it has {slots}{', '.join(map(repr, self.holds))}"

    def fault(self, text: str) -> str:
        """What in `text` is not as published, or ''."""
        for slot in self.slots:
            if (count := text.count(slot)) != 1:
                return f"it has the slot {slot} {count} times, not once"
        if "{{" in text:
            return "it has '{{', as source code has it in which braces are doubled or filled in; undo that"
        missing = [piece for piece in self.holds if piece not in text]
        return f"it lacks {missing[0]!r}" if missing else ""


def filled(text: str, prompt: str, response: str) -> str:
    """A wording with its slots filled in one pass, so that a text that holds `{response}` is left as it is."""
    texts = {"prompt": prompt, "response": response}
    return _SLOT.sub(lambda found: texts[found[1]], text)


def lines_of(text: str) -> Sequence[str]:
    """The lines of a wording that are not empty, without bullets."""
    return [line.strip().removeprefix("* ") for line in text.splitlines() if line.strip()]
