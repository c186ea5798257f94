"""The settings of a search in its folder: written whole, read back, and compared with those that a command gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlc_ray.config import ConfigError, SearchConfig, apply_override, dump_yaml, parse_config, parse_yaml
from mlc_ray.config.base import by_dotted_name
from mlc_ray.runs import BASE_FILE, COMMITS_FILE, SEARCH_CONFIG_FILE
from mlc_ray.search.space import Space
from mlc_ray.search.trial import SearchError
from mlc_ray.storage import Commits, Place, absolute_if_here, local_side

MAY_CHANGE = ("trials", "max_hours", "scoring.max_unparsed")
"""The settings that may differ when a search is resumed."""


def check_may_change(folder: Place, overrides: Sequence[str]) -> None:
    """Refuse to resume a search with other settings than those of `MAY_CHANGE`.

    Raises:
        ConfigError: another is given.
    """
    for override in overrides:
        if (name := override.partition("=")[0].strip()) not in MAY_CHANGE:
            raise ConfigError(
                f"{override!r} cannot go with the search in {str(folder)!r}, which keeps the settings that it began "
                f"with; {', '.join(MAY_CHANGE)} may change: start a new search for {name}"
            )


def changed_config(config: SearchConfig, overrides: Sequence[str]) -> SearchConfig:
    """The settings of a search with others of `MAY_CHANGE`.

    Raises:
        ConfigError: there are fewer trials than before.
    """
    raw = config.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        apply_override(raw, override)
    changed = parse_config(SearchConfig, raw)
    if config.trials is not None and (changed.trials or math.inf) < config.trials:
        raise ConfigError(
            f"trials={changed.trials}, but this search has {config.trials} already: give more, or as many"
        )
    return changed


def write_settings(config: SearchConfig, space: Space, folder: Place, commits: Commits) -> None:
    """Write all that `load_search` needs, so that it works in any folder and after the files it names are gone.

    `commits` are those that names of the hub stand for.
    """
    (folder / COMMITS_FILE).write_json(commits)
    (folder / BASE_FILE).write_text(dump_yaml(space.base))
    write_config(config, space, folder)


def write_config(config: SearchConfig, space: Space, folder: Place) -> None:
    """Write the settings of the search itself anew."""
    (folder / SEARCH_CONFIG_FILE).write_json(settings_in(config, space, folder))


def changed_settings(config: SearchConfig, space: Space, folder: Path | Place) -> list[str]:
    """How the search that was begun in `folder` differs from this one: `NAME was X, now Y` for each setting.

    Those that may change are left out.
    """
    folder = Place(folder)
    stored = _stored(folder).model_dump(mode="json")
    commits = (folder / COMMITS_FILE).read_json()
    given = parse_config(SearchConfig, settings_in(config, space, folder)).model_dump(mode="json")
    given["scoring"] = _with_dtypes(given["scoring"], stored["scoring"])
    before = by_dotted_name({"search": stored, "train": parse_yaml((folder / BASE_FILE).read_text(), BASE_FILE)})
    now = by_dotted_name({"search": given, "train": dict(space.base)})
    ignored = {"search.resume", *(f"search.{name}" for name in MAY_CHANGE)}
    if now.get("train.model.dtype", "auto") == "auto":
        ignored.add("train.model.dtype")
    return [
        f"{name.removeprefix('search.')} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - ignored)
        if before.get(name) not in (now.get(name), _with_commits(name, now.get(name), commits))
    ]


def _with_dtypes(given: Any, stored: Any) -> Any:
    """`given` with what `dtype: auto` of any engine in it, judges of a panel among them, became in `stored`."""
    if isinstance(given, dict) and isinstance(stored, dict):
        found = {name: _with_dtypes(value, stored.get(name)) for name, value in given.items()}
        return found | {"dtype": stored["dtype"]} if found.get("dtype") == "auto" and "dtype" in stored else found
    if isinstance(given, list) and isinstance(stored, list) and len(given) == len(stored):
        return [_with_dtypes(one, other) for one, other in zip(given, stored, strict=True)]
    return given


_SOURCES = (
    "search.scoring.benchmarks",
    "search.confirm.benchmarks",
    "train.data.train",
    "train.data.validation.sources",
)


def _with_commits(name: str, value: Any, commits: Commits) -> Any:
    """The setting `name` with the commits that its names of the hub stood for when the search began."""
    stood_for = commits["data set" if name in _SOURCES else "model"]

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(each) for each in value]
        if isinstance(value, dict):
            return {key: replaced(each) for key, each in value.items()}
        return stood_for.get(value, value) if isinstance(value, str) else value

    return replaced(value)


def settings_in(config: SearchConfig, space: Space, folder: Place) -> dict[str, Any]:
    """The settings as `folder` keeps them: paths made absolute, the run that trials share in a file beside them."""
    settings = config.model_dump(mode="json", exclude_unset=True)
    settings |= {"output_dir": str(folder.parent), "train": BASE_FILE, "set": []}
    settings["space"] = {
        name: each.model_dump(mode="json", exclude_unset=True) for name, each in space.parameters.items()
    }
    for place in [*settings["scoring"]["benchmarks"], *(settings.get("confirm", {}).get("benchmarks") or ())]:
        place["path"] = absolute_if_here(place["path"])
    _make_absolute(settings["scoring"].get("judge") or {})
    return settings


def _make_absolute(judge: dict[str, Any]) -> None:
    """Local paths of a judge, its translator and the judges of a panel become absolute, in place."""
    for section in (judge, judge.get("translate") or {}):
        for name in ("model", "prompt"):
            if isinstance(section.get(name), str):
                section[name] = absolute_if_here(section[name])
        endpoint = section.get("endpoint") or {}
        if endpoint.get("cache_dir") is not None:  # it need not be there yet
            endpoint["cache_dir"] = str(Path(endpoint["cache_dir"]).expanduser().absolute())
    for member in judge.get("judges") or ():
        _make_absolute(member["judge"])


def load_search(folder: Place) -> SearchConfig:
    """The settings of the search in a folder.

    Raises:
        SearchError: The folder holds no search.
    """
    if not (folder / SEARCH_CONFIG_FILE).is_file():
        raise SearchError(
            f"{str(folder)!r} is not a search folder, it has no {SEARCH_CONFIG_FILE}: a search is in OUTPUT_DIR/NAME, "
            "e.g. runs/search-demo"
        )
    config = _stored(folder)
    # relative in the file: a folder that was moved is still whole
    base = folder / config.train
    if not folder.is_local:  # a config file is read as a file
        base.storage.fetch(str(base), local_side(folder) / config.train)
        base = Place(local_side(folder) / config.train)
    return config.model_copy(update={"train": str(base), "output_dir": str(folder.parent)})


def _stored(folder: Place) -> SearchConfig:
    file = folder / SEARCH_CONFIG_FILE  # JSON is YAML
    return parse_config(SearchConfig, parse_yaml(file.read_text(), str(file)))
