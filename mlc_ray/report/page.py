"""The report as one HTML file: no script, no request, no font or image from elsewhere.

Jinja escapes all text that a template shows, and `clean` removes control characters first: model output is never
markup.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mlc_ray import __version__
from mlc_ray.report import palette
from mlc_ray.report.collect import Collection, without_folders
from mlc_ray.report.text import clean, without_paths
from mlc_ray.report.view import view_of


def render(collection: Collection, *, samples: int = 0, public: bool = False, redact: bool = False) -> str:
    """The whole page.

    Args:
        collection: What it shows.
        samples: Responses per model where an attack succeeded that are shown.
        public: Without settings, and without paths and hosts: of each the last part alone stands, after `…/`.
        redact: Of these responses the opening alone is shown.
    """
    if public:
        collection = without_folders(collection)
    view = view_of(collection, samples, public=public, redact=redact)
    template = environment(public=public).get_template("page.html.j2")
    return template.render(view=view, version=__version__, colours=palette.css_rules(), steps=range(palette.STEPS))


def environment(*, public: bool = False) -> Environment:
    """Where the templates are, with every text escaped and every unknown name an error."""
    return Environment(
        loader=PackageLoader("mlc_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_public if public else _clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _public(value: Any) -> Any:
    return _clean(without_paths(value) if isinstance(value, str) and not hasattr(value, "__html__") else value)


def _clean(value: Any) -> Any:
    # What a macro made is markup already (it has __html__), and was cleaned where its values were shown.
    return value if hasattr(value, "__html__") or not isinstance(value, str) else clean(value)
