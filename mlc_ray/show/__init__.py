"""`mlc-ray show FOLDER`: what a folder is, how far it got, its results, and what to do next; from its files alone.

One function per kind of folder gives its lines; `_KINDS` lists them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from mlc_ray.runs import (
    BUNDLES_FOLDER,
    KEPT_FOLDER,
    PROBE_FILE,
    QUALITY_TEXT,
    SCORES_FILE,
    TRANSLATION_FILE,
    FolderKind,
    kind_of,
)
from mlc_ray.show.lines import Line, ShowError, age, as_text, next_lines, quoted, read_json
from mlc_ray.show.runs import run_lines, score_lines
from mlc_ray.show.searches import scale_lines, search_lines, study_lines
from mlc_ray.storage import MANIFEST, Place
from mlc_ray.translate import quality as qualities

__all__ = ["ShowError", "show"]


def show(folder: str | Path | Place) -> str:
    """The folder of a run, score, search, study, probe or translation, going on or ended; of several, a line for each.

    Raises:
        ShowError: it neither is nor holds one of them, or a file in it is damaged.
        MlcRayError: what the readers of metrics and scores raise.
    """
    place = Place(folder).absolute()
    kind = kind_of(place)
    if kind is not None:
        return as_text(_KINDS[kind](place))
    if (place / SCORES_FILE).is_file():  # one whose request.json was not kept
        return as_text(score_lines(place))
    inside = [(child, kind_of(child)) for child in place.iterdir()]
    known = [(child, found) for child, found in inside if found is not None]
    if not known:
        what = "holds no run, score, search, study, probe or translation" if place.is_dir() else "is not a folder"
        raise ShowError(
            f"{str(place)!r} {what}; give one that `mlc-ray train`, `score`, `search`, `study`, `probe` or `translate` "
            "wrote"
        )
    lines: list[Line] = []
    for child, found in known:
        rows = dict(_KINDS[found](child))
        lines.append((child.name, f"{found}: {rows['state']}"))
    return as_text([*lines, ("next", f"mlc-ray show {quoted(known[0][0])}")])


def _probe(folder: Place) -> list[Line]:
    content = read_json(folder / PROBE_FILE)
    probe = content.get("probe", {})
    ranking, unknown = probe.get("ranking", []), probe.get("unknown", [])
    commands = [f"mlc-ray train --config CONFIG --set mlc.layer={ranking[0]}"] if ranking else []
    return [
        ("probe", str(folder)),
        ("model", str(content.get("model"))),
        ("state", f"ended, {content.get('bundles')} bundles in {len(probe.get('languages', ()))} languages"),
        ("layers", f"ranked {', '.join(map(str, ranking[:5]))} first, of {len(ranking)}"),
        *([("not known", f"{', '.join(unknown)}: refused without telling what")] if unknown else []),
        *next_lines(commands),
    ]


def _translation(folder: Place) -> list[Line]:
    config = read_json(folder / TRANSLATION_FILE).get("config", {})
    lines = [("translation", str(folder)), ("languages", ", ".join(config.get("languages", ())) or "none")]
    if not (folder / MANIFEST).is_file():
        steps = [file.name for file in (folder / KEPT_FOLDER).iterdir() if file.name.startswith("drafts-")]
        done = f"{len(steps)} steps of shards are done" if steps else "the first step of the first shard is not done"
        lines.append(("state", f"{done}{age(folder / TRANSLATION_FILE)}"))
        return [*lines, *next_lines([f"mlc-ray translate --resume {quoted(folder)}   # if it is not running any more"])]
    quality = qualities.load_quality(folder)
    lines.append(("state", f"ended, {qualities.summary(quality)}"))
    for each in quality.texts:
        median = "" if each.chrf_median is None else f", median chrF {each.chrf_median:.1f}"
        lines.append((each.part, f"{each.language}: {each.accepted} of {each.asked} accepted{median}"))
    lines += [("twins", f"{each.kind}: {each.accepted} of {each.asked} accepted") for each in quality.twins]
    lines += [
        (
            "own answers",
            f"{each.language}, {each.kind}: {each.kept} of {each.prompts} kept, {each.refused} of {each.asked} refuse",
        )
        for each in quality.own
    ]
    lines.append(("report", str(folder / QUALITY_TEXT)))
    source = json.dumps([{"path": str(folder / BUNDLES_FOLDER)}])
    return [*lines, *next_lines([f"mlc-ray train --config CONFIG --set data.train={shlex.quote(source)}"])]


_KINDS: dict[FolderKind, Callable[[Place], list[Line]]] = {
    "run": run_lines,
    "score": score_lines,
    "search": search_lines,
    "study": study_lines,
    "scale": scale_lines,
    "probe": _probe,
    "translation": _translation,
}
