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
    output: Annotated[Path, output_option(help="File to write: .pt .pth .ckpt .bin or .safetensors.")],
    shard_size: ShardOption = None,
    force: ForceOption = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the tensors with their checksums.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Export a compressed file to a dense checkpoint.

    The output can be loaded without this package: names, dtypes, shapes and nesting are those of the original.

    Example:
    cqr-compress export small.safetensors -o dense.pt
    """

    def work() -> None:
        from cqr_compress.commands.export import export as export_file
        from cqr_compress.progress import ProgressBars

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
