"""A guard's prompt with its slots: where the judged texts stand, and how they are kept inside.

What a guard's template writes around a prompt and a response is learnt by rendering it around sentinels: the *fixed
parts*. Judged texts are put between these without the template, so nothing in them can make it write something else.
Then nothing in a slot may be read as a part of the frame:

    control tokens   Written out in a slot (`<|im_end|>`), one would end the guard's turn. The text is tokenised in two
                     pieces there, so that the guard reads the same characters as ordinary tokens.
    textual markers  `<END CONVERSATION>` or `AI assistant:` are ordinary text, and no tokenisation tells a real one
                     from a forged one. In a slot they are changed as little as shows: a tag gets a blank behind its
                     bracket, a line that begins with a label is quoted as e-mails quote (`> AI assistant:`), and a rule
                     gets blanks (`- - -`, which Markdown draws alike). Doubled or invisible characters would make a
                     text look like an attempt to hide something, which guards are trained to call unsafe. They are
                     found behind list marks and emphasis, in wide forms, and with other blanks or invisible characters
                     in between; letters of another script that look alike are not seen.

A text without either has exactly the ids that the guard's own template gives.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from mlc_ray.errors import MlcRayError

SENTINELS = ("qS7zK2vX9w", "hT4mB8cN1r")
"""A prompt and a response that no template holds by itself."""

_BLANKS = "\n \n\t"
_VERBATIM = ("\"'<&>\\ {{ x }}{% x %}{prompt}{response}\n\né", "x" * 5000)
"""Texts that come out otherwise where a template escapes, fills in or shortens them."""
_TRIMMED = ("", "\n", None)
"""What templates take away at an end of a text: nothing, line breaks, all blanks; as `str.lstrip` takes it."""

_TAG = re.compile(r"<[^<>\n]{1,60}>|\[/?[A-Z][A-Z_ ]{1,40}\]")
_LABEL = re.compile(r"[\s#*-]*([^\W\d_][\w '/()-]{0,39}:)")
_RULE = re.compile(r"([-=_*#])\1{2,}")
_BREAKS = r"\n\r\v\f\x85\u2028\u2029"
_LINE_START = rf"(?:\A|(?<=[{_BREAKS}]))"
_LINE_END = rf"(?=[{_BREAKS}]|\Z)"
_LEAD_IN = rf"(?:[^\w{_BREAKS}]|_)*(?:\d+[.)](?:[^\w{_BREAKS}]|_)*)?"  # list marks and numbers, quotes, emphasis
_CLOSING_LINES = 2  # of what follows the last slot: further lines are instructions, not part of the frame


class SlotError(MlcRayError):
    """A guard's template does not write prompt and response out, or changes them."""


class EscapeError(MlcRayError):
    """A text holds a control token of the guard that cannot be tokenised as ordinary text."""


@dataclass(frozen=True)
class Filled:
    """A prompt to complete: its `ids`, how many markers in the texts were changed, and control tokens broken up."""

    ids: list[int]
    markers: int = 0
    control_tokens: int = 0


