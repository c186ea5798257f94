"""A page as a strict reader sees it: what is open must be closed, and nothing may be fetched."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "col"}
BLOCKS = {
    "article", "caption", "dd", "div", "dt", "figcaption", "h1", "h2", "h3", "header", "li", "p", "pre", "section",
    "small", "summary", "td", "th", "title",
}  # fmt: skip
LOADS = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Parses at once; fails on unbalanced tags. `text` is all that a reader can see, blanks made one."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.alarms: list[str] = []
        self._alarm_depth: int | None = None
        self.feed(html)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice in <{tag} {attributes}>"
        self.elements.append((tag, found))
        self.pieces.append(" " * (tag in BLOCKS))
        if tag not in VOID:
            self.stack.append(tag)
        if found.get("class") == "alarm":
            self._alarm_depth = len(self.stack)
            self.alarms.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> where {self.stack[-3:]} is open"
        if self._alarm_depth == len(self.stack):
            self._alarm_depth = None
        self.stack.pop()
        self.pieces.append(" " * (tag in BLOCKS))

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.pieces.append(data)
            if self._alarm_depth is not None:
                self.alarms[-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check_self_contained(self) -> None:
        """No script, nothing that a browser would fetch, a policy that would forbid it, and headers in every table."""
        assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & {name for name, _ in self.elements}
        for name, attributes in self.elements:
            assert not LOADS & attributes.keys(), (name, attributes)
            assert not any(key.startswith("on") for key in attributes), (name, attributes)
            assert name != "a" or (attributes.get("href") or "").startswith("#")
        policies = [meta.get("content") for meta in self.all("meta") if "http-equiv" in meta]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
        assert all("scope" in th for th in self.all("th"))
        assert len(self.all("caption")) == len(self.all("table"))
        assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in self.all("svg"))
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
