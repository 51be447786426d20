"""`cqr-compress convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cqr_compress.cli.options import (
    OUTPUT,
    SELECTION,
    CheckpointArgument,
    DebugOption,
    DeviceOption,
    ExcludeOption,
    ForceOption,
    FrequenciesOption,
    JsonOption,
    OffsetsOption,
    PlanOption,
    RulesOption,
    ShardOption,
    TablesOption,
    options_of,
    output_option,
    parse_size,
    print_json,
    run,
)
from cqr_compress.cli.page_options import HtmlOption, LabelsOption, PlotsOption
from cqr_compress.cli.task_options import (
    BatchSizeOption,
    EvalFileOption,
    SetOption,
    TaskChoice,
    TaskOption,
    TrainFileOption,
)
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.tasks.registry import DEFAULT_BATCH_SIZE

_BUDGET = ("ratio", "size", "file_ratio", "max_error", "min_recall", "weight", "bits_per_dim", "rest_dtype")
_METHOD = ("method", "rotation", "rank", "helper", "num_columns", "num_levels", "n_bits", "window", "max_tiers")
_THEN = ("codebook_dtype", "effort", "refine_rounds", "max_sample", "seed")
_ROWS = ("min_rows", "exact_rows", "prior", "nonfinite")


@options_of(ConvertOptions, (*_BUDGET, *_METHOD, *_THEN, *_ROWS))
def convert(
    checkpoint: CheckpointArgument,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    rules: RulesOption = None,
    offsets: OffsetsOption = None,
    frequencies: FrequenciesOption = None,
    task: TaskOption = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    settings: SetOption = None,
    device: DeviceOption = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie", help="Store a dense copy under the other names of a tied table.", rich_help_panel=SELECTION
        ),
    ] = False,
    output: Annotated[Path | None, output_option("CHECKPOINT with .cqr.safetensors")] = None,
    plan: PlanOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan with exact sizes; write nothing.", rich_help_panel=OUTPUT),
    ] = False,
    shard_size: ShardOption = None,
    force: ForceOption = False,
    html: HtmlOption = None,
    plots: PlotsOption = None,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **option_fields: Any,
) -> None:
    """Compress the embedding tables of a checkpoint.

    Writes a safetensors file, with a JSON report next to it; or, where CHECKPOINT and the output are folders, a
    folder that transformers or sentence-transformers loads.

    Example:
    cqr-compress convert ckpt.pt -o small.safetensors --ratio 16 --dry-run
    """

    def work() -> None:
        from cqr_compress.cli.page_options import check_pages, write_pages
        from cqr_compress.cli.render import print_folder_hint, print_load_hint, print_size_report
        from cqr_compress.commands.convert import convert as convert_file
        from cqr_compress.commands.convert_folder import convert_folder, is_folder_conversion
        from cqr_compress.progress import ProgressBars

        choice = TaskChoice(task, train_file, eval_file, batch_size, settings)
        options: dict[str, Any] = {
            "options": ConvertOptions(**option_fields), "tables": tables or (), "exclude": exclude or (),
            "rules": rules or (), "offsets": offsets or (), "frequencies": frequencies or (),
            "device": device, "plan": plan,
            "task": None if task is None else choice.task(checkpoint), "untie": untie,
            "shard_bytes": parse_size(shard_size), "force": force, "dry_run": dry_run,
        }  # fmt: skip
        check_pages(html, plots, labels=labels, original=checkpoint, force=force, reading=[checkpoint])
        pages: dict[str, Any] = {
            "original": checkpoint, "labels": labels, "frequencies": frequencies, "force": force
        }  # fmt: skip
        if output is not None and is_folder_conversion(checkpoint, output):
            with ProgressBars() as progress:
                folder = convert_folder(checkpoint, output, progress=progress, **options)
            write_pages(folder.to_json(), html, plots, **pages)
            if as_json:
                print_json(folder.to_json())
                return
            for report in folder.reports:
                print_size_report(report)
            print_folder_hint(folder)
            return
        with ProgressBars() as progress:
            report = convert_file(checkpoint, output, progress=progress, **options)
        write_pages(report.to_json(), html, plots, **pages)
        if as_json:
            print_json(report.to_json())
            return
        print_size_report(report)
        if report.measured:
            print_load_hint(report)

    run(work, debug)
