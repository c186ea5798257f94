"""The report in a real browser, on a phone and on a screen: its width, the keyboard, and print."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlc_ray.cli import main
from tests.report.browser import PROGRAM, Browser, browsing
from tests.report.html_checks import Page
from tests.report.runs import THIRTY, grid, write_score
from tests.report.test_write import make_run

in_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on PATH to lay the page out")
WIDTHS = pytest.mark.parametrize("width", [390, 1280])
FOCUSABLE = "document.querySelectorAll('summary, a[href], button, input, select, textarea, [tabindex]')"
PLACE = f"[...{FOCUSABLE}].indexOf(document.activeElement)"
PAGE = "document.documentElement"


def report(folder: Path, models: int) -> Path:
    """Of this many models in thirty languages and two; responses are shown, and names are long."""
    run, out = make_run(folder / "run", THIRTY), folder / "report.html"
    for i in range(models - 2):
        rows = grid(["en", "sw"], lambda kind, code: 0.5, seed=i)
        write_score(run / "scores" / f"a_name_without_any_blank_that_is_longer_than_a_phone_is_wide_{i}", rows)
    assert main(["report", str(run), "--out", str(out), "--samples", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {models: report(tmp_path_factory.mktemp(f"models-{models}"), models) for models in (2, 5)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        yield found


def open_all(browser: Browser) -> None:
    browser.say("document.querySelectorAll('details').forEach(each => { each.open = true; })")


@in_browser
@pytest.mark.slow
@WIDTHS
@pytest.mark.parametrize("models", [2, 5])
def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[int, Path], width: int, models: int) -> None:
    browser.show(pages[models], width)
    for _ in range(2):
        shown, content = browser.say(f"[{PAGE}.clientWidth, {PAGE}.scrollWidth]")
        assert width - 20 <= shown <= width and content <= shown
        open_all(browser)


@in_browser
@pytest.mark.slow
@WIDTHS
def test_the_keyboard_reaches_everything_in_order_opens_folds_and_scrolls(
    browser: Browser, pages: dict[int, Path], width: int
) -> None:
    browser.show(pages[5], width)
    seen = f"[...{FOCUSABLE}].flatMap((each, at) => each.checkVisibility({{contentVisibilityAuto: true}}) ? [at] : [])"
    expected = browser.say(seen)
    assert len(expected) > 10
    order = []
    for _ in expected:
        browser.press("Tab")
        order.append(browser.say(PLACE))
        style = browser.say("getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", "whoever looks sees where the focus is"
    assert order == expected
    browser.press("Tab", shift=True)
    assert browser.say(PLACE) == expected[-2]

    fold = "document.querySelector('details')"
    browser.say(f"{fold}.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.say(f"{fold}.open") is True
    browser.press("Tab")  # what it holds comes next
    assert browser.say(f"{fold}.contains(document.activeElement) && document.activeElement.tagName") == "DIV"
    browser.press("Tab", shift=True)
    browser.press(" ")
    assert browser.say(f"{fold}.open") is False

    open_all(browser)
    wide = "[...document.querySelectorAll('.scroll')].find(each => each.scrollWidth > each.clientWidth + 40)"
    assert browser.say(f"(() => {{ const found = {wide}; found?.focus(); return found !== undefined; }})()")
    browser.press("ArrowRight")
    end = time.monotonic() + 10
    while not browser.say("document.activeElement.scrollLeft > 0"):
        assert time.monotonic() < end, "an arrow scrolls a table sideways"
        time.sleep(0.02)


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("models", [2, 5])
def test_all_that_is_open_is_printed_and_no_column_is_cut_off(
    browser: Browser, pages: dict[int, Path], models: int
) -> None:
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        browser.show(pages[models], 718)  # A4 without margins of a centimetre
        folded = sheets(browser.printed())
        open_all(browser)
        shown, content = browser.say(f"[{PAGE}.clientWidth, {PAGE}.scrollWidth]")
        assert content <= shown
        cut = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)"
        assert browser.say(f"{cut}.map(each => each.ariaLabel)") == []
        assert 1 < folded < sheets(browser.printed())
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def sheets(pdf: bytes) -> int:
    assert pdf.startswith(b"%PDF")
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_what_a_browser_needs_for_keyboard_and_print_is_in_the_page(pages: dict[int, Path]) -> None:
    """Where there is no browser: no order of its own, regions that scroll are reached and named, print unfolds them."""
    html = pages[5].read_text(encoding="utf-8")
    page = Page(html)
    assert {attributes["tabindex"] for _, attributes in page.elements if "tabindex" in attributes} == {"0"}
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert regions
    assert all((each["tabindex"], each["role"]) == ("0", "region") and each["aria-label"] for each in regions)
    assert len(page.all("summary")) == len(page.all("details")) > 5
    style = html[html.index("<style>") : html.index("</style>")]
    assert "outline: none" not in style and "outline: 0" not in style
    print_rules = style[style.index("@media print") :]
    assert ".scroll { overflow: visible; }" in print_rules and ".heat { min-width: 0; }" in print_rules
    everywhere = re.sub(r"@media[^{]*", "", style)
    assert [
        wide for wide in re.findall(r"(?<![\w-])(?:min-)?width: ([\d.]+)(px|rem)", everywhere) if px(*wide) > 390
    ] == []


def px(number: str, unit: str) -> float:
    return float(number) * (16 if unit == "rem" else 1)
