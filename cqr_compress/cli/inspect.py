"""`cqr-compress inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from cqr_compress.cli.options import (
    CheckpointArgument,
    DebugOption,
    ExcludeOption,
    ForceOption,
    JsonOption,
    TablesOption,
    run,
)
from cqr_compress.cli.page_options import HtmlOption, PlotsOption


def inspect(
    checkpoint: CheckpointArgument,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Names and shapes only; do not read the tables.")] = False,
    html: HtmlOption = None,
    plots: PlotsOption = None,
    force: ForceOption = False,
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
        from cqr_compress.cli.page_options import check_pages, write_pages
        from cqr_compress.cli.render import print_dense_report, print_size_report
        from cqr_compress.commands.inspect import inspect as inspect_file
        from cqr_compress.progress import ProgressBars

        check_pages(html, plots, force=force, reading=[checkpoint])
        with ProgressBars() as progress:
            report = inspect_file(
                checkpoint, tables=tables or (), exclude=exclude or (), quick=quick, progress=progress
            )
        write_pages(report.to_json(), html, plots, force=force)
        if as_json:
            print_json(report.to_json())
        elif isinstance(report, SizeReport):
            print_size_report(report)
        else:
            print_dense_report(report)

    run(work, debug)
