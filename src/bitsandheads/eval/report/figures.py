"""Figures and tables as data, without a medium: `svg` draws them for the page, `plots` with matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Axis:
    """An axis. percent: values from 0 to 1 are shown as percent. low, high: at least this range is shown."""

    name: str
    log: bool = False
    percent: bool = False
    low: float | None = None
    high: float | None = None

    def text(self, value: float) -> str:
        """A value as a reader wants it."""
        return f"{value:.4g}%" if self.percent else number(value)

    def shown(self, value: float) -> float:
        """The value in the axis's own unit."""
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Point:
    """A value with its interval. tip: shown on hover; label: written beside the point."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour. color: index of the palette. line: joined in the order given."""

    name: str
    points: tuple[Point, ...]
    color: int
    line: bool = False


@dataclass(frozen=True)
class Chart:
    """Points and lines over two axes. front: corners of a staircase, best values by x (the Pareto front)."""

    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    front: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Bar:
    """A bar with its interval."""

    name: str
    value: float
    color: int
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero."""

    title: str
    note: str
    axis: Axis
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Grid:
    """A map of coloured cells. values [rows, columns], None: empty. marked: cells with a frame. low, high: ends of the colours."""

    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_name: str
    column_name: str
    values: tuple[tuple[float | None, ...], ...]
    low: float
    high: float
    percent: bool = False
    marked: tuple[tuple[bool, ...], ...] = ()

    def text(self, value: float) -> str:
        """A cell's value."""
        return f"{100 * value:.0f}%" if self.percent else f"{value:.3g}"


Figure = Chart | Bars | Grid


@dataclass(frozen=True)
class Table:
    """Cells are texts or numbers; numbers are sorted as such. formats: of numbers, by column."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    formats: dict[str, str] = field(default_factory=dict)

    def text(self, column: str, value: str | float | int | None) -> str:
        """A cell as text."""
        if value is None:
            return ""
        return value if isinstance(value, str) else format(value, self.formats[column]) if column in self.formats else number(value)


@dataclass(frozen=True)
class Section:
    """A part of the page. name: of files and anchors."""

    name: str
    title: str
    note: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


def number(value: float) -> str:
    """Three significant digits, large numbers with k, M or G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 1e4 and abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def bounds(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """What an axis shows of some values: a little more than their range, in the axis's own unit. ValueError: no finite value."""
    finite = [axis.shown(v) for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    if not finite:
        raise ValueError(f"No finite values for the axis {axis.name!r}.")
    low, high = (
        min(finite) if axis.low is None else min(axis.shown(axis.low), *finite),
        max(finite) if axis.high is None else max(axis.shown(axis.high), *finite),
    )
    if axis.log:
        wide = (high / low) ** 0.06 if high > low else 2
        return low / wide, high * wide
    room = 0.06 * (high - low) or 0.5
    return low if axis.low is not None and low == axis.shown(axis.low) else low - room, high + room


def ticks(low: float, high: float, log: bool, most: int = 6) -> list[float]:
    """Round numbers within low..high."""
    if log:
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
            found = [t for t in found if low <= t <= high]
            if 3 <= len(found) <= most:
                return found
        if len(found) > most:
            return found[:: -(-len(found) // most)]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def pareto(points: Sequence[tuple[float, float]], better: int = 1) -> tuple[tuple[float, float], ...]:
    """The points that no other one beats with as little or less x and a better y, by x. better: 1 higher, -1 lower."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -better * p[1])):
        if not front or better * y > better * front[-1][1]:
            front.append((x, y))
    return tuple(front)
