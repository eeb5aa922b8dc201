"""The report's page and charts: complete, self-contained, deterministic, and safe against hostile text."""

import dataclasses
import io
import re
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from browser import PHONE, needs_browser, show
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from retro_model.core.printable import printable
from retro_model.evaluation.report import charts
from retro_model.evaluation.report.charts import PALETTE, Chart, Drawing, Series, draw, plot
from retro_model.evaluation.report.html import Look, Neighbor, Passage, Report, Table, Token, render, shade
from stages.common.harness import _code_files

REPORT = "retro_model/evaluation/report"
LABELS_MAY_NOT_FIT = pytest.mark.filterwarnings(  # hostile labels fill the chart or have signs that its font lacks
    "ignore:Glyph .* missing from font", "ignore:constrained_layout not applied"
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


def page_of_report(report: Report) -> str:
    return render(report, {chart.name: draw(chart) for chart in report.charts})


class Page(HTMLParser):
    """Tags and attributes of a page, checked for balance, and its text."""

    EMPTY = frozenset({"meta"})

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


@LABELS_MAY_NOT_FIT
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    page, harmless = Page(page_of_report(report_of(text))), Page(page_of_report(report_of("harmless")))
    assert page.tags == harmless.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
    signs = {0: 0x2400, 7: 0x2407, 27: 0x241B, 127: 0x2421, 0x85: 0xFFFD, 0x202E: 0xFFFD, 0xD800: 0xFFFD}
    shown = text.translate(signs)
    assert page.text.count(shown) == harmless.text.count("harmless") > 15


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_safe_and_can_be_written(text: str) -> None:
    page = render(Report(text, (), (), (), (), (), ()), {})
    found = page[page.index("<h1>") + 4 : page.index("</h1>")]
    assert not set("<>\"'") & set(found) and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", found)
    assert Page(page).text.count(printable(text)) >= 2
    page.encode("utf-8")


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = page_of_report(report_of("harmless"))
    assert not re.search(r"<script|https?:|url\(|@import|<link|<img|javascript", page)
    attributes = Page(page).attributes
    assert {"src", "href", "srcset"}.isdisjoint(name for name, _ in attributes)
    links = [value for name, value in attributes if name == "xlink:href"]
    defined = [value for name, value in attributes if name == "id"]
    assert links and {f"#{name}" for name in defined} >= set(links), "drawings refer to their own parts alone"
    assert "default-src 'none'" in page and 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_an_empty_report_is_a_page() -> None:
    page = render(Report("title", (), (), (), (), (), ()), {})
    assert page.startswith("<!DOCTYPE html>") and Page(page).text.split()[:2] == ["title", "title"]


def test_equal_reports_are_equal_pages() -> None:
    assert page_of_report(report_of("a")) == page_of_report(report_of("a"))


def test_the_template_and_its_style_are_part_of_the_package_and_of_the_stages_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    files = [file for file in _code_files(Path("retro_model/evaluation")) if file.suffix != ".py"]
    assert sorted(file.as_posix() for file in files) == [f"{REPORT}/page.html.jinja", f"{REPORT}/style.css"]
    packaged = re.search(r'^"retro_model\.evaluation\.report" = \[(.*)\]$', Path("pyproject.toml").read_text(), re.M)
    assert packaged is not None
    patterns = re.findall(r'"([^"]*)"', packaged[1])
    assert all(any(fnmatch(file.name, pattern) for pattern in patterns) for file in files)


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
    return render(Report("t", (), (), (), (), (Passage("l", "s", "before", tokens, neighbors),), ()), {})


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
    assert 'title="3.00 \u2192 1.00 bits; 82% of its attention to one token of neighbor 1: the same token"' in page
    assert 'title="3.00 \u2192 1.00 bits; 50% of its attention to one token of neighbor 2: another token"' in page
    assert 'title="3.00 \u2192 3.00 bits"' in page
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


# ---- charts ----------------------------------------------------------------------------------------

POINT = re.compile(r'<use xlink:href="#(\w+)" x="([^"]*)" y="([^"]*)" style="fill: var\(--s0\)')


def points_of(drawing: Drawing) -> list[tuple[float, float]]:
    """Where the SVG has the dots of the first color, in points from the upper left."""
    return [(float(x), float(y)) for _, x, y in POINT.findall(drawing.svg)]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=9))
