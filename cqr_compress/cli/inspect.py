"""`cqr-compress inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from cqr_compress.cli.options import CheckpointArgument, DebugOption, ExcludeOption, JsonOption, TablesOption, run


def inspect(
    checkpoint: CheckpointArgument,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Names and shapes only; do not read the tables.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe a checkpoint, or show the report of a compressed file.

    CHECKPOINT is a dense checkpoint, a compressed file, or a saved report.

    Example:
    cqr-compress inspect ckpt.pt
    """

    def work() -> None:
        from cqr_compress.checkpoint.size_report import SizeReport
        from cqr_compress.cli.options import print_json
        from cqr_compress.cli.render import print_dense_report, print_size_report
        from cqr_compress.commands.inspect import inspect as inspect_file
        from cqr_compress.progress import ProgressBars

        with ProgressBars() as progress:
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
