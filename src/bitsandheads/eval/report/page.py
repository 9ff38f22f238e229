"""Write sections as one HTML page that needs nothing else: styles, scripts and figures stand within it."""

import html
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from . import svg
from .figures import Chart, Figure, Section, Table


def _figure(figure: Figure) -> Iterator[str]:
    yield f"<figure><h3>{html.escape(figure.title)}</h3>"
    yield f'<div class="drawing">{svg.draw(figure)}</div>'
    if isinstance(figure, Chart) and (len(figure.series) > 1 or figure.series[0].line):
        keys = (f"<li>{svg.legend_mark(s.color)}{html.escape(s.name)}</li>" for s in figure.series)
        yield f'<ul class="legend">{"".join(keys)}</ul>'
    if figure.note:
        yield f"<figcaption>{html.escape(figure.note)}</figcaption>"
    yield "</figure>"


def _table(table: Table) -> Iterator[str]:
    """A table whose columns sort on a click. A long one can be searched."""
    yield f'<div class="table"><h3>{html.escape(table.title)}</h3>'
    if len(table.rows) > 12:
        yield f'<input type="search" placeholder="Filter {len(table.rows)} rows" aria-label="Filter the table {html.escape(table.title)}">'
    heads = "".join(f'<th scope="col"><button type="button">{html.escape(c)}</button></th>' for c in table.columns)
    yield f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>'
    for row in table.rows:
        yield "<tr>"
        for column, value in zip(table.columns, row, strict=True):
            sort = "" if isinstance(value, str) or value is None else f' class="number" data-sort="{value!r}"'
            yield f"<td{sort}>{html.escape(table.text(column, value))}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f"<p>{html.escape(table.note)}</p>"
    yield "</div>"


def _section(section: Section) -> Iterator[str]:
    yield f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>'
    if section.note:
        yield f"<p>{html.escape(section.note)}</p>"
    if section.figures:
        yield '<div class="figures">'
        for figure in section.figures:
            yield from _figure(figure)
        yield "</div>"
    for table in section.tables:
        yield from _table(table)
    yield "</section>"


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in sections)
    body = "\n".join(line for s in sections for line in _section(s))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1><nav>{links}</nav><button type="button" id="theme">Light or dark</button></header>
<main>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(page(title, sections), "utf-8")
    os.replace(part, path)
