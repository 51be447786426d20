"""The command line program, with each command in a separate module.

Nothing heavier than typer is imported before a command runs, so that --help is fast.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from cqr_compress._version import __version__
from cqr_compress.cli.convert import convert
from cqr_compress.cli.evaluate import evaluate
from cqr_compress.cli.export import export
from cqr_compress.cli.finetune import finetune
from cqr_compress.cli.inspect import inspect
from cqr_compress.cli.options import TERMINATED
from cqr_compress.cli.refit import refit
from cqr_compress.cli.sweep import sweep
from cqr_compress.quantize.registry import METHODS

app = typer.Typer(
    name="cqr-compress",
    help="Compress the embedding tables of trained models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, help="Print the version.", callback=lambda on: _version(on)),
    ] = False,
) -> None:
    pass


_METHODS = "\n\n".join(["Methods:", *(f"{entry.name}: {entry.summary}." for entry in METHODS.values())])

app.command()(inspect)
app.command(epilog=_METHODS)(convert)
app.command()(sweep)
app.command()(finetune)
app.command()(evaluate)
app.command()(refit)
app.command()(export)


def main() -> None:
    """Run the command line; SIGTERM raises SystemExit, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    app()


def _version(on: bool) -> None:
    if on:
        typer.echo(f"cqr-compress {__version__}")
        raise typer.Exit
