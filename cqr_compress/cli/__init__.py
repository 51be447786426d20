"""The command line: parse, call one library function, render.

Nothing heavier than typer is imported before a command runs, so that --help answers at once.
"""

from cqr_compress.cli.app import main

__all__ = ["main"]
