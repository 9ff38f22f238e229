"""Draw figures as SVG that takes its colours from the page's style sheet (see page.css). Hover texts stand in `data-tip`."""

import html
import math
from collections.abc import Callable, Sequence

from .figures import Axis, Bars, Chart, Figure, Grid, Point, bounds, ticks

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
COLORS = 8  # of the palette in page.css
LETTER = 6.8  # room for a letter of a label, also in the larger type of narrow screens
Scale = Callable[[float], float]


def _element(name: str, text: str | None = None, /, **attributes: object) -> str:
    inner = " ".join(f'{k.rstrip("_").replace("_", "-")}="{html.escape(_short(v), quote=True)}"' for k, v in attributes.items())
    return f"<{name} {inner}/>" if text is None else f"<{name} {inner}>{text}</{name}>"


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(x: float, y: float, text: str, anchor: str = "middle", **more: object) -> str:
    return _element("text", html.escape(text), x=x, y=y, text_anchor=anchor, **more)


def _scale(axis: Axis, low: float, high: float, start: float, end: float) -> Scale:
    def place(value: float) -> float:
        shown = axis.shown(value)
        share = math.log(shown / low) / math.log(high / low) if axis.log else (shown - low) / (high - low)
        return start + share * (end - start)

    return place


def _paint(kind: str, color: int) -> str:
    return f"{kind} c{color % COLORS}"


def _marker(x: float, y: float, color: int, tip: str = "") -> str:
    """A mark whose form, too, tells the series."""
    more: dict[str, object] = {"class_": _paint("mark", color)} | ({"data_tip": tip, "tabindex": 0} if tip else {})
    r, form = 4.5, (color + color // COLORS) % 4
    if form == 0:
        return _element("circle", cx=x, cy=y, r=r, **more)
    if form == 1:
        return _element("rect", x=x - r + 0.5, y=y - r + 0.5, width=2 * r - 1, height=2 * r - 1, **more)
    corners = {2: [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)], 3: [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)]}[form]
    return _element("polygon", points=" ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners), **more)


def _axes(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> tuple[list[str], Scale, Scale]:
    (x0, x1), (y0, y1) = bounds(x, xs), bounds(y, ys)
    to_x, to_y = _scale(x, x0, x1, LEFT, WIDTH - RIGHT), _scale(y, y0, y1, HEIGHT - BOTTOM, TOP)
    unit = {a: 100 if a.percent else 1 for a in (x, y)}
    out = []
    for t in ticks(y0, y1, y.log):
        at = to_y(t / unit[y])
        out += [
            _element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="rule"),
            _text(LEFT - 6, at + 4, y.text(t), "end", class_="tick"),
        ]
    for t in ticks(x0, x1, x.log):
        at = to_x(t / unit[x])
        out += [
            _element("line", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"),
            _text(at, HEIGHT - BOTTOM + 16, x.text(t), class_="tick"),
        ]
    out.append(_element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.name, class_="name"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(_text(12, middle, y.name, class_="name", transform=f"rotate(-90 12 {middle})"))
    return out, to_x, to_y


def _labels(points: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]]) -> list[str]:
    """Labels beside their points, each in the first place where it covers no other label and the fewest marks."""
    taken: list[tuple[float, float, float, float]] = []
    out = []
    for x, y, label in points:
        wide = LETTER * len(label)
        best = None
        for dx, dy, anchor in ((8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 17, "middle"), (8, -8, "start"), (-8, 15, "end")):
            left = x + dx - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
            box = (left, y + dy - 9, left + wide, y + dy + 3)
            covers = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            outside = box[0] < LEFT or box[2] > WIDTH or box[1] < 0
            hidden = sum(box[0] - 4 < a < box[2] + 4 and box[1] - 4 < b < box[3] + 4 for a, b in marks)
            found = (10 * covers + 10 * outside + hidden, box, dx, dy, anchor)
            if best is None or found[0] < best[0]:
                best = found
        assert best is not None
        taken.append(best[1])
        out.append(_text(x + best[2], y + best[3], label, best[4], class_="label"))
    return out


def _error_bar(p: Point, x: float, to_y: Scale, color: int) -> str:
    if p.low is None or p.high is None:
        return ""
    return _element("line", x1=x, x2=x, y1=to_y(p.low), y2=to_y(p.high), class_=_paint("span", color))


def chart(c: Chart) -> str:
    """Points, lines, intervals and the front."""
    every = [p for s in c.series for p in s.points]
    ends = [v for p in every for v in (p.y, p.low, p.high) if v is not None and (v > 0 or not c.y.log)]
    out, to_x, to_y = _axes(c.x, c.y, [p.x for p in every], ends)
    if c.front:
        steps = [(to_x(c.front[0][0]), to_y(c.front[0][1]))]
        for x, y in c.front[1:]:
            steps += [(to_x(x), steps[-1][1]), (to_x(x), to_y(y))]
        steps.append((float(WIDTH - RIGHT), steps[-1][1]))
        out.append(_element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in steps), class_="front"))
    for s in c.series:
        if s.line:
            out.append(
                _element("polyline", points=" ".join(f"{to_x(p.x):.1f},{to_y(p.y):.1f}" for p in s.points), class_=_paint("line", s.color))
            )
        out += [_error_bar(p, to_x(p.x), to_y, s.color) for p in s.points]
    for s in c.series:
        out += [_marker(to_x(p.x), to_y(p.y), s.color, p.tip) for p in s.points]
    marks = [(to_x(p.x), to_y(p.y)) for p in every]
    out += _labels([(to_x(p.x), to_y(p.y), p.label) for p in every if p.label], marks)
    return _picture(WIDTH, HEIGHT, out, c.title)


