"""The commands that need a model and data: finetune and evaluate."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cqr_compress.cli.options import DebugOption, ForceOption, JsonOption, print_json, run
from cqr_compress.errors import TaskError

_DATA, _TRAINING, _TEACHER, _CODES, _OUTPUT = "Data", "Training", "Teacher", "Codes", "Output"


class TrainName(str, Enum):
    """Choices of --train."""

    codebooks = "codebooks"
    all = "all"


class CodesName(str, Enum):
    """Choices of --codes."""

    auto = "auto"
    frozen = "frozen"
    recluster = "recluster"
    reassign = "reassign"


class DistillName(str, Enum):
    """Choices of --distill."""

    outputs = "outputs"
    rows = "rows"


class PrecisionName(str, Enum):
    """Choices of --precision."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


CompressedArgument = Annotated[
    Path | None, typer.Argument(metavar="COMPRESSED", show_default=False, help="What convert wrote.")
]


TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="FILE|NAME",
        help="A Python file with your model and data, or dlrm, gmf, two-tower or sasrec with --train-file.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]


TrainFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--train-file",
        help="Training data of a built-in task: CSV, TSV, libfm, Parquet, or sequences for sasrec. Repeatable.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]


EvalFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval-file",
        help="Held-out data of a built-in task; without it, a tenth of the training data. Repeatable.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]


BatchSizeOption = Annotated[
    int, typer.Option(help="Examples in a batch of a built-in task.", rich_help_panel=_DATA)
]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of a built-in task, such as user=uid or threshold=4; a wrong one lists them. Repeatable.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]


DeviceOption = Annotated[
    str | None,
    typer.Option(help="Such as cpu or cuda:1. [default: CUDA where there is one]", show_default=False),
]


