"""The state of an interrupted run, in a file next to its output, from which it is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cqr_compress import distributed
from cqr_compress.checkpoint.torch_writer import save_torch
from cqr_compress.errors import StateError
from cqr_compress.finetuning.rng import RandomState

STATE_VERSION = 2
_START_OVER = ", or start over: omit --resume and pass --force"


@dataclass
class Position:
    """Position of a run in its training.

    Attributes:
        epoch: current epoch, from 0.
        step_of_epoch: optimizer steps done in the current epoch.
        step: optimizer steps done in total.
        steps_per_epoch: steps of a finished epoch, or of the length of the batches; None if neither is known.
        codes_changed: whether the update of codes at the beginning of the current epoch is done.
    """

    epoch: int = 0
    step_of_epoch: int = 0
    step: int = 0
    steps_per_epoch: int | None = None
    codes_changed: bool = False


def state_path(output: Path) -> Path:
    """Return the path of an unfinished run's state: `tuned.resume.pt` for `tuned.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.resume.pt")


def save_state(path: Path, identity: dict[str, Any], position: Position, parts: dict[str, Any]) -> None:
    """Write a state atomically; a collective operation, in which the first process writes.

    Args:
        path: the file.
        identity: settings that the resumed run has to share.
        position: position of this run.
        parts: tensors and plain values.
    """
    random_states = distributed.all_gather_object(RandomState.current().to_plain())
    if distributed.rank() != 0:
        return
    state = {
        "version": STATE_VERSION, "identity": identity, "position": asdict(position), "random": random_states,
        **parts,
    }  # fmt: skip
    save_torch(state, path)


@contextmanager
def damaged_state(path: Path) -> Iterator[None]:
    """Raise errors of missing or invalid values of a state as `StateError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise StateError(
            f"{str(path)!r} is damaged: it has no valid value where a state has one ({type(e).__name__}: {e})"
            f"{_START_OVER}"
        ) from e


def load_state(path: Path, identity: dict[str, Any]) -> tuple[Position, dict[str, Any]]:
    """Read a state, and restore the state of the random number generators.

    Raises:
        StateError: the file is damaged, of another version, or of a run with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise StateError(f"{str(path)!r} cannot be read as the state of a run: {e}") from e
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise StateError(f"{str(path)!r} is not a state of version {STATE_VERSION}{_START_OVER}")
    differing = {
        name: (state["identity"].get(name), value)
        for name, value in identity.items()
        if state["identity"].get(name) != value
    }
    if differing:
        listed = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in differing.items())
        raise StateError(f"{str(path)!r} is of a run with other settings ({listed}): use those{_START_OVER}")
    RandomState.from_plain(state["random"][distributed.rank()]).set()
    return Position(**state["position"]), state
