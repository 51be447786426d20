"""Task files of users: Python files with a few functions, found by name."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cqr_compress.checkpoint.output_files import atomic_file, check_outputs
from cqr_compress.errors import TaskError, UserCodeError
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.user_state import UserState

_NEEDED = ("model", "train_batches", "loss", "evaluate")
_OPTIONAL = ("logits", "frequencies", "optimizer")
TEMPLATE = '''"""My model and data, for `cqr-compress finetune SMALL.safetensors --task THIS_FILE -o TUNED`."""

import torch
from torch import nn

metric = "auc"  # the metric of evaluate() that selects the best weights
mode = "max"  # "max" if a larger metric is better, else "min"


def model():
    """Build the architecture of the checkpoint; its weights are loaded afterwards."""
    raise NotImplementedError("from my_project import MyModel; return MyModel(...)")


def train_batches(epoch):
    """Return the batches of an epoch: a DataLoader, a generator or a list. Draw random numbers from torch, numpy
    or random: their generators are seeded for each epoch, so that a run can be resumed."""
    raise NotImplementedError("return DataLoader(my_training_set, batch_size=1024, shuffle=True)")


def loss(model, batch):
    """Return the unreduced loss of each example of a batch, which updates of codes require; or the mean loss."""
    features, labels = batch
    return nn.functional.binary_cross_entropy_with_logits(model(features), labels, reduction="none")


def evaluate(model):
    """Return metrics on held-out data; the model is in eval mode, and gradients are disabled."""
    raise NotImplementedError('return {"auc": ..., "bce": ...}')


# def logits(model, batch):
#     """Return scores of classes or items, (n, V), whose softmax --distill outputs compares with the original's.
#     Without this function it compares the outputs of model(...)."""


# def frequencies(table_name):
#     """Return the counts of the ids of a table, (N,), by its name in the checkpoint, or None."""


# def optimizer(params):
#     return torch.optim.AdamW(params, lr=1e-4)
'''


def write_template(path: str | Path, force: bool = False) -> None:
    """Write a commented template of a task file.

    Raises:
        OutputExistsError: the file exists, and `force` is False.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    check_outputs([path], force)
    with atomic_file(path) as file:
        file.write(TEMPLATE.encode())


def load_task_file(path: str | Path) -> Task:
    """Execute a task file and build a task from its functions.

    Args:
        path: a Python file, which can import modules from its folder.

    Raises:
        TaskError: no such file, or names that are missing or of another type.
        UserCodeError: an exception in the file; the functions of the task raise it as well.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"no such task file: {str(path)!r}")
    code = _UserCode(path)
    module = code.run()
    missing = [name for name in _NEEDED if not callable(getattr(module, name, None))]
    missing += ["metric"] if not isinstance(getattr(module, "metric", None), str) else []
    if missing:
        raise TaskError(
            f"task file {str(path)!r} does not define {', '.join(missing)}. "
            "`cqr-compress finetune --init-task FILE` writes a commented template."
        )
    functions: dict[str, Any] = {name: code.wrapped(getattr(module, name)) for name in _NEEDED}
    for name in _OPTIONAL:
        if callable(getattr(module, name, None)):
            functions[name] = code.wrapped(getattr(module, name))
    batches = functions["train_batches"]
    functions["train_batches"] = lambda epoch: _UserBatches(batches(epoch), code)
    mode = getattr(module, "mode", "max")
    identity = {"task_file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Task(name=path.name, metric=module.metric, mode=mode, identity=identity, **functions)


class _UserCode:
    """The code of a task file: its exceptions are raised as `UserCodeError`, its settings hold for itself only.

    Args:
        path: the task file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._state = path.resolve(), UserState()

    def run(self) -> ModuleType:
        """Execute the file.

        Raises:
            TaskError: not a Python file.
        """
        name = f"_cqr_compress_task_{self._path.stem}"
        spec = importlib.util.spec_from_file_location(name, self._path)
        if spec is None or spec.loader is None:
            raise TaskError(f"task file {str(self._path)!r} is not a Python file: its name has to end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # required to pickle classes of the file, as workers of a DataLoader do
        sys.path.insert(0, str(self._path.parent))
        self.wrapped(spec.loader.exec_module)(module)
        return module

    def wrapped(
        self, function: Callable[..., Any], passes: type[Exception] | tuple[()] = ()
    ) -> Callable[..., Any]:
        """Wrap a function of the user; exceptions of type `passes` are raised as they are."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._state.active():
                    return function(*args, **kwargs)
            except passes:
                raise
            except Exception as e:
                raise UserCodeError(_own_traceback(e, self._path)) from e

        return call


class _UserBatches:
    """Iterable of batches of a user's code; it has a length if they have one."""

    def __init__(self, batches: Any, code: _UserCode) -> None:
        self._batches, self._code = batches, code

    def __len__(self) -> int:
        """Return the number of batches; raises TypeError if they have none, as len() requires."""
        return int(self._code.wrapped(len, passes=TypeError)(self._batches))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._code.wrapped(iter)(self._batches)
        end = object()
        following = self._code.wrapped(next)
        while (batch := following(iterator, end)) is not end:
            yield batch


def _own_traceback(error: BaseException, path: Path) -> str:
    """Format a traceback from the first frame in the user's file, without the frames of this package above it."""
    if isinstance(error, UserCodeError):
        return str(error)
    first = error.__traceback__
    while first is not None and Path(first.tb_frame.f_code.co_filename).resolve() != path:
        first = first.tb_next
    if first is None and not isinstance(error, SyntaxError):
        first = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, first)).rstrip()
