"""Registry of the built-in tasks, with the module that implements each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqr_compress.finetuning.task import Task
    from cqr_compress.tasks.data.files import DataOptions
    from cqr_compress.tasks.shapes import Shapes

DEFAULT_BATCH_SIZE = 2048
BUILTIN: dict[str, tuple[str, str]] = {
    "dlrm": ("dlrm", "dlrm_task"),
    "gmf": ("pairs", "gmf_task"),
    "sasrec": ("sasrec", "sasrec_task"),
    "two-tower": ("pairs", "two_tower_task"),
}
"""By the task's name: its module in this package, and its function of shapes and data options."""


def builtin_task(name: str, source: str | Path, options: DataOptions) -> Task:
    """Create a built-in task for a compressed file or a dense checkpoint.

    Args:
        name: a name of BUILTIN.
        source: the file, whose shapes determine the model.
        options: data files and settings.

    Raises:
        TaskError: the file or the data do not match the task.
    """
    from cqr_compress.tasks.shapes import model_shapes

    module, function = BUILTIN[name]
    make: Callable[[Shapes, DataOptions], Task] = getattr(import_module(f"cqr_compress.tasks.{module}"), function)
    return make(model_shapes(source), options)
