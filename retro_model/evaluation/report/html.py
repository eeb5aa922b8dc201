"""The evaluation as one HTML page: no script, no external resource, dark or light as the reader has it.

    html = render(Report(title=..., summary=..., tables=..., charts=..., passages=..., notes=...))

Everything that comes in is text and is escaped here, once; equal reports give equal bytes. Charts are
inline SVG. Passages follow the paper's appendix: each token colored by how much retrieval lowered its
loss, beside it what was retrieved, the longest common run marked in both. A number links a token that
became much cheaper to the neighbor token that the model looked at when it predicted it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise

# Change of a token's loss in bits from which each shade is used.
SHADES = (0.1, 0.5, 1.5, 3.0)

# A token that retrieval made cheaper by this many bits is linked to the neighbor token that was looked at.
CHEAPER_BITS = 1.0

# Control characters do not belong into HTML: their pictures are shown instead.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), 0xFFFD)


POLICY = "default-src 'none'; style-src 'unsafe-inline'"

# ---- what a report is made of ----------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows under a head: what a row is, a note on that in small print, then its figures."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a chart: a value at each of the chart's places, its interval there, and which of six colors."""

    name: str
    values: tuple[float, ...]
    color: int = 0
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over places that stand evenly, whatever their labels: one line and one place at least.

    `name` is that of its file. `counts` stand in small print below the places and say of how much each is;
    `count_label` says what is counted. Points that are not `joined` are of things, not of amounts.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    places: tuple[str, ...]
    series: tuple[Series, ...]
    counts: tuple[str, ...] = ()
    count_label: str = ""
    joined: bool = True


@dataclass(frozen=True)
class Look:
    """The neighbor token that got the most attention when a token was predicted.

    It is token `token` of neighbor `neighbor`, both counted from 0; a neighbor that the passage does not hold is not
    shown. `share` is its part of all attention, and `copied` says whether it is the same token as the predicted one.
    """

    neighbor: int
    token: int
    share: float
    copied: bool


@dataclass(frozen=True)
class Token:
    """A scored token: its text, its loss in bits without and with retrieval, and whether it is shared.

    `look` is there if retrieval made it cheaper by CHEAPER_BITS or more, and it read the passage's neighbors.
    """

    text: str
    bits_off: float
    bits_on: float
    shared: bool = False
    look: Look | None = None


@dataclass(frozen=True)
class Neighbor:
    """A retrieved chunk and its continuation; the tokens `first` to `stop` (exclusive) are the common run."""

    source: str
    distance: float
    tokens: tuple[str, ...]
    continuation_at: int
    first: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Passage:
    """A chunk of held-out text, the chunk before it, and the neighbors that were retrieved with that one."""

    label: str
    source: str
    before: str
    tokens: tuple[Token, ...]
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class Report:
    """All that the page shows, in its order."""

    title: str
    summary: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    details: tuple[Table, ...]
    passages: tuple[Passage, ...]
    notes: tuple[str, ...]


