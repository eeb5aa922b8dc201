"""The evaluation as one HTML page: no script, no external resource, dark or light as the reader has it.

    html = render(Report(title=..., summary=..., tables=..., charts=..., passages=..., notes=...), drawings)

page.html.jinja is the page and style.css its style; this module says what a page is made of and computes what the
template prints. All values are text and are escaped by the template engine; equal reports give equal bytes. Passages
follow the paper's appendix: each token is colored by how much retrieval lowered its loss, beside it is what was
retrieved, and the longest common run is marked in both. A number links a token that became much cheaper to the
neighbor token that the model looked at when it predicted it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from retro_model.core.printable import printable
from retro_model.evaluation.report.charts import Chart, Drawing

# Change of a token's loss in bits from which each shade is used.
SHADES = (0.1, 0.5, 1.5, 3.0)

# A token that retrieval made cheaper by this many bits is linked to the neighbor token that was looked at.
CHEAPER_BITS = 1.0

# ---- what a report is made of ----------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows under a head: what a row is, a note on that in small print, then its figures."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Look:
    """The neighbor token that got the most attention when a token was predicted.

    It is token `token` of neighbor `neighbor`, both counted from 0. Only the passage's neighbors are shown, and
    `neighbor` may be a later one. `share` is its part of all attention; `copied`: it equals the predicted token.
    """

    neighbor: int
    token: int
    share: float
    copied: bool


@dataclass(frozen=True)
class Token:
    """A scored token: its text, its loss in bits without and with retrieval, and whether it is shared.

    `look` is set if retrieval made it cheaper by at least CHEAPER_BITS and it read the passage's neighbors.
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
    """Everything on the page, in the order of the page."""

    title: str
    summary: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    details: tuple[Table, ...]
    passages: tuple[Passage, ...]
    notes: tuple[str, ...]


# ---- the page --------------------------------------------------------------------------------------


def render(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """The whole page as text, to be written as UTF-8; `drawings` are those of the report's charts, by name."""
    return _template().render(
        report=report, drawings=drawings, shades=[f"{bits:g}" for bits in SHADES], cheaper_bits=f"{CHEAPER_BITS:g}"
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    functions = (around_word, bits_saved, looks_title, neighbor_pieces, number_looks, shade, token_title)
    environment.globals.update({function.__name__: function for function in functions})
    return environment.get_template("page.html.jinja")


# ---- passages --------------------------------------------------------------------------------------


def number_looks(passage: Passage) -> dict[int, int]:
    """The number, from 1, of each token that looked at a neighbor that is shown, by the token's place."""
    shown = (
        place
        for place, token in enumerate(passage.tokens)
        if token.look is not None and token.look.neighbor < len(passage.neighbors)
    )
    return {place: number for number, place in enumerate(shown, start=1)}


def bits_saved(passage: Passage) -> str:
    """What retrieval saved or lost over the whole passage, in words."""
    saved = sum(token.bits_off - token.bits_on for token in passage.tokens)
    total = sum(token.bits_off for token in passage.tokens)
    return f"{abs(saved):.1f} of {total:.1f} bits {'saved' if saved >= 0 else 'lost'}"


def shade(token: Token) -> str:
    """The class of a token's color: l1 to l4 for less loss with retrieval, m1 to m4 for more, or none."""
    saved = token.bits_off - token.bits_on
    level = sum(abs(saved) >= bits for bits in SHADES)
    return "" if level == 0 else f"{'l' if saved > 0 else 'm'}{level}"


def token_title(token: Token, number: int | None) -> str:
    """A token's losses and what it looked at; without a number, the neighbor that it looked at is not shown."""
    title = f"{token.bits_off:.2f} \u2192 {token.bits_on:.2f} bits"
    if token.look is None:
        return title
    where = f"one token of neighbor {token.look.neighbor + 1}" + ("" if number else ", which is not shown")
    kind = "the same token" if token.look.copied else "another token"
    return f"{title}; {token.look.share:.0%} of its attention to {where}: {kind}"


def around_word(text: str) -> tuple[str, str, str]:
    """A token's text as the space before its word, the word, and the space after it; a sign stands for no word."""
    if word := text.strip():
        before, _, after = text.partition(word)
        return before, word, after
    return "", "\u21b5" if "\n" in text else "\u2423" if text else "\u00b7", text


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a neighbor that look alike; `looks` are those at this one token, by their numbers."""

    text: str
    shared: bool
    begins_continuation: bool
    looks: Mapping[int, Look] = field(default_factory=dict)


def neighbor_pieces(passage: Passage, which: int) -> Iterator[Piece]:
    """The text of the passage's neighbor `which`, cut where its marks change."""
    neighbor = passage.neighbors[which]
    looked_at: dict[int, dict[int, Look]] = {}
    for place, number in number_looks(passage).items():
        look = passage.tokens[place].look
        if look is not None and look.neighbor == which:
            looked_at.setdefault(look.token, {})[number] = look
    cuts = {0, neighbor.first, neighbor.stop, neighbor.continuation_at, len(neighbor.tokens)}
    cuts |= {cut for token in looked_at for cut in (token, token + 1)}
    for start, stop in pairwise(sorted(cuts)):
        yield Piece(
            text="".join(neighbor.tokens[start:stop]),
            shared=neighbor.first <= start < neighbor.stop,
            begins_continuation=start == neighbor.continuation_at,
            looks=looked_at.get(start, {}),
        )


def looks_title(looks: Mapping[int, Look]) -> str:
    """Which tokens looked at a neighbor token, by their numbers, and with how much of their attention."""
    return "; ".join(
        f"token {number} looked here: {look.share:.0%} of its attention{' (copied)' if look.copied else ''}"
        for number, look in looks.items()
    )
