"""`cqr-compress export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cqr_compress.cli.options import (
    CompressedArgument,
    DebugOption,
    ForceOption,
    ShardOption,
    output_option,
    parse_size,
    run,
)


def export(
    compressed: CompressedArgument,
    output: Annotated[
        Path,
        output_option(
            help="File to write: .pt .pth .ckpt .bin .safetensors .onnx; of word vectors .txt .vec .bin .npy."
        ),
    ],
    table: Annotated[
        str | None, typer.Option("--table", help="Table of an .onnx file, if there are several.")
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option("--topk", help="Make an .onnx file that finds the rows with the largest products."),
    ] = None,
    shard_size: ShardOption = None,
    force: ForceOption = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the tensors with their checksums.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Export a compressed file to a dense checkpoint, or a table to ONNX.

    The output can be loaded without this package: names, dtypes, shapes and nesting are those of the original. An
    .onnx file holds the codes; it maps ids to rows, or with --topk queries to the best rows.

    Example:
    cqr-compress export small.safetensors -o dense.pt
    """

    def work() -> None:
        from cqr_compress.commands.export import export as export_file
        from cqr_compress.commands.export_onnx import export_onnx
        from cqr_compress.progress import ProgressBars

        if output.suffix == ".onnx":
            with ProgressBars() as progress:
                nbytes = export_onnx(
                    compressed,
                    output,
                    table=table,
                    topk=topk,
                    force=force,
                    verify=not no_verify,
                    progress=progress,
                )
            typer.echo(f"wrote {output} ({nbytes:,} bytes)")
            return
        if table is not None or topk is not None:
            raise typer.BadParameter("--table and --topk are for an .onnx output")
        with ProgressBars() as progress:
            nbytes = export_file(
                compressed,
                output,
                shard_bytes=parse_size(shard_size),
                force=force,
                verify=not no_verify,
                progress=progress,
            )
        typer.echo(f"wrote {output} ({nbytes:,} bytes)")

    run(work, debug)
