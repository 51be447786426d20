"""Collective operations of torch.distributed, which have no effect in a single process."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_log = logging.getLogger(__name__)
_TIMEOUT = timedelta(days=7)  # other processes wait while the first one fits a large table


def world_size() -> int:
    """Return the number of processes; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def log_on_first(line: str) -> None:
    """Log a line in the first process only."""
    if rank() == 0:
        _log.info("%s", line)


def all_reduce_(tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def broadcast_(tensor: Tensor) -> None:
    """Broadcast a tensor from the first process, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def broadcast_object(value: T) -> T:
    """Broadcast a picklable value from the first process, and return it."""
    if world_size() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]  # type: ignore[no-any-return]


def all_gather_object(value: T) -> list[T]:
    """Gather the picklable values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value)
    return held


@contextmanager
def launched_processes(device: torch.device) -> Iterator[None]:
    """Context manager that initializes torch.distributed for processes that `torchrun` started.

    Args:
        device: device of this process; gloo is the backend for CPUs and objects, nccl for GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    # Defaults of this module's functions refer to the process group at its first import, which optimizers trigger.
    # Gloo's threads would then outlive the group, and freeing a tensor at interpreter exit aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
