"""`cqr-compress finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cqr_compress.cli.options import (
    DATA,
    OUTPUT,
    DebugOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OriginalOption,
    options_of,
    output_option,
    print_json,
    run,
    split_setting,
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
from cqr_compress.finetuning.options import FinetuneOptions, option_names
from cqr_compress.tasks.registry import DEFAULT_BATCH_SIZE

_OWN = ("epochs", "learning_rate", "trainable", "patience", "seed", "distill", "codes")
_OTHERS = [name for name in option_names() if name not in _OWN]


@options_of(FinetuneOptions, _OWN, after="init_task")
def finetune(
    compressed: Annotated[
        Path | None, typer.Argument(metavar="COMPRESSED", show_default=False, help="Compressed file.")
    ] = None,
    task: TaskOption = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = DEFAULT_BATCH_SIZE,
    settings: SetOption = None,
    init_task: Annotated[
        Path | None,
        typer.Option(
            "--init-task",
            metavar="FILE",
            help="Write a template of a task file, and exit.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help=f"Other options (see help(cqr_compress.FinetuneOptions)), repeatable: {', '.join(_OTHERS)}.",
            rich_help_panel="Training",
            show_default=False,
        ),
    ] = None,
    original: OriginalOption = None,
    device: DeviceOption = None,
    output: Annotated[Path | None, output_option("COMPRESSED with .tuned.safetensors")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume an interrupted run exactly.", rich_help_panel=OUTPUT),
    ] = False,
    force: ForceOption = False,
    html: HtmlOption = None,
    plots: PlotsOption = None,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **option_fields: Any,
) -> None:
    """Train the codebooks of a compressed file on your data.

    The output is never worse than COMPRESSED by the task's metric on held-out data.

    Example:
    cqr-compress finetune small.safetensors --task my_task.py --original ckpt.pt
    """

    def work() -> None:
        from cqr_compress import distributed
        from cqr_compress.cli.page_options import check_pages, write_pages
        from cqr_compress.cli.render import print_load_hint, print_tuning_report
        from cqr_compress.commands.finetune import finetune as finetune_file
        from cqr_compress.finetuning.task_file import write_template
        from cqr_compress.finetuning.task_model import own_device
        from cqr_compress.progress import ProgressBars

        if init_task is not None:
            write_template(init_task, force)
            typer.echo(f"wrote {init_task}: fill in your model and data")
            return
        if compressed is None:
            raise typer.BadParameter("COMPRESSED is missing: give a compressed file")
        check_pages(html, plots, labels=labels, original=original, force=force, reading=[compressed])
        given = dict(split_setting(text, "--option") for text in more or ())
        if twice := sorted(set(given) & set(_OWN)):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in twice)
            raise typer.BadParameter(f"--option {', '.join(twice)}: give {flags} instead")
        options = FinetuneOptions.from_strings(given, **option_fields)
        chosen, target = own_device(device), output or tuned_name(compressed)
        choice = TaskChoice(task, train_file, eval_file, batch_size, settings)
        with distributed.launched_processes(chosen), ProgressBars() as progress:
            report = finetune_file(
                compressed, target, choice.task(compressed), options, original=original, device=chosen,
                resume=resume, force=force, progress=progress,
            )  # fmt: skip
            first = distributed.rank() == 0
        if not first or report.size is None:
            return
        write_pages(report.to_json(), html, plots, original=original, labels=labels, force=force)
        if as_json:
            print_json(report.to_json())
            return
        print_tuning_report(report)
        print_load_hint(report.size)

    run(work, debug)


def tuned_name(compressed: Path, suffix: str = "tuned") -> Path:
    """Return the default output: `small.tuned.safetensors` for `small.safetensors`."""
    return compressed.with_name(f"{compressed.name.removesuffix('.safetensors')}.{suffix}.safetensors")
