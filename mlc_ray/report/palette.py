"""The colour scale of rates: one hue that only gets stronger, so that it reads the same for every kind of colour sight.

Each cell also has its number; the colour only makes outliers easy to find. On each step the text is black or white,
whichever has the larger contrast, which is never below 4.5 to 1 (WCAG 2.1, AA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Colour = tuple[int, int, int]

STEPS = 11
_LIGHT: Sequence[Colour] = ((244, 246, 248), (158, 197, 226), (58, 126, 186), (10, 48, 104))
_DARK: Sequence[Colour] = ((34, 40, 48), (32, 72, 114), (66, 132, 190), (178, 216, 246))


def step(share: float) -> int:
    """The step of a share in [0, 1]: only an exact 0 is step 0 and only an exact 1 the last, so both stand out."""
    if not 0 <= share <= 1:
        raise ValueError(f"{share!r} is not a share in [0, 1]")
    if share in (0, 1):
        return int(share) * (STEPS - 1)
    return min(STEPS - 2, 1 + math.floor(share * (STEPS - 2)))


def colours(*, dark: bool = False) -> list[tuple[Colour, Colour]]:
    """Background and text colour of each step."""
    anchors = _DARK if dark else _LIGHT
    backgrounds = [_between(anchors, index / (STEPS - 1)) for index in range(STEPS)]
    return [(colour, _text_on(colour)) for colour in backgrounds]


def css_rules() -> str:
    """The steps as classes `q0`, `q1`, ..., for light and dark pages."""
    light = "\n".join(_rules(dark=False))
    dark = "\n".join(_rules(dark=True))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.1)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def as_hex(colour: Colour) -> str:
    """The colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _rules(*, dark: bool) -> Iterator[str]:
    for index, (background, text) in enumerate(colours(dark=dark)):
        yield f".q{index} {{ background: {as_hex(background)}; color: {as_hex(text)}; }}"


def _between(anchors: Sequence[Colour], position: float) -> Colour:
    place = position * (len(anchors) - 1)
    left = min(int(place), len(anchors) - 2)
    share = place - left
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(anchors[left], anchors[left + 1], strict=True))
    return red, green, blue


def _text_on(background: Colour) -> Colour:
    black, white = (0, 0, 0), (255, 255, 255)
    return max(black, white, key=lambda colour: contrast(background, colour))


def _luminance(colour: Colour) -> float:
    parts = [value / 255 for value in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
