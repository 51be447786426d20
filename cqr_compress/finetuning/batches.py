"""Deterministic distribution of an epoch's batches to processes and optimizer steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cqr_compress import distributed
from cqr_compress.errors import TaskError
from cqr_compress.finetuning.rng import DATA, RandomStream
from cqr_compress.finetuning.task import Task


@dataclass(frozen=True)
class Step:
    """The batches of one optimizer step.

    Attributes:
        batches: batches of this process.
        count: number of batches of all processes.
    """

    batches: list[Any]
    count: int


@dataclass(frozen=True)
class Batches:
    """Distributes a task's batches round-robin: `gradient_accumulation_steps` per optimizer step and process.

    Random numbers of the data are drawn from a stream seeded with the seed and the epoch, independent of the
    random numbers that the model draws.
    """

    task: Task
    gradient_accumulation_steps: int
    seed: int
    device: torch.device

    def steps(self, epoch: int, skip: int = 0) -> Iterator[Step]:
        """Iterate over the steps of an epoch, without the first `skip`."""
        world, rank = distributed.world_size(), distributed.rank()
        width = self.gradient_accumulation_steps * world
        group: list[Any] = []
        count = 0
        for index, batch in enumerate(self._all(epoch)):
            if index < skip * width:
                continue
            count += 1
            if index % world == rank:
                group.append(to_device(batch, self.device))
            if count == width:
                yield Step(group, count)
                group, count = [], 0
        if count:
            yield Step(group, count)

    def mine(self, epoch: int, limit: int | None) -> Iterator[Any]:
        """Iterate over this process's batches of an epoch, at most `limit`, for a pass over the data."""
        world, rank = distributed.world_size(), distributed.rank()
        for index, batch in enumerate(self._all(epoch)):
            if limit is not None and index >= limit * world:
                return
            if index % world == rank:
                yield to_device(batch, self.device)

    def steps_per_epoch(self, epoch: int) -> int | None:
        """Return the number of steps of an epoch; None if the batches have no length."""
        with RandomStream.seeded(self.seed, DATA, epoch).active():
            batches = self.task.train_batches(epoch)
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            return None
        return -(-count // (self.gradient_accumulation_steps * distributed.world_size()))

    def _all(self, epoch: int) -> Iterator[Any]:
        stream = RandomStream.seeded(self.seed, DATA, epoch)
        end = object()
        with stream.active():
            iterator = iter(self.task.train_batches(epoch))
        for index in itertools.count():
            with stream.active():
                batch = next(iterator, end)
            if batch is end:
                if not index:
                    raise TaskError(f"train_batches({epoch}) returned no batch")
                return
            yield batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, also in nested tuples, lists and dicts, to a device; other values stay."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, dict):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch
