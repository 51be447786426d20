"""Commands and their options."""

from __future__ import annotations

import re
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cqr_compress._version import __version__
from cqr_compress.cli.finetune import evaluate, finetune
from cqr_compress.cli.options import (
    CheckpointArgument,
    DebugOption,
    ExcludeOption,
    ForceOption,
    JsonOption,
    ShardOption,
    TablesOption,
    print_json,
    run,
)

app = typer.Typer(
    name="cqr-compress",
    help="Make trained models small by compressing their embedding tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_SELECTION, _METHOD, _BUDGET, _OUTPUT = "Selection", "Method", "Budget", "Output"


class MethodName(str, Enum):
    """Choices of --method."""

    auto = "auto"
    pq = "pq"
    rq = "rq"
    prq = "prq"
    cqr = "cqr"
    int8 = "int8"
    int4 = "int4"
    hash = "hash"
    qr = "qr"


class RotationName(str, Enum):
    """Choices of --rotation."""

    opq = "opq"
    pca = "pca"


class DtypeName(str, Enum):
    """Choices of --codebook-dtype."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class HelperName(str, Enum):
    """The helper of `cqr`."""

    random = "random"
    fitted = "fitted"
    none = "none"


class NonfiniteName(str, Enum):
    """Choices of --nonfinite."""

    error = "error"
    keep = "keep"


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, help="Print the version.", callback=lambda on: _version(on)),
    ] = False,
) -> None:
    pass


@app.command(
    help="Show what is in a checkpoint, or the size report of a compressed one.\n\n"
    "CHECKPOINT is a dense checkpoint, a compressed one, or a saved report.\n\n"
    "Example:\n\n    cqr-compress inspect ckpt.pt"
)
def inspect(
    checkpoint: CheckpointArgument,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Names and shapes only; do not read the tables.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what is in a checkpoint."""

    def work() -> None:
        from cqr_compress.checkpoint.size_report import SizeReport
        from cqr_compress.cli.render import TerminalProgress, print_dense_report, print_size_report
        from cqr_compress.commands.inspect import inspect_file

        with TerminalProgress() as progress:
            report = inspect_file(
                checkpoint, tables=tables or (), exclude=exclude or (), quick=quick, progress=progress
            )
        if as_json:
            print_json(report.to_json())
        elif isinstance(report, SizeReport):
            print_size_report(report)
        else:
            print_dense_report(report)

    run(work, debug)


@app.command(
    help="Compress the embedding tables of a checkpoint and write safetensors.\n\n"
    "CHECKPOINT is a torch or safetensors file, an index of shards, or a folder with one of these.\n\n"
    "Example:\n\n    cqr-compress convert ckpt.pt -o small.safetensors --ratio 16 --dry-run"
)
def convert(
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write; by default CHECKPOINT with .cqr.safetensors.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    min_rows: Annotated[
        int | None,
        typer.Option(
            help="Leave tables with fewer rows dense. [default: 1024]",
            rich_help_panel=_SELECTION,
            show_default=False,
        ),
    ] = None,
    keep_rows: Annotated[
        str | None,
        typer.Option(
            metavar="IDS",
            help="Rows kept bit for bit in every table, such as 0,1 or -1; all-zero rows always are.",
            rich_help_panel=_SELECTION,
            show_default=False,
        ),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Keep a dense copy under the other names of a shared table.",
            rich_help_panel=_SELECTION,
        ),
    ] = False,
    method: Annotated[
        MethodName, typer.Option(help="How to compress; auto measures on a sample.", rich_help_panel=_METHOD)
    ] = MethodName.auto,
    num_columns: Annotated[
        int | None,
        typer.Option(help="Columns that rows are split into.", rich_help_panel=_METHOD, show_default=False),
    ] = None,
    num_levels: Annotated[
        int | None,
        typer.Option(help="Codewords summed in each column.", rich_help_panel=_METHOD, show_default=False),
    ] = None,
    n_bits: Annotated[
        int | None, typer.Option(help="Bits of a code, 1 to 16.", rich_help_panel=_METHOD, show_default=False)
    ] = None,
    rotation: Annotated[
        RotationName | None,
        typer.Option(help="Rotate rows before quantizing them.", rich_help_panel=_METHOD, show_default=False),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Dimensions that the rotation keeps; auto tries several, as does --method auto.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    helper: Annotated[
        HelperName | None,
        typer.Option(
            help="Second codebook of cqr: hashed (random), with stored codes (fitted), or none. "
            "[default: the one with the least error at equal bytes]",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    frequencies: Annotated[
        list[str] | None,
        typer.Option(
            "--frequencies",
            metavar="[TABLE=]FILE",
            help="How often each id is used, as .npy, .safetensors (by table) or .csv (id,count or "
            "table,id,count): errors at frequent ids cost more. Repeatable.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    codebook_dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of codebooks and row scales.", rich_help_panel=_METHOD)
    ] = DtypeName.float16,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Joint refinements of the codebooks; more is slower and closer. "
            "[default: 0 for pq, 4 to 12 otherwise]",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    sample_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows that codebooks are fitted on, at most. [default: 131072]",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    nonfinite: Annotated[
        NonfiniteName,
        typer.Option(help="Rows with NaN or infinity: stop, or keep them as they are.", rich_help_panel=_METHOD),
    ] = NonfiniteName.error,
    seed: Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=_METHOD)] = 0,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Bytes of each table before / after, codebooks included.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    bits_per_dim: Annotated[
        float | None,
        typer.Option(
            help="Bits stored for each value of a table. [default: 2, which is 16x of float32]",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan with predicted bytes; write nothing.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    shard_size: ShardOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compress the embedding tables of a checkpoint."""

    def work() -> None:
        from cqr_compress.cli.render import TerminalProgress, print_load_hint, print_size_report
        from cqr_compress.commands.convert import convert as convert_file
        from cqr_compress.quantize.options import Request

        given = {"min_rows": min_rows, "max_sample": sample_rows}
        request = Request(
            method=method.value,
            ratio=ratio,
            bits_per_dim=bits_per_dim,
            num_columns=num_columns,
            num_levels=num_levels,
            n_bits=n_bits,
            rotation=rotation.value if rotation else None,
            rank=int(rank) if rank is not None and rank.isdecimal() else rank,
            helper=helper.value if helper else None,
            codebook_dtype=codebook_dtype.value,
            keep_rows=_parse_ids(keep_rows),
            nonfinite=nonfinite.value,
            rounds=rounds,
            seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )
        with TerminalProgress() as progress:
            report = convert_file(
                checkpoint,
                output,
                request,
                tables=tables or (),
                exclude=exclude or (),
                frequencies=frequencies or (),
                untie=untie,
                shard_bytes=_parse_size(shard_size),
                force=force,
                dry_run=dry_run,
                progress=progress,
            )
        if as_json:
            print_json(report.to_json())
            return
        print_size_report(report)
        if report.measured:
            print_load_hint(report)

    run(work, debug)


@app.command(
    help="Write a compressed checkpoint back as a dense one, for code that knows nothing of compression.\n\n"
    "CHECKPOINT is what convert wrote. The output has the names, dtypes, shapes and nesting of the source.\n\n"
    "Example:\n\n    cqr-compress export small.safetensors -o dense.pt"
)
def export(
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="File to write: .pt .pth .ckpt .bin or .safetensors.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ],
    shard_size: ShardOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a compressed checkpoint back as a dense one."""

    def work() -> None:
        from cqr_compress.cli.render import TerminalProgress
        from cqr_compress.commands.export import export as export_file

        with TerminalProgress() as progress:
            size = export_file(
                checkpoint, output, shard_bytes=_parse_size(shard_size), force=force, progress=progress
            )
        typer.echo(f"wrote {output} ({size:,} bytes)")

    run(work, debug)


app.command(
    help="Train the codebooks of a compressed file, and keep only what is better on held-out data.\n\n"
    "COMPRESSED is what convert wrote. What is written is never worse than it on the task's metric.\n\n"
    "Example:\n\n    cqr-compress finetune small.safetensors --task my_task.py --teacher ckpt.pt"
)(finetune)


app.command(
    help="Say what compression cost, and what fine-tuning gave back.\n\n"
    "COMPRESSED are files that convert or finetune wrote; reports beside them are completed.\n\n"
    "Example:\n\n    cqr-compress evaluate small.safetensors tuned.safetensors --against ckpt.pt"
)(evaluate)


def main() -> None:
    """Run the command line; a polite kill unwinds, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


def _version(on: bool) -> None:
    if on:
        typer.echo(f"cqr-compress {__version__}")
        raise typer.Exit


def _parse_ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise typer.BadParameter(f"--keep-rows takes row numbers such as 0,1 and not {text!r}") from e


_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def _parse_size(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(?i)\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text)
    if match is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"--shard-size takes a size such as 5GB or 500MB and not {text!r}")
    return max(1, int(float(match[1]) * _UNITS[(match[2] or "").lower()]))
