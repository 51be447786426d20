"""`cqr-compress evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cqr_compress.cli.options import (
    DebugOption,
    DeviceOption,
    ForceOption,
    FrequenciesOption,
    JsonOption,
    OriginalOption,
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
from cqr_compress.tasks.registry import DEFAULT_BATCH_SIZE


def evaluate(
    compressed: Annotated[
        list[Path],
        typer.Argument(
            metavar="COMPRESSED",
            show_default=False,
            help="Compressed files; --original, --task or both are required.",
        ),
    ],
    original: OriginalOption = None,
    task: TaskOption = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    settings: SetOption = None,
    frequencies: FrequenciesOption = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: DeviceOption = None,
    html: HtmlOption = None,
    plots: PlotsOption = None,
    labels: LabelsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate compressed files, by the quality of rows and by a task's metrics.

    Compares compressed files with the original, and adds the result to the report next to each file.

    Example:
    cqr-compress evaluate small.safetensors tuned.safetensors --original ckpt.pt
    """

    def work() -> None:
        from cqr_compress.cli.options import print_json
        from cqr_compress.cli.page_options import check_pages, write_pages
        from cqr_compress.cli.render import print_evaluation
        from cqr_compress.commands.evaluate import evaluate as evaluate_files
        from cqr_compress.commands.inspect import inspect as inspect_file
        from cqr_compress.progress import ProgressBars

        if original is None and task is None:
            raise typer.BadParameter("--original and --task are missing: give one or both")
        if labels and len(compressed) > 1:
            raise typer.BadParameter(f"--labels compare one file with the original: {len(compressed)} are given")
        reading = [*compressed, *([] if original is None else [original])]
        check_pages(html, plots, labels=labels, original=original, force=force, reading=reading)
        choice = TaskChoice(task, train_file, eval_file, batch_size, settings)
        with ProgressBars() as progress:
            report = evaluate_files(
                compressed, original=original, task=None if task is None else choice.task(compressed[0]),
                frequencies=frequencies or (), seed=seed, device=device, progress=progress,
            )  # fmt: skip
        if html is not None or plots is not None:
            values = {**report.to_json(), "sizes": [inspect_file(file).to_json() for file in compressed]}
            write_pages(
                values, html, plots, original=original, labels=labels, frequencies=frequencies, force=force
            )
        if as_json:
            print_json(report.to_json())
        else:
            print_evaluation(report)

    run(work, debug)