def test_a_chart_draws_every_value_inside_its_frame(values: list[float]) -> None:
    intervals = tuple((value - 0.1, value + 0.2) for value in values)
    chart = dataclasses.replace(chart_of(tuple(values)), series=(Series("a", tuple(values), 0, intervals),))
    drawing = draw(chart)
    ends = re.findall(
        r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n" style="[^"]*stroke: var\(--s0\)', drawing.svg
    )
    width, height = (72 * inches for inches in charts.INCHES)
    assert len(ends) >= len(values) and all(0 <= float(end) <= height for pair in ends for end in pair)
    points = points_of(drawing)
    assert len(points) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    by_value = sorted(range(len(values)), key=lambda place: values[place])
    heights = [points[place][1] for place in by_value]
    assert heights == sorted(heights, reverse=True), "a greater value stands higher"


@pytest.mark.parametrize("joined", [True, False])
def test_a_chart_has_its_data_and_its_words(joined: bool) -> None:
    intervals = ((-0.5, 1.5), (1.0, 3.0))
    series = (Series("on", (1.0, 2.0), 0, intervals), Series("_off", (3.0, -1.0), 5))
    chart = Chart("n", "title", "c", "across", "up", ("$p$", "q"), series, ("1,000", "2,000"), "count", joined)
    (axes,) = plot(chart).axes
    on, off, *zero = axes.lines
    assert np.asarray(on.get_xydata()).tolist() == [[0, 1], [1, 2]]
    assert np.asarray(off.get_xydata()).tolist() == [[0, 3], [1, -1]]
    assert [line.get_linestyle() for line in (on, off)] == ["-" if joined else "None"] * 2
    assert [line.get_color() for line in (on, off)] == [PALETTE["s0"], PALETTE["s5"]]
    assert len(zero) == 1, "0 is inside, so it has a line"
    (vertical,) = axes.collections
    assert [path.vertices.tolist() for path in vertical.get_paths()] == [[[0, -0.5], [0, 1.5]], [[1, 1], [1, 3]]]
    page = Page(draw(chart).svg)
    words = page.text.split("\n")
    for word in ("$p$", "q", "1,000", "2,000", "across (count)", "up", "on", "_off"):
        assert word in [line.strip() for line in words]
    assert ("role", "img") in page.attributes and ("aria-label", "title, on, _off") in page.attributes


def test_the_png_and_the_svg_are_one_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(charts, "plot", lambda chart: figures.append(plot(chart)) or figures[-1])
    chart = dataclasses.replace(chart_of((1.0, 2.0, 1.5)), title="")  # a title takes some room in the PNG
    chart = dataclasses.replace(chart, series=chart.series[:1], joined=False)
    drawing = draw(chart)
    assert len(figures) == 1
    pixels = matplotlib.image.imread(io.BytesIO(drawing.png))[..., :3]
    assert pixels.shape[:2] == tuple(round(inches * charts.DOTS_PER_INCH) for inches in reversed(charts.INCHES))
    blue = np.array([int(PALETTE["s0"][place : place + 2], 16) for place in (1, 3, 5)]) / 255
    points = points_of(drawing)
    assert len(points) == 3
    for x, y in points:
        dot = pixels[round(y * charts.DOTS_PER_INCH / 72), round(x * charts.DOTS_PER_INCH / 72)]
        np.testing.assert_allclose(dot, blue, atol=0.01)


def test_drawings_are_equal_whatever_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = chart_of((1.0, 2.0), intervals=((0.5, 1.5), (1.0, 3.0)))
    before = draw(chart)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9.0)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.facecolor", "red")
    settings_before = dict(matplotlib.rcParams)
    assert draw(chart) == before
    assert dict(matplotlib.rcParams) == settings_before, "and those stay as they were"


def test_two_charts_of_a_page_share_no_id() -> None:
    one, other = (
        re.findall(r'\bid="([^"]*)"', draw(dataclasses.replace(chart_of((1.0, 2.0)), name=name)).svg)
        for name in ("one", "other")
    )
    assert one and len({*one, *other}) == len(one) + len(other)


def test_the_charts_have_the_colors_of_the_light_page() -> None:
    style = (ROOT / REPORT / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for name, color in PALETTE.items():
        assert f"--{name}: {color};" in light and f"--{name}: #" in dark
    svg = draw(chart_of((1.0, 2.0))).svg
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'xlink:href="[^"]*"', "", svg)), "dark pages change all colors"


# ---- a real browser --------------------------------------------------------------------------------


@LABELS_MAY_NOT_FIT
@pytest.mark.slow
@needs_browser
def test_a_browser_shows_hostile_text_and_nothing_else_at_phone_width(tmp_path: Path) -> None:
    for number, hostile in enumerate(HOSTILE):
        text = hostile + " averyveryveryveryverylongwordwithoutanyspaceinit" * 3
        page = tmp_path / f"{number}.html"
        page.write_text(page_of_report(report_of(text)), encoding="utf-8")
        shown = show(page, tmp_path)
        assert shown.needed_width <= shown.given_width <= PHONE, "the page is wider than a phone"
        assert not {"script", "img", "iframe"} & set(shown.tags) and shown.tags["article"] == 1
        assert shown.console == []


@pytest.mark.slow
@needs_browser
def test_what_a_browser_complains_of_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of_report(report_of("harmless")).replace("<main>", "<main><script>alert(1)</script>"))
    shown = show(page, tmp_path)
    assert shown.tags["script"] == 1
    assert any("Content Security Policy" in line for line in shown.console), "and the policy stops it"
