"""What every command of the command line shares: the application and the console."""

import typer
from rich.console import Console

app = typer.Typer(
    help="KV-cache compression for video and reasoning language models.", no_args_is_help=True, pretty_exceptions_enable=False
)
console = Console(markup=False, emoji=False)  # answers, paths and names are printed as they are
if not console.is_terminal:
    console = Console(markup=False, emoji=False, width=120)