def finetune(
    compressed: CompressedArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write; by default COMPRESSED with .tuned.safetensors.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    task: TaskOption = None,
    init_task: Annotated[
        Path | None,
        typer.Option(
            "--init-task",
            help="Write a task file to start from, and stop.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = 2048,
    settings: SetOption = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.", rich_help_panel=_TRAINING)] = 5,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the optimizer, at most.", rich_help_panel=_TRAINING, show_default=False),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Of AdamW, at its height.", rich_help_panel=_TRAINING)
    ] = 3e-4,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps until the learning rate is at its height.", rich_help_panel=_TRAINING)
    ] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAINING)] = 0.0,
    accumulate: Annotated[
        int, typer.Option(help="Batches of each process that make one step.", rich_help_panel=_TRAINING)
    ] = 1,
    train: Annotated[
        TrainName, typer.Option(help="What is trained; the rest is frozen.", rich_help_panel=_TRAINING)
    ] = TrainName.codebooks,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations. [default: an epoch]", rich_help_panel=_TRAINING, show_default=False
        ),
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Evaluations without a better one before it stops.", rich_help_panel=_TRAINING)
    ] = 3,
    precision: Annotated[
        PrecisionName,
        typer.Option(help="Of forward and backward; auto is bfloat16 on CUDA.", rich_help_panel=_TRAINING),
    ] = PrecisionName.auto,
    seed: Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=_TRAINING)] = 0,
    device: DeviceOption = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="The dense checkpoint that was converted: its rows are fitted anew, weighted by the task.",
            rich_help_panel=_TEACHER,
            show_default=False,
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option(help="Fit the teacher's rows anew before training.", rich_help_panel=_TEACHER)
    ] = True,
    distill: Annotated[
        DistillName | None,
        typer.Option(
            help="Pull toward the teacher's outputs or rows while training.",
            rich_help_panel=_TEACHER,
            show_default=False,
        ),
    ] = None,
    distill_weight: Annotated[float, typer.Option(help="How hard.", rich_help_panel=_TEACHER)] = 1.0,
    evaluate_teacher: Annotated[
        bool,
        typer.Option(help="Load the dense model and show its figures.", rich_help_panel=_TEACHER),
    ] = True,
    data_free: Annotated[
        bool,
        typer.Option(
            "--data-free",
            help="No task: fit codes and codebooks to the teacher's rows, all of them, in turns.",
            rich_help_panel=_TEACHER,
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(help="Turns of --data-free.", rich_help_panel=_TEACHER)] = 5,
    frequencies: Annotated[
        list[str] | None,
        typer.Option(
            "--frequencies",
            metavar="[TABLE=]FILE",
            help="How often each id is used, for --data-free; see convert. Repeatable.",
            rich_help_panel=_TEACHER,
            show_default=False,
        ),
    ] = None,
    codes: Annotated[
        CodesName,
        typer.Option(
            help="Between epochs: cluster ids anew (one stored level), reassign codes, or neither.",
            rich_help_panel=_CODES,
        ),
    ] = CodesName.auto,
    informed: Annotated[
        bool, typer.Option(help="Cluster by gradients, or by rows alone.", rich_help_panel=_CODES)
    ] = True,
    until: Annotated[
        float, typer.Option(help="Part of the training after which codes rest.", rich_help_panel=_CODES)
    ] = 0.75,
    max_moved: Annotated[
        float, typer.Option(help="Share of ids that one reassignment may move.", rich_help_panel=_CODES)
    ] = 0.3,
    eta: Annotated[
        float,
        typer.Option(help="Part of a Newton step that codes follow; 0.1 for many tables.", rich_help_panel=_CODES),
    ] = 0.3,
    pass_batches: Annotated[
        int | None,
        typer.Option(
            help="Batches of a pass that gathers gradients. [default: an epoch]",
            rich_help_panel=_CODES,
            show_default=False,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between states to resume from. [default: evaluations, and every five minutes]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run was.", rich_help_panel=_OUTPUT)
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the codebooks of a compressed file."""

    def work() -> None:
        from cqr_compress.finetuning.task_file import write_template

        if init_task is not None:
            write_template(init_task, force)
            typer.echo(f"wrote {init_task}: fill in your model and data")
            return
        if compressed is None:
            raise typer.BadParameter("COMPRESSED, the file that convert wrote, is missing")
        target = output or compressed.with_name(
            f"{compressed.name.removesuffix('.safetensors')}.tuned.safetensors"
        )
        if data_free:
            if teacher is None or task is not None:
                raise typer.BadParameter("--data-free takes --teacher, and no --task")
            _refit(compressed, target, teacher, rounds, frequencies or (), force, as_json)
            return
        from cqr_compress.clustering.options import ClusterOptions
        from cqr_compress.finetuning.options import FinetuneOptions

        options = FinetuneOptions(
            epochs=epochs, max_steps=max_steps, learning_rate=learning_rate, warmup_steps=warmup_steps,
            weight_decay=weight_decay, accumulate=accumulate, train=train.value, eval_every=eval_every,
            patience=patience, codes=codes.value, informed=informed, until=until, max_moved=max_moved,
            pass_batches=pass_batches, refit=refit, distill=distill.value if distill else None,
            distill_weight=distill_weight, precision=precision.value, seed=seed, save_every=save_every,
            clustering=ClusterOptions(eta=eta),
        )  # fmt: skip
        chosen = _task(task, compressed, train_file, eval_file, batch_size, settings)
        _tune(compressed, target, chosen, options, teacher, evaluate_teacher, device, resume, force, as_json)

    run(work, debug)


def evaluate(
    compressed: Annotated[
        list[Path], typer.Argument(metavar="COMPRESSED...", show_default=False, help="Compressed files.")
    ],
    against: Annotated[
        Path | None,
        typer.Option("--against", help="The dense checkpoint they stand for.", show_default=False),
    ] = None,
    task: TaskOption = None,
    train_file: TrainFileOption = None,
    eval_file: EvalFileOption = None,
    batch_size: BatchSizeOption = 2048,
    settings: SetOption = None,
    frequencies: Annotated[
        list[str] | None,
        typer.Option(
            "--frequencies",
            metavar="[TABLE=]FILE",
            help="How often each id is used: errors are also shown by bands of it. See convert. Repeatable.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what compression cost."""

    def work() -> None:
        from cqr_compress.cli.render import TerminalProgress, print_evaluation
        from cqr_compress.commands.evaluate import evaluate as evaluate_files

        if against is None and task is None:
            raise typer.BadParameter("give --against, a dense checkpoint, or --task, or both")
        chosen = None
        if task is not None:
            chosen = _task(task, compressed[0], train_file, eval_file, batch_size, settings)
        with TerminalProgress() as progress:
            report = evaluate_files(
                compressed, against=against, task=chosen, frequencies=frequencies or (), seed=seed, device=device,
                progress=progress,
            )  # fmt: skip
        if as_json:
            print_json(report.to_json())
        else:
            print_evaluation(report)

    run(work, debug)


def _task(
    name: str | None,
    compressed: Path,
    train_file: list[Path] | None,
    eval_file: list[Path] | None,
    batch_size: int,
    settings: list[str] | None,
) -> Any:
    from cqr_compress.finetuning.task_file import load_task_file
    from cqr_compress.tasks.data.files import DataOptions
    from cqr_compress.tasks.registry import BUILTIN, builtin_task

    if name is None:
        raise typer.BadParameter(
            f"--task is missing: a Python file (--init-task writes one to start from), or {', '.join(BUILTIN)}"
        )
    if name in BUILTIN:
        if not train_file:
            raise typer.BadParameter(f"--task {name} wants --train-file")
        given = dict(_split(setting) for setting in settings or ())
        return builtin_task(
            name, compressed, DataOptions(tuple(train_file), tuple(eval_file or ()), batch_size, given)
        )
    if train_file or eval_file or settings:
        raise typer.BadParameter(
            "--train-file, --eval-file and --set go with a built-in task; a task file has its own"
        )
    if not name.endswith(".py") and not Path(name).exists():
        raise TaskError(f"there is no built-in task {name!r} and no such file: built in are {', '.join(BUILTIN)}")
    return load_task_file(name)


def _split(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set takes NAME=VALUE and not {setting!r}")
    return name, value


def _tune(
    compressed: Path,
    target: Path,
    task: Any,
    options: Any,
    teacher: Path | None,
    evaluate_teacher: bool,
    device: str | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    from cqr_compress import distributed
    from cqr_compress.cli.render import TerminalProgress, print_load_hint, print_tuning_report
    from cqr_compress.commands.finetune import finetune as finetune_file
    from cqr_compress.finetuning.task_model import own_device

    chosen = own_device(device)
    with distributed.launched_processes(chosen), TerminalProgress() as progress:
        report = finetune_file(
            compressed, target, task, options, teacher=teacher, evaluate_teacher=evaluate_teacher, device=chosen,
            resume=resume, force=force, progress=progress,
        )  # fmt: skip
        first = distributed.rank() == 0
    if not first or report.size is None:
        return
    if as_json:
        print_json(report.to_json())
        return
    print_tuning_report(report)
    print_load_hint(report.size)


def _refit(
    compressed: Path,
    target: Path,
    teacher: Path,
    rounds: int,
    frequencies: Any,
    force: bool,
    as_json: bool,
) -> None:
    from cqr_compress.cli.render import TerminalProgress, print_size_report
    from cqr_compress.commands.refit import refit

    with TerminalProgress() as progress:
        report = refit(
            compressed, target, teacher, rounds=rounds, frequencies=frequencies, force=force, progress=progress
        )
    if as_json:
        print_json(report.to_json())
    else:
        print_size_report(report)
