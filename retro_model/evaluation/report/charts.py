"""The report's charts as PNG files, for slides and for MLflow. Equal charts give equal bytes with one matplotlib."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from retro_model.evaluation.report.html import Chart

# The report's colors on light paper, by the number that a series has.
COLORS = ("#2166c2", "#c8791b", "#6c757f", "#93459b", "#1b8a78", "#c23b4e")
INCHES, DOTS_PER_INCH = (6.4, 4.0), 150


def draw_charts(charts: Sequence[Chart], folder: Path) -> None:
    """Writes evaluate_<name>.png for each chart."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        partial = folder / f"evaluate_{chart.name}.png.partial"
        try:
            partial.write_bytes(chart_png(chart))
            os.replace(partial, partial.with_suffix(""))
        finally:
            partial.unlink(missing_ok=True)


def chart_png(chart: Chart) -> bytes:
    """The chart as a PNG image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(chart.places))
    for line in chart.series:
        color = COLORS[line.color]
        style = "-" if chart.joined else "none"
        axes.plot(places, line.values, marker="o", markersize=4.5, linestyle=style, color=color, label=line.name)
        for place, (low, high) in zip(places, line.intervals, strict=False):
            axes.plot([place, place], [low, high], color=color, linewidth=1.5)
    counts = chart.counts or [""] * len(chart.places)
    axes.set_xticks(places, [f"{label}\n{count}".strip() for label, count in zip(chart.places, counts, strict=True)])
    axes.set_xlim(-0.5, len(chart.places) - 0.5)
    axes.set_title(chart.title, loc="left", fontsize=12)
    axes.set_xlabel(chart.x_label + (f"\n({chart.count_label})" if chart.counts else ""))
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", color="#dcdfe3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    canvas.print_png(stream, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return stream.getvalue()
