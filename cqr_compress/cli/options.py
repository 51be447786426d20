"""Shared parts of the commands: options from dataclasses, common options, and the handling of errors."""

from __future__ import annotations

import inspect
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from cqr_compress.checkpoint import output_files
from cqr_compress.cli.printable import printable
from cqr_compress.errors import CqrCompressError, CqrCompressWarning, SpecError, UserCodeError
from cqr_compress.option_fields import OptionInfo, option_infos
from cqr_compress.quantize.options import size_in_bytes

SELECTION, OUTPUT, DATA, ORIGINAL = "Selection", "Output", "Data", "Original"


def given(
    *flags: str, help: str, panel: str | None = None, metavar: str | None = None, default: str | None = None
) -> Any:
    """An option whose default is None or False; `default` describes what that stands for."""
    return typer.Option(
        *flags, help=help, rich_help_panel=panel, metavar=metavar, show_default=default if default else False
    )


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="Torch or safetensors file, index of shards, or folder with one of these.",
    ),
]
CompressedArgument = Annotated[
    Path, typer.Argument(metavar="COMPRESSED", show_default=False, help="Compressed file.")
]
Patterns = list[str] | None
TablesOption = Annotated[
    Patterns,
    given(
        "--tables", metavar="PATTERN", panel=SELECTION,
        help="Select these tables instead: a glob, or re: and a regular expression. Repeatable.",
    ),
]  # fmt: skip
ExcludeOption = Annotated[
    Patterns, given("--exclude", metavar="PATTERN", panel=SELECTION, help="Leave these tables dense. Repeatable.")
]
RulesOption = Annotated[
    list[str] | None,
    given(
        "--rule", metavar="PATTERN=ACTION", panel=SELECTION,
        help="Options of the tables that a pattern matches: keep (dense), a method, or settings such as "
        "pq,ratio=8; or a TOML file with such lines in a table \\[rules]. The first match holds. Repeatable.",
    ),
]  # fmt: skip
OffsetsOption = Annotated[
    list[str] | None,
    given(
        "--offsets", metavar="ROWS", panel=SELECTION, default="an integer buffer named offsets near the table",
        help="First rows of the fields of a fused table, such as 0,943,2625, or a .npy file; TABLE=ROWS for one "
        "of several tables. Repeatable.",
    ),
]  # fmt: skip
PlanOption = Annotated[
    Path | None,
    given(
        "--plan", metavar="FILE", panel=OUTPUT,
        help="JSON file of all tables' layouts: followed without trials if it exists, else written.",
    ),
]  # fmt: skip
FrequenciesOption = Annotated[
    list[str] | None,
    given(
        "--frequencies", metavar="FILE", panel=SELECTION,
        help="Counts of the ids: .npy, .csv (id,count or table,id,count) or .safetensors by table; TABLE=FILE for "
        "a single table. The rows' squared errors are weighted by them. Repeatable.",
    ),
]  # fmt: skip
_ORIGINAL = given("--original", panel=ORIGINAL, help="The dense checkpoint that was converted.")
OriginalOption = Annotated[Path | None, _ORIGINAL]
RequiredOriginalOption = Annotated[Path, _ORIGINAL]
DeviceOption = Annotated[
    str | None, given("--device", help="Device, such as cpu or cuda:1.", default="CUDA if available")
]
JsonOption = Annotated[bool, given("--json", panel=OUTPUT, help="Print the report as JSON.")]
ForceOption = Annotated[bool, given("--force", panel=OUTPUT, help="Replace existing output.")]
DebugOption = Annotated[bool, given("--debug", help="Show the traceback of an error.")]
ShardOption = Annotated[
    str | None,
    given(
        "--shard-size", metavar="SIZE", panel=OUTPUT,
        help="Split a safetensors output into files of about this size, such as 5GB or 500MB.",
    ),
]  # fmt: skip


def output_option(default: str | None = None, help: str = "File to write.") -> Any:
    """The option `-o`, with a description of its default."""
    return given("-o", "--output", metavar="FILE", panel=OUTPUT, help=help, default=default)