def bars(b: Bars) -> str:
    """Horizontal bars with intervals; the value stands at the end."""
    left, row = 12 + LETTER * max(len(x.name) for x in b.bars), 20
    height = TOP + row * len(b.bars) + BOTTOM
    ends = [0.0, *(v for x in b.bars for v in (x.value, x.high) if v is not None)]
    low, high = bounds(b.axis, ends)
    low = 0.0 if min(ends) >= 0 else low
    to_x = _scale(b.axis, low, high, left, WIDTH - 46)
    out = []
    for t in ticks(low, high, False, 4):
        at = to_x(t / (100 if b.axis.percent else 1))
        out += [
            _element("line", x1=at, x2=at, y1=TOP, y2=height - BOTTOM, class_="rule"),
            _text(at, height - BOTTOM + 14, b.axis.text(t), class_="tick"),
        ]
    for i, x in enumerate(b.bars):
        y = TOP + row * i
        start, end = sorted((to_x(0), to_x(x.value)))
        out.append(_text(left - 6, y + 13, x.name, "end", class_="label"))
        out.append(
            _element(
                "rect",
                x=start,
                y=y + 3,
                width=max(end - start, 1),
                height=row - 6,
                class_=_paint("bar", x.color),
                data_tip=x.tip,
                tabindex=0,
            )
        )
        if x.low is not None and x.high is not None:
            out.append(_element("line", x1=to_x(x.low), x2=to_x(x.high), y1=y + row / 2, y2=y + row / 2, class_="span ink"))
        at = max(end, to_x(x.high) if x.high is not None else end)
        out.append(_text(at + 5, y + 13, b.axis.text(b.axis.shown(x.value)), "start", class_="tick"))
    out.append(_text((left + WIDTH - 46) / 2, height - 8, b.axis.name, class_="name"))
    return _picture(WIDTH, height, out, b.title)


def grid(g: Grid) -> str:
    """Cells whose colour runs from --low to --high; the number stands within where there is room. Long names of columns break at "+" and spaces."""
    left = (32 if g.row_name else 14) + LETTER * max(len(r) for r in g.rows)
    wide = (WIDTH - left - RIGHT) / len(g.columns)
    tall = min(24.0, max(wide, 14.0))
    height = TOP + tall * len(g.rows) + BOTTOM
    out = []
    for i, row in enumerate(g.values):
        y = TOP + tall * i
        out.append(_text(left - 6, y + tall / 2 + 4, g.rows[i], "end", class_="tick"))
        for j, value in enumerate(row):
            if value is None:
                continue
            share = min(max((value - g.low) / (g.high - g.low), 0), 1)
            tip = " ".join(f"{g.row_name} {g.rows[i]}, {g.column_name} {g.columns[j]}: {g.text(value)}".split())
            marked = bool(g.marked) and g.marked[i][j]
            out.append(
                _element(
                    "rect",
                    x=left + wide * j + 1,
                    y=y + 1,
                    width=wide - 2,
                    height=tall - 2,
                    rx=2,
                    tabindex=0,
                    class_="cell marked" if marked else "cell",
                    style=f"--share:{share:.3f}",
                    data_tip=tip + (", kept" if marked else ""),
                )
            )
            if wide >= 34 and LETTER * len(g.text(value)) < wide - 2:
                ink = "deep" if share > 0.55 else "pale"
                out.append(_text(left + wide * (j + 0.5), y + tall / 2 + 4, g.text(value), class_=f"value {ink}"))
    every = -(-len(g.columns) // max(1, int((WIDTH - left) / 34)))
    for j in range(0, len(g.columns), every):
        fits = g.column_name or LETTER * len(g.columns[j]) < wide
        for n, part in enumerate([g.columns[j]] if fits else g.columns[j].replace("+", "+ ").split()):
            out.append(_text(left + wide * (j + 0.5), height - BOTTOM + 14 + 12 * n, part, class_="tick"))
    out.append(_text((left + WIDTH) / 2, height - 8, g.column_name, class_="name"))
    out.append(_text(12, (TOP + height - BOTTOM) / 2, g.row_name, class_="name", transform=f"rotate(-90 12 {(TOP + height - BOTTOM) / 2})"))
    return _picture(WIDTH, height, out, g.title)


def _picture(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return _element("svg", "".join(parts), viewBox=f"0 0 {width} {height:.0f}", role="img", aria_label=title)


def draw(figure: Figure) -> str:
    """Any figure."""
    return chart(figure) if isinstance(figure, Chart) else bars(figure) if isinstance(figure, Bars) else grid(figure)


def legend_mark(color: int) -> str:
    """The mark of a series, for a legend."""
    return _element("svg", _marker(7, 7, color), viewBox="0 0 14 14", class_="key", aria_hidden="true")