class Slots:
    """One prompt of a guard, learnt from `render`, which gives its text for a prompt and a response.

    Raises:
        SlotError: `render` does not write out both, or changes more of them than blanks at their ends.
    """

    def __init__(self, tokenizer: Any, render: Callable[[str, str], str]) -> None:
        self.tokenizer = tokenizer
        pieces = re.split("(" + "|".join(SENTINELS) + ")", render(*SENTINELS))
        self.fixed, self._order = pieces[::2], [SENTINELS.index(found) for found in pieces[1::2]]
        if set(self._order) != {0, 1}:
            missing = [name for slot, name in enumerate(("user", "assistant")) if slot not in self._order]
            raise SlotError(f"it does not write out both a user's and an assistant's message, but drops {missing[0]}'s")
        self._trims = [self._learnt_trim(render, slot) for slot in (0, 1)]
        probes = list(product(_VERBATIM, _VERBATIM))
        if any(render(*texts) != self.text(*texts) for texts in probes):
            raise SlotError("it escapes, shortens or changes the texts that it is given")
        self._learn_control_tokens()
        self._learn_markers()

    @property
    def framed(self) -> str:
        """The whole prompt around the sentinels."""
        return self.text(*SENTINELS)

    def text(self, prompt: str, response: str) -> str:
        """What the template renders for two texts that hold none of its markers."""
        return "".join(text for text, _ in self._parts((prompt, response)))

    def fill(self, prompt: str, response: str) -> Filled:
        """The prompt on two texts, BOS included where the template writes one.

        Raises:
            EscapeError: a control token in a text cannot be broken up.
        """
        texts, markers = zip(*(self._without_markers(trim(text)) for trim, text in zip(
            self._trims, (prompt, response), strict=True)), strict=True)  # fmt: skip
        parts = self._parts(texts)
        whole = "".join(text for text, _ in parts)
        ids = self._encode(whole)
        if self._controls_in(ids) == self._frame_controls:
            return Filled(ids, sum(markers))
        cuts = self._cuts(parts)
        pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        ids = self._encode(pieces[0])
        for piece in pieces[1:]:
            ids += self._encode_behind(piece)
        if self._controls_in(ids) != self._frame_controls:
            raise EscapeError("a control token of the guard in it cannot be given as ordinary text")
        return Filled(ids, sum(markers), len(cuts))

    # ------------------------------------------------------------------------------------------------ what is learnt

    def _learnt_trim(self, render: Callable[[str, str], str], slot: int) -> Callable[[str], str]:
        """Which blanks at the ends of a text the template takes away."""
        texts = list(SENTINELS)
        texts[slot] = f"{_BLANKS}{SENTINELS[slot]}{_BLANKS[::-1]}"
        rendered = render(*texts)
        for left, right in product(_TRIMMED, repeat=2):

            def trim(text: str, left: str | None = left, right: str | None = right) -> str:
                return text.lstrip(left).rstrip(right)

            prompt, response = (trim(text) if at == slot else text for at, text in enumerate(texts))
            if self.text(prompt, response) == rendered:
                return trim
        raise SlotError("it changes more of the texts than blanks at their ends")

    def _learn_control_tokens(self) -> None:
        """Special tokens, and whatever else of the added ones the frame itself holds (`<think>` is often not special).

        Not blanks: Gemma has runs of line breaks among its added tokens. Not a token for unknown characters either,
        which any text can lead to.
        """
        tokenizer = self.tokenizer
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        frame = self._encode(self.framed)
        special = set(tokenizer.all_special_ids) | {n for n, t in tokenizer.added_tokens_decoder.items() if t.special}
        if tokenizer.unk_token_id in self._encode("\U000e0fff"):
            special.discard(tokenizer.unk_token_id)
        kept = {n for n in added if n in special or (n in frame and added[n].strip(" \n\t\r▁"))}
        self._control_ids = frozenset(kept | special)
        self._frame_controls = self._controls_in(frame)
        contents = sorted((added[number] for number in kept), key=len, reverse=True)
        # A look-ahead finds those that overlap too; of several that begin at one place the longest.
        self._control_text = re.compile(f"(?=({'|'.join(map(re.escape, contents))}))") if contents else None
        self._contents = contents

    def _learn_markers(self) -> None:
        """What in the frame a text could forge: its tags, labels before the slots, and the lines that close them."""
        blind = re.compile("|".join(map(re.escape, self._contents)) or r"(?!)")
        plain = [blind.sub("\n", part) for part in self.fixed]
        lines = [[line.strip() for line in part.splitlines() if line.strip()] for part in plain]
        opening = [part[-1] for part in lines[:-1] if part]
        between = [line for part in lines[1:-1] for line in part]
        frame = [*opening, *between, *lines[-1][:_CLOSING_LINES]]
        labels = {found[1] for line in frame if (found := _LABEL.match(line))}
        rules = {line for line in frame if _RULE.fullmatch(line)}
        tags = {found[0] for part in plain for found in _TAG.finditer(part)}
        self._markers: list[tuple[re.Pattern[str], Callable[[str], str]]] = [
            (_any_of(map(_tag, tags)), lambda found: f"{found[0]} {found[1:]}"),
            (_any_of(map(_label, labels), _LINE_START + _LEAD_IN), lambda found: f"> {found}"),
            (_any_of(map(re.escape, rules), _LINE_START + r"[ \t]*", r"[ \t]*" + _LINE_END), _spaced),
        ]

    # ---------------------------------------------------------------------------------------------------- how it fills

    def _parts(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        """The pieces of a prompt in order, and whether each stands in a slot."""
        parts = [(self.fixed[0], False)]
        for slot, behind in zip(self._order, self.fixed[1:], strict=True):
            parts += [(texts[slot], True), (behind, False)]
        return parts

    def _without_markers(self, text: str) -> tuple[str, int]:
        """A text whose markers are changed, and their number."""
        changed = 0
        for marker, replacement in self._markers:
            plain, places = _folded(text)
            pieces, behind = [], 0
            for found in marker.finditer(plain):
                start, end = places[found.start()], places[found.end() - 1] + 1
                pieces += [text[behind:start], replacement(text[start:end])]
                behind = end
            text = "".join([*pieces, text[behind:]])
            changed += len(pieces) // 2
        return text, changed

    def _cuts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Where the whole text is to be tokenised in two: behind the first letter of each control token in a slot."""
        if self._control_text is None:
            return []
        whole, frame, at = "".join(text for text, _ in parts), [], 0
        for text, in_slot in parts:
            frame += [] if in_slot else [(at, at + len(text))]
            at += len(text)
        found = [(match.start(), match.end(1)) for match in self._control_text.finditer(whole)]
        cut = {s + 1 for s, e in found if not any(start <= s and e <= end for start, end in frame)}
        return sorted(cut)

    def _controls_in(self, ids: Sequence[int]) -> list[int]:
        return [number for number in ids if number in self._control_ids]

    def _encode(self, text: str) -> list[int]:
        # Rendered texts hold their BOS.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _encode_behind(self, text: str) -> list[int]:
        """As `_encode`, of a text that is not the first: SentencePiece puts a blank before a first one."""
        lead = self._encode("\n")
        ids = self._encode("\n" + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._encode(text)


def _any_of(patterns: Iterable[str], before: str = "", behind: str = "") -> re.Pattern[str]:
    """Any of `patterns`, whatever its letter case, the longest first; nothing where there are none."""
    listed = "|".join(sorted(patterns, key=len, reverse=True))
    return re.compile(f"{before}(?:{listed}){behind}" if listed else r"(?!)", re.IGNORECASE)


def _tag(text: str) -> str:
    """A tag with any blanks in it, but behind its opening bracket, where a blank makes it ordinary text."""
    inside = r"\s+".join(map(re.escape, text[1:-1].split()))
    inside = re.sub(r"^/", r"/\\s*", inside)
    return f"{re.escape(text[0])}{inside}\\s*{re.escape(text[-1])}"


def _label(text: str) -> str:
    """A label (`AI assistant:`) with blanks or emphasis between its words and before its colon."""
    return r"[\s*_]+".join(map(re.escape, text[:-1].split())) + r"[\s*_]*:"


def _spaced(rule: str) -> str:
    return " ".join(_folded(rule)[0].strip())


def _folded(text: str) -> tuple[str, Sequence[int]]:
    """`text` in plain forms, and the place in it of each character that is left.

    Blanks of every width are one blank, wide and styled letters and signs the ordinary ones; those that nobody sees
    (Unicode's format characters) are left out.
    """
    if text.isascii():
        return text, range(len(text))
    kept = [(plain, place) for place, each in enumerate(text) if (plain := _plain(each))]
    return "".join(plain for plain, _ in kept), [place for _, place in kept]


@lru_cache(maxsize=1 << 16)
def _plain(character: str) -> str:
    kind = unicodedata.category(character)
    if kind in ("Cf", "Zs"):
        return " " if kind == "Zs" else ""
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 else character
