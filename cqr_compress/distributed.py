"""The processes of a distributed run, as torch.distributed has them; one alone needs no set-up."""

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
_TIMEOUT = timedelta(days=7)  # others wait while the first process fits a table, however large


def world_size() -> int:
    """Number of processes; 1 where torch.distributed was not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def log_on_first(line: str) -> None:
    """Log what was found, in the first process."""
    if rank() == 0:
        _log.info("%s", line)


def all_reduce_(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def broadcast_(tensor: Tensor) -> None:
    """Replace a tensor by that of the first process, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def broadcast_object(value: T) -> T:
    """The first process's value, on every one; it is pickled."""
    if world_size() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]  # type: ignore[no-any-return]


def all_gather_object(value: T) -> list[T]:
    """The values of all processes, in the order of their numbers; they are pickled."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value)
    return held


@contextmanager
def launched_processes(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did; leave them at the end.

    Args:
        device: that this process computes on; gloo joins CPUs and passes objects, nccl joins GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    # Defaults of this module's functions keep the group that is there at its first import (optimizers import it).
    # Gloo's threads would then outlive it, and one that frees a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
