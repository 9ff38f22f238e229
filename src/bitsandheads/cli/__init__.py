"""The command line. Each module of this package registers its commands at `app` when it is imported here."""

from rich.console import Console
from rich.text import Text

from ..errors import BitsAndHeadsError
from . import basics, evaluate, gates, generate, heads, report  # noqa: F401
from .base import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: errors of the user, and files that cannot be written or read, end in one line and exit code 2."""
    try:
        app()
    except (BitsAndHeadsError, OSError) as error:
        Console(stderr=True).print(Text.assemble((type(error).__name__, "red"), f": {error}"), soft_wrap=True)
        raise SystemExit(2) from error
