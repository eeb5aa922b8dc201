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

from retro_model.evaluation.report.html import (
    Chart,
    Look,
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
    looks = (Look(0, 3, 0.8, copied=True), Look(0, 0, 0.3, copied=False))
    tokens = (Token(text, 3.0, 1.0, True, looks[0]), Token(text, 2.0, 1.0, look=looks[1]), Token(" plain", 1.0, 1.0))
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


def page_of(tokens: tuple[Token, ...], *neighbors: Neighbor) -> str:
    """The page of one passage."""
    return render(Report("t", (), (), (), (), (Passage("l", "s", "before", tokens, neighbors),), ()))


def test_the_common_run_is_marked_across_the_continuation() -> None:
    neighbor = Neighbor("s", 0.25, ("T", "b", "c", "T"), continuation_at=2, first=1, stop=4)
    page = page_of((Token("T", 3.0, 1.0, shared=True),), neighbor)
    marked = re.search(r'<p class="text">T(<mark>.*</mark>)</p></div>', page)
    assert marked is not None
    assert re.sub(r'<span class="then".*?</span>', "|", marked[1]) == "<mark>b</mark>|<mark>cT</mark>"
    assert 'class="l3 run"' in page and "shares 3 tokens in a row" in page


def test_no_common_run_is_no_mark() -> None:
    page = page_of((Token("x", 1, 1),), Neighbor("s", 1.0, ("a", "b"), continuation_at=1))
    assert "<mark>" not in page and "in a row" not in page


# ---- what the model looked at ----------------------------------------------------------------------

FIRST = Neighbor("one", 0.1, ("The", " cat", " sat", " on"), continuation_at=2, first=1, stop=3)
SECOND = Neighbor("two", 0.2, ("A", "\n", " ", ""), continuation_at=2)


def looking(*looks: Look | None) -> tuple[Token, ...]:
    """One token for each look, cheaper if there is one."""
    return tuple(Token(f" t{place}", 3.0, 3.0 if look is None else 1.0, look=look) for place, look in enumerate(looks))


def written_in(page: str) -> list[str]:
    """The passage, and each neighbor's text: a token that was looked at in brackets, numbers behind a ^."""
    body = page[page.index("<article>") :]
    texts = re.findall(r'<p class="text">(.*?)</p>', body, re.DOTALL)
    for html, short in (
        (r'<span class="look copied"[^>]*>([^<]*)</span>', r"[[\1]]"),
        (r'<span class="look"[^>]*>([^<]*)</span>', r"[\1]"),
        (r"<sup[^>]*>([^<]*)</sup>", r"^\1"),
        (r'<span class="then"[^>]*>[^<]*</span>', "|"),
        (r"<mark>([^<]*)</mark>", r"_\1_"),
        (r"<span[^>]*>([^<]*)</span>", r"\1"),
    ):
        texts = [re.sub(html, short, text) for text in texts]
    return texts


def test_a_number_stands_at_the_token_and_at_what_it_looked_at() -> None:
    tokens = looking(Look(0, 2, 0.82, True), None, Look(1, 0, 0.5, False), Look(0, 2, 0.3, False))
    page = page_of(tokens, FIRST, SECOND)
    passage, first, second = written_in(page)
    assert passage == "before t0^1 t1 t2^2 t3^3"
    assert first == "The_ cat_|_ [[sat]]^1,3_ on", "copied, if any of those that looked copied"
    assert second.startswith("[A]^2\n|")
    assert (
        'title="token 1 looked here: 82% of its attention (copied); token 3 looked here: 30% of its attention"' in page
    )
    assert 'title="3.00 &rarr; 1.00 bits; 82% of its attention to one token of neighbor 1: the same token"' in page
    assert 'title="3.00 &rarr; 1.00 bits; 50% of its attention to one token of neighbor 2: another token"' in page
    assert 'title="3.00 &rarr; 3.00 bits"' in page
    assert Page(page).tags.count("sup") == 2 + 2 * 3 - 1, "two in the legend, two for each number, two of them in one"


def test_a_neighbor_that_is_not_shown_has_no_number_and_counts() -> None:
    page = page_of(looking(Look(1, 0, 0.9, True), Look(0, 1, 0.4, True)), FIRST)
    passage, first = written_in(page)
    assert passage == "before t0 t1^1" and first == "The_ [[cat]]^1_|_ sat_ on"
    assert "90% of its attention to one token of neighbor 2, which is not shown: the same token" in page
    assert "For 2 of 2 tokens that became at least 1 bit cheaper, the model looked most at the same token" in page


@pytest.mark.parametrize(
    ("copied", "words"),
    [((True, False, True), "For 2 of 3 tokens that became"), ((False,), "For 0 of 1 token that became"), ((), None)],
)
def test_a_line_counts_what_was_copied(copied: tuple[bool, ...], words: str | None) -> None:
    page = page_of(looking(None, *(Look(0, 0, 0.5, each) for each in copied)), FIRST)
    found = re.search(r'<p class="copied-count">(.*?)</p>', page)
    assert (found is None) if words is None else (found is not None and found[1].startswith(words))


@pytest.mark.parametrize(
    ("token", "in_passage", "in_neighbor"),
    [
        (1, "\u21b5^1\n", "A[\u21b5]^1\n| "),
        (2, "\u2423^1 ", "A\n|[\u2423]^1 "),
        (3, "\u00b7^1", "A\n| [\u00b7]^1"),
    ],
)
def test_a_token_without_a_word_can_be_seen(token: int, in_passage: str, in_neighbor: str) -> None:
    tokens = (Token(SECOND.tokens[token], 3.0, 1.0, look=Look(0, token, 0.5, copied=False)), Token("x", 1.0, 1.0))
    assert written_in(page_of(tokens, SECOND)) == [f"before{in_passage}x", in_neighbor]


def test_the_outline_is_around_one_word_and_what_surrounds_it_is_safe_too() -> None:
    neighbor = Neighbor("s", 0.1, ("a", "\x1f b\x85", " c", " d"), continuation_at=3)
    page = page_of(looking(Look(0, 1, 0.5, False)), neighbor)
    assert written_in(page)[1] == "a\u241f [b]^1\ufffd c| d"


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
