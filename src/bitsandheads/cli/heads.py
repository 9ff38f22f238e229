"""bitsandheads heads: find, look at and compare head scores."""

import typer

from .base import app

heads_app = typer.Typer(help="Fewer heads: find, look at and compare head scores.", no_args_is_help=True)
app.add_typer(heads_app, name="heads")
