"""Options of the commands that use a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cqr_compress.cli.options import DATA, given, split_setting
from cqr_compress.errors import TaskError
from cqr_compress.tasks.registry import BUILTIN

if TYPE_CHECKING:
    from cqr_compress.finetuning.task import Task

TaskOption = Annotated[
    str | None,
    given(
        "--task", metavar="FILE|NAME", panel=DATA,
        help=f"Python file with your model and data, or {', '.join(BUILTIN)}, which require --train-file.",
    ),
]  # fmt: skip
TrainFileOption = Annotated[
    list[Path] | None,
    given(
        "--train-file", metavar="FILE", panel=DATA,
        help="Training data of a built-in task: CSV, TSV, libfm, Parquet, or sequences for sasrec. Repeatable.",
    ),
]  # fmt: skip
EvalFileOption = Annotated[
    list[Path] | None,
    given(
        "--eval-file", metavar="FILE", panel=DATA, help="Held-out data of a built-in task. Repeatable.",
        default="a tenth of the training data",
    ),
]  # fmt: skip
BatchSizeOption = Annotated[int, typer.Option(help="Batch size of a built-in task.", rich_help_panel=DATA)]
SetOption = Annotated[
    list[str] | None,
    given(
        "--set", metavar="NAME=VALUE", panel=DATA,
        help="Setting of a built-in task, such as user=uid or threshold=4; an unknown name lists all. Repeatable.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class TaskChoice:
    """Values of the options of a task."""

    name: str | None
    train_file: list[Path] | None
    eval_file: list[Path] | None
    batch_size: int
    settings: list[str] | None

    def task(self, source: Path) -> Task:
        """Create the task for a compressed file or a dense checkpoint.

        Raises:
            TaskError: no such task, or files that do not match it.
        """
        from cqr_compress.finetuning.task_file import load_task_file
        from cqr_compress.tasks.data.files import DataOptions
        from cqr_compress.tasks.registry import builtin_task

        name = self.name
        if name is None:
            raise typer.BadParameter(
                f"--task is missing: give a Python file (--init-task writes a template), or {', '.join(BUILTIN)}"
            )
        if name in BUILTIN:
            if not self.train_file:
                raise typer.BadParameter(f"--task {name} requires --train-file")
            given = dict(split_setting(setting, "--set") for setting in self.settings or ())
            data = DataOptions(tuple(self.train_file), tuple(self.eval_file or ()), self.batch_size, given)
            return builtin_task(name, source, data)
        if self.train_file or self.eval_file or self.settings:
            raise typer.BadParameter(
                "--train-file, --eval-file and --set are for built-in tasks only; a task file defines its data"
            )
        if not name.endswith(".py") and not Path(name).exists():
            raise TaskError(f"no built-in task and no file {name!r}: the built-in tasks are {', '.join(BUILTIN)}")
        return load_task_file(name)