def options_of(
    cls: type, names: Sequence[str] = (), after: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with the options of an option dataclass, passed to it as keyword arguments.

    Args:
        cls: the dataclass; its fields determine types, defaults, choices, help and panels.
        names: fields to use as options, in this order; all if empty.
        after: parameter of the command after which they are listed; after its first parameter if None.

    Returns:
        The decorator.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        infos, types = option_infos(cls), {f.name: (str(f.type), f.default) for f in fields(cls)}
        made = [_parameter(name, *types[name], infos[name]) for name in names or infos]
        own = [
            p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        at = 1 + next(i for i, p in enumerate(own) if after is None or p.name == after)

        def wrapper(**values: Any) -> None:
            command(**{name: _plain(value, types.get(name, ("", None))[0]) for name, value in values.items()})

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own[:at], *made, *own[at:])]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _parameter(name: str, kind: str, default: Any, info: OptionInfo) -> inspect.Parameter:
    """Create the parameter from which typer derives an option."""
    assert default is not MISSING
    annotation: Any = {"int": int, "float": float, "bool": bool}.get(kind.removesuffix(" | None"), str)
    if info.choices:
        annotation = _choices(name, info.choices)
        default = None if default is None else annotation(default)
    text = info.help
    if info.choices:
        text += f" One of {', '.join(info.choices)}."
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if annotation is bool else flag,
        help=text,
        metavar=info.metavar or ("NAME" if info.choices else None),
        rich_help_panel=info.panel or None,
        show_default=info.shown_default or default not in (None, ()),
    )
    if default in (None, ()):
        annotation, default = annotation | None, None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _choices(name: str, choices: Sequence[str]) -> Any:
    """Create the Enum from which typer derives choices."""
    make: Any = Enum
    return make(name, {choice: choice for choice in choices}, type=str)


def _plain(value: Any, kind: str) -> Any:
    """Convert the value that typer parsed to the value of a field."""
    if isinstance(value, Enum):
        return value.value
    if kind == "tuple[int, ...]":
        return _parse_ids(value)
    if kind == "int | str | None" and value is not None and value.isdecimal():
        return int(value)
    return value


TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM."""


def run(work: Callable[[], None], debug: bool) -> None:
    """Run a command; an error of this package prints one message, without traceback, and exits with code 1."""
    try:
        with _messages():
            work()
    except UserCodeError as e:
        if debug:
            raise
        typer.echo(str(e), err=True)  # only the traceback of the user's code
        raise SystemExit(1) from None
    except CqrCompressError as e:
        if debug:
            raise
        _fail(str(e))
    except KeyboardInterrupt:
        _fail(f"interrupted; {_completed()}", code=130)
    except SystemExit as e:
        if e.code != TERMINATED:
            raise
        _fail(f"terminated; {_completed()}", code=TERMINATED)
    except BrokenPipeError:
        raise SystemExit(1) from None


def _completed() -> str:
    """Say which files an interrupted command has written."""
    files = [str(path) for path in dict.fromkeys(output_files.completed) if path.exists()]
    return f"written and complete: {', '.join(files)}" if files else "nothing was written"


@contextmanager
def _messages() -> Iterator[None]:
    """Print log records and warnings of this package on stderr, a line each."""
    logger, handler = logging.getLogger("cqr_compress"), _StderrHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", CqrCompressWarning)
            shown_before = warnings.showwarning

            def show(message: Any, category: type[Warning], filename: str, lineno: int,
                     file: TextIO | None = None, line: str | None = None) -> None:  # fmt: skip
                if issubclass(category, CqrCompressWarning):
                    typer.echo(printable(f"note: {message}"), err=True)
                else:
                    shown_before(message, category, filename, lineno, file, line)

            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, which is above the bars while bars are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(printable(f"error: {message}"), err=True)
    raise SystemExit(code)


def print_json(values: dict[str, Any]) -> None:
    """Print a report's JSON on stdout."""
    json.dump(values, sys.stdout, indent=2)
    sys.stdout.write("\n")


def split_setting(text: str, flag: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{flag} is {text!r}: give NAME=VALUE")
    return name, value


def _parse_ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise typer.BadParameter(f"--exact-rows is {text!r}: give ids such as 0,1") from e


def parse_size(text: str | None) -> int | None:
    """Parse the value of --shard-size to bytes."""
    try:
        return None if text is None else size_in_bytes("--shard-size", text)
    except SpecError as e:
        raise typer.BadParameter(str(e)) from e
