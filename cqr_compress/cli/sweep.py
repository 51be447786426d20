"""`cqr-compress sweep`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cqr_compress.cli.options import (
    OUTPUT,
    CheckpointArgument,
    DebugOption,
    DeviceOption,
    ExcludeOption,
    ForceOption,
    FrequenciesOption,
    JsonOption,
    OffsetsOption,
    RulesOption,
    TablesOption,
    given,
    options_of,
    output_option,
    print_json,
    run,
    split_setting,
)
from cqr_compress.cli.page_options import HtmlOption, LabelsOption, PlotsOption, check_pages, write_pages
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

_FIELDS = ("method", "effort", "weight", "rest_dtype", "seed", "min_rows", "exact_rows", "prior", "nonfinite")
_LADDER = "4,8,16,32,64"
FolderOption = Annotated[
    Path | None,
    given(
        "--folder",
        metavar="FOLDER",
        panel=OUTPUT,
        help="Folder of all files and results, from which a sweep is resumed.",
        default="CHECKPOINT with .sweep",
    ),
]  # fmt: skip
MoreOption = Annotated[
    list[str] | None,
    given(
        "--option",
        metavar="NAME=VALUE",
        panel="Training",
        help="Option of fine-tuning (see help(cqr_compress.FinetuneOptions)), repeatable, such as epochs=2.",
    ),
]  # fmt: skip
MaxLossOption = Annotated[
    str | None,
    given(
        "--max-loss",
        metavar="SHARE",
        panel="Budget",
        help="Largest loss of the metric compared with the dense model, such as 1%: the smallest file that "
        "has it is searched for.",
    ),
]  # fmt: skip


@options_of(ConvertOptions, _FIELDS, after="more")
def sweep(
    checkpoint: CheckpointArgument,
    task: TaskOption = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    settings: SetOption = None,
    max_loss: MaxLossOption = None,
    ratios: Annotated[
        str, typer.Option(help="Bytes of the tables before / after to try.", rich_help_panel="Budget")
    ] = _LADDER,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune each file on the task.", rich_help_panel="Training")
    ] = False,
    more: MoreOption = None,
    tables: TablesOption = None,
    exclude: ExcludeOption = None,
    rules: RulesOption = None,
    offsets: OffsetsOption = None,
    frequencies: FrequenciesOption = None,
    device: DeviceOption = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, help="Sizes to measure at once, where memory allows.", rich_help_panel="Training"
        ),
    ] = 1,
    folder: FolderOption = None,
    output: Annotated[
        Path | None, output_option(help="Write the chosen file, or folder; requires --max-loss.")
    ] = None,
    html: HtmlOption = None,
    plots: PlotsOption = None,
    labels: LabelsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **option_fields: Any,
) -> None:
    """Try several sizes, and choose the smallest one that is good enough.

    Without a task, the metric is the recall@10 of rows; that of the model may differ.

    Example:
    cqr-compress sweep ckpt.pt --task my_task.py --max-loss 1% -o small.safetensors
    """

    def work() -> None:
        from cqr_compress.cli.render import print_folder_load, print_load_hint, print_sweep
        from cqr_compress.commands.sweep import sweep as sweep_file
        from cqr_compress.finetuning.options import FinetuneOptions
        from cqr_compress.progress import ProgressBars

        check_pages(html, plots, labels=labels, original=checkpoint, force=force, reading=[checkpoint])
        choice = TaskChoice(task, train_file, eval_file, batch_size, settings)
        values = dict(split_setting(text, "--option") for text in more or ())
        if values and not finetune:
            raise typer.BadParameter("--option is of fine-tuning: give --finetune, too")
        with ProgressBars() as progress:
            report = sweep_file(
                checkpoint, output, ConvertOptions(**option_fields),
                task=None if task is None else partial(choice.task, checkpoint), max_loss=_share(max_loss),
                finetune_options=FinetuneOptions.from_strings(values) if finetune else None,
                ratios=_numbers(ratios), folder=folder, tables=tables or (), exclude=exclude or (),
                rules=rules or (), offsets=offsets or (), frequencies=frequencies or (), device=device,
                jobs=jobs, force=force, progress=progress,
            )  # fmt: skip
        write_pages(
            report.to_json(), html, plots, original=checkpoint, labels=labels, frequencies=frequencies, force=force
        )
        if as_json:
            print_json(report.to_json())
            return
        print_sweep(report)
        if report.output is not None and Path(report.output).is_dir():
            print_folder_load(report.output)
        elif report.output is not None and report.report is not None:
            print_load_hint(report.report)

    run(work, debug)


def _share(text: str | None) -> float | None:
    """Parse 1% or 0.01."""
    if text is None:
        return None
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError as e:
        raise typer.BadParameter(f"--max-loss is {text!r}: give a share such as 1% or 0.01") from e
    return number / 100 if text.strip().endswith("%") else number


def _numbers(text: str) -> list[float]:
    try:
        return [float(part.strip().removesuffix("x")) for part in text.split(",")]
    except ValueError as e:
        raise typer.BadParameter(f"--ratios is {text!r}: give numbers such as {_LADDER}") from e
