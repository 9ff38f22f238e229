"""The figures of a page as PNG and SVG files, drawn with matplotlib."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import Axis, Bars, Chart, Figure, Grid, Section
from .sources import ReportError

COLORS = ("#3b4350", "#c4620a", "#0e8a5f", "#0b6bc2", "#b03a8c", "#7a4fd0", "#8a7a00", "#c22f2f")  # page.css has the same
MARKS = "osD^"


def _axis(axes: Any, which: str, axis: Axis) -> None:
    getattr(axes, f"set_{which}label")(axis.name + (", %" if axis.percent else ""))
    if axis.log:
        getattr(axes, f"set_{which}scale")("log")
    if axis.low is not None:
        getattr(axes, f"set_{which}lim")(**{"left" if which == "x" else "bottom": axis.shown(axis.low)})


def _chart(axes: Any, c: Chart) -> None:
    for s in c.series:
        color = COLORS[s.color % len(COLORS)]
        xs, ys = [c.x.shown(p.x) for p in s.points], [c.y.shown(p.y) for p in s.points]
        mark = MARKS[(s.color + s.color // len(COLORS)) % len(MARKS)]
        axes.plot(xs, ys, marker=mark, linestyle="-" if s.line else "", color=color, label=s.name, markersize=5)
        spans = [(c.x.shown(p.x), c.y.shown(p.low), c.y.shown(p.high)) for p in s.points if p.low is not None and p.high is not None]
        if spans:
            axes.vlines(*zip(*spans, strict=True), color=color, alpha=0.5, linewidth=1)
        for p in s.points:
            if p.label:
                axes.annotate(p.label, (c.x.shown(p.x), c.y.shown(p.y)), xytext=(5, 4), textcoords="offset points", fontsize=7)
    if c.front:
        axes.step(
            [c.x.shown(x) for x, _ in c.front], [c.y.shown(y) for _, y in c.front], where="post", color="gray", linestyle="--", linewidth=1
        )
    _axis(axes, "x", c.x)
    _axis(axes, "y", c.y)
    if len(c.series) > 6:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(c.series) > 1:
        axes.legend(fontsize=7)


def _bars(axes: Any, b: Bars) -> None:
    at = range(len(b.bars))
    axes.barh(at, [b.axis.shown(x.value) for x in b.bars], color=[COLORS[x.color % len(COLORS)] for x in b.bars])
    axes.set_yticks(at, [x.name for x in b.bars])
    axes.invert_yaxis()
    _axis(axes, "x", b.axis)


def _grid(axes: Any, g: Grid) -> None:
    values = [[float("nan") if v is None else v for v in row] for row in g.values]
    image = axes.imshow(values, vmin=g.low, vmax=g.high, cmap="Blues", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    axes.set_xticks(range(len(g.columns)), g.columns, rotation=45 if max(map(len, g.columns)) > 4 else 0)
    axes.set_yticks(range(len(g.rows)), g.rows)
    axes.set_xlabel(g.column_name)
    axes.set_ylabel(g.row_name)
    middle = (g.low + g.high) / 2
    for i, row in enumerate(g.values if g.percent else ()):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(j, i, g.text(value), ha="center", va="center", fontsize=7, color="white" if value > middle else "black")
    for i, row in enumerate(g.marked):
        for j, marked in enumerate(row):
            if marked:
                axes.add_patch(_frame(j, i))


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor=COLORS[1], linewidth=1.5)


def _draw(figure: Figure) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6, 4 if not isinstance(figure, Bars) else 1.2 + 0.28 * len(figure.bars)), layout="constrained")
    axes = canvas.subplots()
    axes.set_title(figure.title, fontsize=10)
    if isinstance(figure, Chart):
        _chart(axes, figure)
    elif isinstance(figure, Bars):
        _bars(axes, figure)
    else:
        _grid(axes, figure)
    return canvas


def write(folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Every figure as SECTION-NUMBER-TITLE.png and .svg; returns the paths.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError('Plots need matplotlib: pip install "bitsandheads[plots]".') from error
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    with matplotlib.rc_context({"svg.hashsalt": "bitsandheads"}):
        for section in sections:
            for number, figure in enumerate(section.figures):
                stem = re.sub(r"[^a-z0-9]+", "-", f"{section.name}-{number}-{figure.title}".lower()).strip("-")[:80]
                canvas = _draw(figure)
                for suffix, more in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
                    out.append(folder / (stem + suffix))
                    canvas.savefig(out[-1], **more)
    return out