# ---- the page --------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The whole page as text, to be written as UTF-8."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # even if escaping failed, nothing could run or be loaded
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{safe(report.title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{safe(report.title)}</h1>",
            *(
                f'<p class="{"lead" if place == 0 else "facts"}">{safe(text)}</p>'
                for place, text in enumerate(report.summary)
            ),
            *_tables(report.tables),
            *_charts(report.charts),
            *_tables(report.details),
            *_passages(report.passages),
            "<section>",
            "<h2>How this was measured</h2>",
            *(f"<p>{safe(note)}</p>" for note in report.notes),
            "</section>",
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def safe(text: str) -> str:
    """`text` as HTML that shows it and does nothing else, in elements and in quoted attributes."""
    return escape(text.translate(_VISIBLE), quote=True)


def _tables(tables: Sequence[Table]) -> Iterator[str]:
    if tables:
        yield '<div class="tables">'
        yield from (_table(table) for table in tables)
        yield "</div>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in table.head)
    rows = "".join(
        f'<tr><th scope="row">{safe(name)}<small>{safe(note)}</small></th>'
        f"{''.join(f'<td>{safe(cell)}</td>' for cell in cells)}</tr>"
        for name, note, *cells in table.rows
    )
    caption = f'<p class="caption">{safe(table.caption)}</p>' if table.caption else ""
    return (
        f'<section><h2>{safe(table.title)}</h2>{caption}<div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


# ---- charts ----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 390, 260
RIGHT, TOP, BOTTOM, COUNTS = 12, 12, 46, 14  # COUNTS: more at the bottom where places have counts
AXIS_TITLE, DIGIT = 24, 7  # room for the vertical axis' title, and for each character of its numbers


def _charts(charts: Sequence[Chart]) -> Iterator[str]:
    if charts:
        yield '<section class="charts">'
        yield from (_chart(chart) for chart in charts)
        yield "</section>"


def _chart(chart: Chart) -> str:
    legend = "".join(f'<span><i class="key s{line.color}"></i>{safe(line.name)}</span>' for line in chart.series)
    shown = f'<p class="legend">{legend}</p>' if len(chart.series) > 1 else ""
    caption = f"<figcaption>{safe(chart.caption)}</figcaption>"
    return f"<figure><h2>{safe(chart.title)}</h2>{shown}{chart_svg(chart)}{caption}</figure>"


def chart_svg(chart: Chart) -> str:
    """The chart's lines and axes, colored by the page's style."""
    found = [value for line in chart.series for value in (*line.values, *chain(*line.intervals))]
    ticks = axis_ticks(min(found), max(found))
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    numbers = [f"{tick:.{digits}f}".replace("-", "\u2212") for tick in ticks]
    left = AXIS_TITLE + DIGIT * max(map(len, numbers))
    floor = HEIGHT - BOTTOM - (COUNTS if chart.counts else 0)
    step = (WIDTH - left - RIGHT) / len(chart.places)

    def x(place: int) -> float:
        return left + step * (place + 0.5)

    def y(value: float) -> float:
        return TOP + (floor - TOP) * (1 - (value - ticks[0]) / (ticks[-1] - ticks[0]))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(chart.title)}">']
    for tick, number in zip(ticks, numbers, strict=True):
        zero = " zero" if abs(tick) < 1e-12 else ""
        parts.append(f'<path class="grid{zero}" d="M{left} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{left - 6}" y="{y(tick) + 4:.1f}">{number}</text>')
    for place, label in enumerate(chart.places):
        parts.append(f'<text class="middle" x="{x(place):.1f}" y="{floor + 17}">{safe(label)}</text>')
    for place, count in enumerate(chart.counts):
        parts.append(f'<text class="middle count" x="{x(place):.1f}" y="{floor + 31}">{safe(count)}</text>')
    for line in chart.series:
        points = [(x(place), y(value)) for place, value in enumerate(line.values)]
        if chart.joined:
            path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
            parts.append(f'<path class="line s{line.color}" d="M{path}"/>')
        for place, (low, high) in enumerate(line.intervals):
            parts.append(f'<path class="line s{line.color}" d="M{x(place):.1f} {y(low):.1f}V{y(high):.1f}"/>')
        parts.extend(f'<circle class="dot s{line.color}" cx="{a:.1f}" cy="{d:.1f}" r="3.5"/>' for a, d in points)
    middle = (left + WIDTH - RIGHT) / 2
    below = chart.x_label + (f" ({chart.count_label})" if chart.counts else "")
    parts.append(f'<text class="middle" x="{middle:.1f}" y="{HEIGHT - 5}">{safe(below)}</text>')
    turned = f"translate(11 {(TOP + floor) / 2:.1f}) rotate(-90)"
    parts.append(f'<text class="middle" transform="{turned}">{safe(chart.y_label)}</text>')
    return "".join([*parts, "</svg>"])


def axis_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, the first at most `low` and the last at least `high`."""
    rough = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-6) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 2) + 1)]


# ---- passages --------------------------------------------------------------------------------------


def _passages(passages: Sequence[Passage]) -> Iterator[str]:
    if not passages:
        return
    yield "<section><h2>Held-out passages</h2>"
    yield (
        '<p class="caption">Each token is colored by what retrieval did to its loss. Beside it, what was '
        "retrieved with the text in front of it (gray): the neighbor, then its continuation. The longest run "
        "of tokens that a neighbor shares with the passage is marked in both.</p>"
        f'<p class="caption">Each token that retrieval made at least {CHEAPER_BITS:g} bit cheaper has a number. The '
        "same number stands at the neighbor token that the model looked at most when it predicted that token (by its "
        "attention, averaged over heads and layers). The last token of a passage has none, because it reads neighbors "
        "that are not shown.</p>"
    )
    yield f'<p class="legend shades">{_shade_legend()}</p>'
    yield f'<p class="legend looks">{_look_legend()}</p>'
    yield from (_passage(passage) for passage in passages)
    yield "</section>"


def _shade_legend() -> str:
    marks = [f'<span class="l{number}">&minus;{bits:g}</span>' for number, bits in reversed([*enumerate(SHADES, 1)])]
    marks += [f'<span class="m{number}">+{bits:g}</span>' for number, bits in enumerate(SHADES, 1)]
    return f"cheaper {''.join(marks)} dearer, in bits from &hellip; on"


def _look_legend() -> str:
    marks = (
        ("look copied", "1", "what token 1 looked at: the same token, copied"),
        ("look", "2", "what token 2 looked at: another token"),
    )
    return "".join(
        f'<span><span class="{classes}">token</span><sup>{number}</sup> {meaning}</span>'
        for classes, number, meaning in marks
    )


def _passage(passage: Passage) -> str:
    saved = sum(token.bits_off - token.bits_on for token in passage.tokens)
    total = sum(token.bits_off for token in passage.tokens)
    change = f"{abs(saved):.1f} of {total:.1f} bits {'saved' if saved >= 0 else 'lost'}"
    looks = number_looks(passage)
    numbers = {place: number for number, place in enumerate(looks, start=1)}
    tokens = "".join(_token(token, numbers.get(place)) for place, token in enumerate(passage.tokens))
    neighbors = "".join(
        _neighbor(neighbor, {numbers[place]: look for place, look in looks.items() if look.neighbor == which})
        for which, neighbor in enumerate(passage.neighbors)
    )
    return (
        f'<article><h3><span class="tag">{safe(passage.label)}</span> {change} '
        f'<span class="source">{safe(passage.source)}</span></h3>{_copied(passage)}'
        f'<div class="pair"><p class="text"><span class="before">{safe(passage.before)}</span>{tokens}</p>'
        f'<div class="neighbors">{neighbors}</div></div></article>'
    )


def number_looks(passage: Passage) -> dict[int, Look]:
    """What the passage's tokens looked at, by their places in it, in the order of their numbers: only what is shown."""
    return {
        place: token.look
        for place, token in enumerate(passage.tokens)
        if token.look is not None and token.look.neighbor < len(passage.neighbors)
    }


def _copied(passage: Passage) -> str:
    """For how many of the cheaper tokens the model looked at the token itself; nothing where none became cheaper."""
    looks = [token.look for token in passage.tokens if token.look is not None]
    if not looks:
        return ""
    copied, tokens = sum(look.copied for look in looks), "token" if len(looks) == 1 else "tokens"
    return (
        f'<p class="copied-count">For {copied} of {len(looks)} {tokens} that became at least {CHEAPER_BITS:g} bit '
        "cheaper, the model looked most at the same token in a neighbor.</p>"
    )


def shade(token: Token) -> str:
    """The class of a token's color: l1 to l4 for less loss with retrieval, m1 to m4 for more, or none."""
    saved = token.bits_off - token.bits_on
    level = sum(abs(saved) >= bits for bits in SHADES)
    return "" if level == 0 else f"{'l' if saved > 0 else 'm'}{level}"


def _token(token: Token, number: int | None) -> str:
    """A token in its color, behind it its number if it has one."""
    classes = " ".join(filter(None, [shade(token), "run" if token.shared else ""]))
    attribute = f' class="{classes}"' if classes else ""
    title = f"{token.bits_off:.2f} &rarr; {token.bits_on:.2f} bits"
    if token.look is not None:
        where = f"one token of neighbor {token.look.neighbor + 1}" + ("" if number else ", which is not shown")
        title += f"; {token.look.share:.0%} of its attention to {where}: {_kind(token.look)}"
    if number is None:
        return f'<span{attribute} title="{title}">{safe(token.text)}</span>'
    before, word, after = _around_word(token.text)
    shown = f'<span{attribute} title="{title}">{safe(before + word)}</span>'
    return f'{shown}<sup title="{title}">{number}</sup>{safe(after)}'


def _kind(look: Look) -> str:
    return "the same token" if look.copied else "another token"


def _around_word(text: str) -> tuple[str, str, str]:
    """A token's text as the space before its word, the word, and the space behind it; a sign stands for no word."""
    if word := text.strip():
        before, _, after = text.partition(word)
        return before, word, after
    return "", "\u21b5" if "\n" in text else "\u2423" if text else "\u00b7", text


def _neighbor(neighbor: Neighbor, looks: Mapping[int, Look]) -> str:
    """A neighbor's text with its marks; `looks` are what the passage's tokens looked at in it, by their numbers."""
    looked_at: dict[int, dict[int, Look]] = {}
    for number, look in looks.items():
        looked_at.setdefault(look.token, {})[number] = look
    parts = []
    cuts = {0, neighbor.first, neighbor.stop, neighbor.continuation_at, len(neighbor.tokens)}
    cuts |= {cut for token in looked_at for cut in (token, token + 1)}
    for start, stop in pairwise(sorted(cuts)):
        if start == neighbor.continuation_at:
            parts.append('<span class="then" title="its continuation">&#9656;</span>')
        text = "".join(neighbor.tokens[start:stop])
        shown = _outlined(text, looked_at[start]) if start in looked_at else safe(text)
        parts.append(f"<mark>{shown}</mark>" if neighbor.first <= start < neighbor.stop else shown)
    shared = neighbor.stop - neighbor.first
    facts = f"distance {neighbor.distance:.3f}" + (f", shares {shared} tokens in a row" if shared else "")
    return (
        f'<div class="neighbor"><h4>{safe(neighbor.source)}<span>{facts}</span></h4>'
        f'<p class="text">{"".join(parts)}</p></div>'
    )


def _outlined(text: str, looks: Mapping[int, Look]) -> str:
    """A neighbor token with an outline around its word, behind that the numbers of those that looked at it."""
    before, word, after = _around_word(text)
    classes = "look copied" if any(look.copied for look in looks.values()) else "look"
    title = "; ".join(
        f"token {number} looked here: {look.share:.0%} of its attention{' (copied)' if look.copied else ''}"
        for number, look in looks.items()
    )
    numbers = f'<sup title="{title}">{",".join(map(str, looks))}</sup>'
    return f'{safe(before)}<span class="{classes}" title="{title}">{safe(word)}</span>{numbers}{safe(after)}'


# ---- the style -------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d2126; --soft: #5d6670; --rule: #dcdfe3; --card: #f4f5f6; --mark: #fbe48a;
  --s0: #2166c2; --s1: #c8791b; --s2: #6c757f; --s3: #93459b; --s4: #1b8a78; --s5: #c23b4e; --look: #93459b;
  --less: 38 120 200; --more: 222 110 30; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --ink: #e6e8ea; --soft: #9aa4ae; --rule: #343a40; --card: #1e2226; --mark: #6b5a12;
  --s0: #6aa9f4; --s1: #eaa04e; --s2: #a1abb5; --s3: #d08ad8; --s4: #58c4b0; --s5: #f0808f; --look: #e3b3e9;
  --less: 70 150 235; --more: 235 130 50; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { font-size: 1.15rem; }
.facts, .caption, figcaption, .source { color: var(--soft); }
.facts, .caption, figcaption { font-size: .92rem; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: .88rem; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8rem; }
tr > :last-child { padding-right: 0; }
small { display: block; font-weight: 400; font-size: .85rem; line-height: 1.35; color: var(--soft); }
td { white-space: pre; }
.charts, .tables { display: grid; gap: 0 2.5rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.tables { grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); }
.tables section { min-width: 0; }
figure { margin: 0; }
figcaption { margin-top: .35rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.grid.zero { stroke: var(--soft); }
svg .count { font-size: 10px; opacity: .85; }
.line { stroke: var(--series); stroke-width: 2; stroke-linejoin: round; fill: none; }
.dot { fill: var(--series); }
.key { background: var(--series); display: inline-block; width: .9rem; height: .2rem; border-radius: .1rem;
  margin-right: .4rem; vertical-align: middle; }
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); }
.s2 { --series: var(--s2); } .s3 { --series: var(--s3); }
.s4 { --series: var(--s4); } .s5 { --series: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem; align-items: center; }
.shades { gap: .2rem .25rem; }
.shades span { padding: 0 .4rem; border-radius: .2rem; }
article { margin: 1.25rem 0; padding: .9rem 1rem 1rem; border: 1px solid var(--rule); border-radius: .5rem; }
h3 { font-size: .95rem; font-weight: 500; margin: 0 0 .7rem; }
.tag { font-weight: 650; margin-right: .5rem; }
.source { margin-left: .5rem; font-size: .88rem; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem; }
.pair > .text { position: sticky; top: 1rem; align-self: start; }
.text { margin: 0; max-width: none; white-space: pre-wrap; unicode-bidi: isolate;
  tab-size: 4; font: .84rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.before { color: var(--soft); opacity: .75; }
.l1 { background: rgb(var(--less) / .12); } .l2 { background: rgb(var(--less) / .25); }
.l3 { background: rgb(var(--less) / .42); } .l4 { background: rgb(var(--less) / .62); }
.m1 { background: rgb(var(--more) / .12); } .m2 { background: rgb(var(--more) / .25); }
.m3 { background: rgb(var(--more) / .42); } .m4 { background: rgb(var(--more) / .62); }
.run { text-decoration: underline 2px; text-underline-offset: .2em; }
mark { background: var(--mark); color: inherit; border-radius: .15rem; }
.look { outline: 1px dashed var(--look); border-radius: .15rem; }
.look.copied { outline: 1.5px solid var(--look); }
sup { font: 700 .66rem/0 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  vertical-align: .5em; color: var(--look); padding: 0 .1rem 0 .15rem; user-select: none; }
sup::before { content: "\\2060"; } /* no line begins with a number */
mark sup { color: inherit; }
.copied-count { font-size: .88rem; margin: -.4rem 0 .7rem; max-width: none; }
.then { color: var(--s0); padding: 0 .2rem; }
.neighbor { background: var(--card); border-radius: .35rem; padding: .6rem .75rem; margin-bottom: .6rem; }
.neighbor:last-child { margin-bottom: 0; }
.neighbor .text { font-size: .78rem; }
h4 { font-size: .82rem; font-weight: 600; margin: 0 0 .35rem; }
h4 span { color: var(--soft); font-weight: 400; margin-left: .5rem; }
@media (max-width: 44rem) {
  main { padding: 1.25rem .9rem 3rem; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  .pair > .text { position: static; }
  th, td { padding-right: .55rem; font-size: .82rem; }
  thead th, small { font-size: .76rem; }
  tbody th { min-width: 4rem; }
  td { white-space: normal; } }
"""
