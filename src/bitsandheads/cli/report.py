"""bitsandheads report."""

from pathlib import Path
from typing import Annotated

import typer

from .base import app, console


@app.command()
def report(
    sources: Annotated[list[Path], typer.Argument(help="Run folders, files of results (.json), head scores (.tsv).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="Also write every figure as PNG and SVG into this folder (needs matplotlib).")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "bitsandheads report",
) -> None:
    """One self-contained page from any number of runs: accuracy against bytes, output lengths, needles, memory, head maps, speed."""
    from ..eval.report import content, page
    from ..eval.report.sources import read

    sections = content.sections(read(sources))
    page.write(output, title, sections)
    console.print(f"{output}: {', '.join(s.title for s in sections)}", highlight=False, soft_wrap=True)
    if plots is not None:
        from ..eval.report.plots import write

        for path in write(plots, sections):
            console.print(str(path), highlight=False, soft_wrap=True)
