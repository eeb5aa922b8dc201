"""The report's page: whole, quiet, and no way through it for hostile text."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import PHONE, needs_browser, show
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_model.report import (
    Chart,
    Neighbor,
    Passage,
    Report,
    Series,
    Table,
    Token,
    axis_ticks,
    chart_svg,
    render,
    safe,
    shade,
)

HOSTILE = (
    "</span></p></style></title><script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "<!-- ]]> &amp; &#60;b&#62; <iframe src=javascript:alert(1)>",
    "a\x00b\x07c\x1b[31m\x7f\x85 \u202e txt \ud800",
)


def chart_of(values: tuple[float, ...], text: str = "t", intervals: tuple[tuple[float, float], ...] = ()) -> Chart:
    places = (text, *map(str, range(1, len(values))))
    series = (Series(text, values, 0, intervals), Series(text, values, 1))
    return Chart("name", text, text, text, text, places, series, places, text)


def report_of(text: str) -> Report:
    """A report that has `text` in every place that takes one."""
    tokens = (Token(text, 3.0, 1.0, shared=True), Token(text, 1.0, 2.0), Token(" plain", 1.0, 1.0))
    neighbor = Neighbor(text, 0.25, (text, "b", "c", text), continuation_at=2, first=1, stop=4)
    return Report(
        title=text,
        summary=(text, text),
        tables=(Table(text, (text, "figure"), ((text, text, text),), text),),
        charts=(chart_of((1.0, 2.0), text, ((0.5, 1.5), (1.0, 3.0))),),
        details=(Table(text, (text, "figure"), ((text, text, text),), text),),
        passages=(Passage(text, text, text, tokens, (neighbor,)),),
        notes=(text,),
    )


class Page(HTMLParser):
    """Tags and attributes of a page, checked for balance, and its text."""

    EMPTY = frozenset({"meta", "circle", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    page, harmless = Page(render(report_of(text))), Page(render(report_of("harmless")))
    assert page.tags == harmless.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
    shown = text.translate({0: 0x2400, 7: 0x2407, 27: 0x241B, 127: 0x2421, 0x85: 0xFFFD, 0xD800: 0xFFFD})
    assert page.text.count(shown) == harmless.text.count("harmless") > 15


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_safe_and_can_be_written(text: str) -> None:
    found = safe(text)
    assert not set("<>\"'") & set(found) and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", found)
    found.encode("utf-8")


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = render(report_of("harmless"))
    assert not re.search(r"<script|https?:|url\(|@import|<link|<img|javascript", page)
    assert {"src", "href", "srcset"}.isdisjoint(name for name, _ in Page(page).attributes)
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_an_empty_report_is_a_page() -> None:
    page = render(Report("title", (), (), (), (), (), ()))
    assert Page(page).text.split()[:2] == ["title", "title"]


def test_equal_reports_are_equal_pages() -> None:
    assert render(report_of("a")) == render(report_of("a"))


@pytest.mark.parametrize(
    ("off", "on", "expected"),
    [
        (1.0, 1.0, ""),
        (1.0, 0.95, ""),
        (1.0, 0.8, "l1"),
        (3.0, 2.0, "l2"),
        (9.0, 1.0, "l4"),
        (1.0, 1.2, "m1"),
        (1.0, 9.0, "m4"),
    ],
)
def test_the_shade_says_what_retrieval_did(off: float, on: float, expected: str) -> None:
    assert shade(Token("x", off, on)) == expected


def test_the_common_run_is_marked_across_the_continuation() -> None:
    page = render(report_of("T"))
    marked = re.search(r'<p class="text">T(<mark>.*</mark>)</p></div>', page)
    assert marked is not None
    assert re.sub(r'<span class="then".*?</span>', "|", marked[1]) == "<mark>b</mark>|<mark>cT</mark>"
    assert 'class="l3 run"' in page and "shares 3 tokens in a row" in page


def test_no_common_run_is_no_mark() -> None:
    neighbor = Neighbor("s", 1.0, ("a", "b"), continuation_at=1)
    page = render(Report("t", (), (), (), (), (Passage("l", "s", "b", (Token("x", 1, 1),), (neighbor,)),), ()))
    assert "<mark>" not in page and "in a row" not in page


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_even_and_hold_the_values(low: float, span: float) -> None:
    high = low + span
    ticks = axis_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 3 <= len(ticks) <= 7
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert min(steps) > 0 and max(steps) - min(steps) <= 1e-9 * max(map(abs, ticks))


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=9))
def test_a_chart_draws_every_value_inside_its_frame(values: list[float]) -> None:
    intervals = tuple((value - 0.1, value + 0.2) for value in values)
    chart = dataclasses.replace(chart_of(tuple(values)), series=(Series("a", tuple(values), 0, intervals),))
    svg = chart_svg(chart)
    ends = re.findall(r'<path class="line s0" d="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)
    assert len(ends) == len(values) and all(0 <= float(end) <= 260 for pair in ends for end in pair)
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([^"]*)" cy="([^"]*)"', svg)]
    assert len(points) == len(values)
    assert all(0 <= x <= 390 and 0 <= y <= 260 for x, y in points)
    by_value = sorted(range(len(values)), key=lambda place: values[place])
    heights = [points[place][1] for place in by_value]
    assert heights == sorted(heights, reverse=True), "a greater value stands higher"


# ---- a real browser --------------------------------------------------------------------------------


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_hostile_text_and_nothing_else_at_phone_width(tmp_path: Path) -> None:
    for number, hostile in enumerate(HOSTILE):
        text = hostile + " averyveryveryveryverylongwordwithoutanyspaceinit" * 3
        page = tmp_path / f"{number}.html"
        page.write_text(render(report_of(text)), encoding="utf-8")
        shown = show(page, tmp_path)
        assert shown.needed_width <= shown.given_width <= PHONE, "the page is wider than a phone"
        assert not {"script", "img", "iframe"} & set(shown.tags) and shown.tags["article"] == 1
        assert shown.console == []


@pytest.mark.slow
@needs_browser
def test_what_a_browser_complains_of_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(report_of("harmless")).replace("<main>", "<main><script>alert(1)</script>"))
    shown = show(page, tmp_path)
    assert shown.tags["script"] == 1
    assert any("Content Security Policy" in line for line in shown.console), "and the policy stops it"
