"""What all commands share: common options, and how an error ends a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cqr_compress.errors import CqrCompressError, UserCodeError

SELECTION, OUTPUT = "Selection", "Output"


CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", show_default=False)]


TablesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tables",
        help="Take these tables: a glob, or re: and a regular expression. Repeatable.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]


ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="Leave these tables dense, named in the same way. Repeatable.",
        rich_help_panel=SELECTION,
        show_default=False,
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)]


ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing output.", rich_help_panel=OUTPUT)]


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        rich_help_panel=OUTPUT,
        show_default=False,
        help="Split a safetensors output into files of about this size, such as 5GB or 500MB.",
    ),
]


def run(work: Callable[[], None], debug: bool) -> None:
    """Run a command: one message and exit code 1 for an error of this package, no traceback."""
    try:
        work()
    except UserCodeError as e:
        if debug:
            raise
        typer.echo(str(e), err=True)  # the user's own traceback, and nothing else
        raise SystemExit(1) from None
    except CqrCompressError as e:
        if debug:
            raise
        _fail(str(e))
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", code=130)
    except BrokenPipeError:
        raise SystemExit(1) from None


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)


def print_json(values: dict[str, Any]) -> None:
    json.dump(values, sys.stdout, indent=2)
    sys.stdout.write("\n")
