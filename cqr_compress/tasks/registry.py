"""Tasks for which nobody has to write code: common models on common data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cqr_compress.finetuning.task import Task
from cqr_compress.tasks.data.files import DataOptions
from cqr_compress.tasks.dlrm import dlrm_task
from cqr_compress.tasks.pairs import gmf_task, two_tower_task
from cqr_compress.tasks.sasrec import sasrec_task
from cqr_compress.tasks.shapes import Shapes, model_shapes

BUILTIN: dict[str, Callable[[Shapes, DataOptions], Task]] = {
    "dlrm": dlrm_task,
    "gmf": gmf_task,
    "sasrec": sasrec_task,
    "two-tower": two_tower_task,
}
"""Makes a task of the shapes of a model and its data, by the task's name."""


def builtin_task(name: str, source: str | Path, options: DataOptions) -> Task:
    """Make a built-in task for a compressed file.

    Args:
        name: of BUILTIN.
        source: the file, whose shapes say what the model is like.
        options: where the data are.

    Raises:
        TaskError: the file or the data do not fit the task.
    """
    return BUILTIN[name](model_shapes(source), options)
