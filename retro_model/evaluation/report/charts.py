"""Charts, drawn with matplotlib. One drawing is saved as a PNG file and as the SVG in the page.

Equal charts give equal bytes with one version of matplotlib. A drawing uses neither pyplot nor a display, and
ignores the user's matplotlib settings.
"""

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from retro_model.core.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The light colors of style.css, by the names of its variables: text and lines, then series 0 to 5.
PALETTE = {"ink": "#1d2126", "soft": "#5d6670", "rule": "#dcdfe3"}
PALETTE |= {"s0": "#2166c2", "s1": "#c8791b", "s2": "#6c757f", "s3": "#93459b", "s4": "#1b8a78", "s5": "#c23b4e"}
INCHES, DOTS_PER_INCH = (5.4, 3.6), 180
POINTS_PER_INCH = 72  # SVG coordinates are points
COUNT_SIZE, COUNT_OFFSET = 8, 17  # points
MOST_STEPS = 6  # between the numbers of the vertical axis
SETTINGS: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["soft"],
    "axes.edgecolor": PALETTE["soft"],
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "grid.color": PALETTE["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "xtick.minor.pad": COUNT_OFFSET,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Series:
    """A line of a chart: a value at each of the chart's places, its interval there, and which of six colors."""

    name: str
    values: tuple[float, ...]
    color: int = 0
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """At least one line over at least one place; places are evenly spaced, whatever their labels.

    `name` becomes part of the file name. `counts` are printed small below the places and say how much data each one
    has; `count_label` says what is counted. Points are not `joined` where the places have no order.
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
class Drawing:
    """A drawn chart: the bytes of a PNG image with the title, and an SVG element without it for the page."""

    png: bytes
    svg: Markup


def draw(chart: Chart) -> Drawing:
    """Plot the chart once and save it in both formats."""
    from matplotlib import style

    png, svg = io.BytesIO(), io.StringIO()
    # A few settings exist as rcParams only; the context restores them. The salt keeps ids of two charts apart.
    with style.context(["default", SETTINGS | {"svg.hashsalt": chart.name}]):
        figure = plot(chart)
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
        figure.axes[0].set_title(printable(chart.title), loc="left")  # in the page it is a heading
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return Drawing(png.getvalue(), _svg_element(svg.getvalue(), chart))


def plot(chart: Chart) -> "Figure":
    """The figure of a chart, without its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    places, lines = range(len(chart.places)), []
    for series in chart.series:  # unclipped: in HTML a clip path would need a url()
        look: dict[str, Any] = {"color": PALETTE[f"s{series.color}"], "clip_on": False}
        style = "o-" if chart.joined else "o"
        lines += axes.plot(places, series.values, style, label=printable(series.name), **look)
        if series.intervals:
            axes.vlines(places, *zip(*series.intervals, strict=True), **look)
    bottom, top = axes.get_ylim()
    if bottom <= 0 <= top:
        axes.axhline(0, color=PALETTE["soft"], linewidth=0.8, zorder=0.9, clip_on=False)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xticks(places, [printable(label) for label in chart.places])
    if chart.counts:  # as minor ticks at the same places
        axes.xaxis.remove_overlapping_locs = False
        axes.set_xticks(places, [printable(count) for count in chart.counts], minor=True, fontsize=COUNT_SIZE)
    axes.set_xlabel(printable(chart.x_label + (f" ({chart.count_label})" if chart.counts else "")))
    axes.set_ylabel(printable(chart.y_label))
    axes.grid(axis="y", clip_on=False)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.locator_params(axis="y", nbins=MOST_STEPS)  # by itself the number depends on the room that a title leaves
    if len(lines) > 1:
        figure.legend(handles=lines, loc="outside lower left", ncols=len(lines))
    return figure


def _svg_element(file: str, chart: Chart) -> Markup:
    """The drawing in matplotlib's SVG file as an element for HTML, in the colors of the page's style."""
    drawing = file[file.index("<g ") : file.rindex("</svg>")]  # without the XML head and matplotlib's style sheet
    drawing = re.sub(r"<[^>]*>", _adapt_tag, drawing)  # text has no < or >, so only tags change
    label = ", ".join([chart.title, *(series.name for series in chart.series if len(chart.series) > 1)])
    width, height = (f"{inches * POINTS_PER_INCH:g}" for inches in INCHES)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, printable(label))
    return head + Markup(drawing + "</svg>")  # noqa: S704 (matplotlib has escaped the texts)


def _adapt_tag(tag: re.Match[str]) -> str:
    """A tag of the drawing without fonts and without group ids, which repeat in each chart; colors as CSS variables."""
    adapted = re.sub(r'^<g id="[^"]*"', "<g", tag[0])
    adapted = re.sub(r" font-family: [^;\"]*;?", "", adapted)
    for name, color in PALETTE.items():
        adapted = adapted.replace(color, f"var(--{name})")
    return adapted
