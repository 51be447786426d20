"""The data of a built-in task: files of examples, streamed, shuffled in chunks, and partly held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cqr_compress import distributed
from cqr_compress.errors import TaskError
from cqr_compress.tasks.registry import DEFAULT_BATCH_SIZE

Examples = tuple[Tensor, ...]
"""Tensors with one entry for each example."""
T = TypeVar("T")
_SHUFFLED_ROWS = 2**20


@dataclass(frozen=True)
class DataOptions:
    """Data files and settings of a built-in task.

    Attributes:
        train: files of training examples.
        held_out: files of examples to evaluate on; if empty, a part of the training examples is held out.
        batch_size: examples of a training batch.
        settings: other settings of the task, as text by name.
    """

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    batch_size: int = DEFAULT_BATCH_SIZE
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """Values that a resumed run has to share: names and sizes of files, batch size, settings."""
        files = {
            what: [[path.name, path.stat().st_size if path.exists() else 0] for path in paths]
            for what, paths in (("train_files", self.train), ("held_out_files", self.held_out))
        }
        return {**files, "batch_size": self.batch_size, "settings": dict(self.settings)}

    def __post_init__(self) -> None:
        if not self.train:
            raise TaskError("a built-in task requires data: give a file with --train-file")
        if self.batch_size < 1:
            raise TaskError(f"batch_size is {self.batch_size}: give at least 1")


@dataclass(frozen=True)
class ExampleFiles:
    """Streams examples from files.

    Files are read in chunks of about a million examples, which are shuffled separately and bound the memory.

    Attributes:
        options: files and batch size.
        read: reads the examples of a file, block by block.
        hold_out: share of the training examples that is held out if there is no other file: every n-th example.
    """

    options: DataOptions
    read: Callable[[Path], Iterator[Examples]]
    hold_out: float

    def train_batches(self, epoch: int) -> Iterator[Examples]:
        """Iterate over the batches of an epoch, shuffled with torch's generator."""
        piece: list[Examples] = []
        rows = 0
        for block in self._blocks(held_out=False):
            piece.append(block)
            rows += len(block[0])
            if rows >= _SHUFFLED_ROWS:
                whole = rows - rows % self.options.batch_size
                joined = _join(piece)
                order = torch.randperm(rows, device="cpu")
                yield from self._split(joined, order[:whole])
                piece = [tuple(part[order[whole:]] for part in joined)]
                rows -= whole
        if rows:
            yield from self._split(_join(piece), torch.randperm(rows, device="cpu"))

    def held_out_batches(self) -> Iterator[Examples]:
        """Iterate over this process's blocks of held-out examples, in order."""
        for index, block in enumerate(self._blocks(held_out=True)):
            if index % distributed.world_size() == distributed.rank():
                yield block

    def _blocks(self, held_out: bool) -> Iterator[Examples]:
        if self.options.held_out:
            for path in self.options.held_out if held_out else self.options.train:
                yield from self.read(path)
            return
        every = max(2, round(1 / self.hold_out))
        seen = 0
        for path in self.options.train:
            for block in self.read(path):
                chosen = ((torch.arange(len(block[0]), device="cpu") + seen) % every == every - 1) == held_out
                seen += len(block[0])
                if chosen.any():
                    yield tuple(part[chosen] for part in block)

    def _split(self, examples: Examples, order: Tensor) -> Iterator[Examples]:
        for part in torch.split(order, self.options.batch_size):
            yield tuple(values[part] for values in examples)


def _join(blocks: list[Examples]) -> Examples:
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def parse_settings(kind: type[T], given: Mapping[str, str], task: str) -> T:
    """Fill a dataclass of settings from text.

    Raises:
        TaskError: an unknown name, or text that is not of the setting's type.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise TaskError(f"task {task} has no setting {', '.join(unknown)}: it has {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, text in given.items():
        wanted = str(known[name].type).removesuffix(" | None")
        try:
            if wanted == "bool":
                values[name] = {"yes": True, "true": True, "no": False, "false": False}[text.lower()]
            else:
                values[name] = {"int": int, "float": float, "str": str}[wanted](text)
        except (ValueError, KeyError) as e:
            raise TaskError(f"setting {name} of task {task} is {text!r}: give {wanted}") from e
    return kind(**values)
