"""The state of a run that was cut off, in a file beside its output, to go on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cqr_compress import distributed
from cqr_compress.checkpoint.streaming_writer import atomic_file
from cqr_compress.errors import StateError
from cqr_compress.finetuning.rng import RandomState

STATE_VERSION = 1
_ANEW = ", or begin anew: leave out --resume and pass --force"


@dataclass
class Position:
    """How far a run is.

    Attributes:
        epoch: that is going on, from 0.
        step_of_epoch: steps of it that are done.
        step: steps in all.
        steps_per_epoch: counted in a finished epoch, or known in advance; None where neither.
        codes_changed: whether the change of codes that begins this epoch is done.
    """

    epoch: int = 0
    step_of_epoch: int = 0
    step: int = 0
    steps_per_epoch: int | None = None
    codes_changed: bool = False


def state_path(output: Path) -> Path:
    """Where the state of an unfinished run is: `tuned.safetensors` has `tuned.resume.pt`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.resume.pt")


def save_state(path: Path, identity: dict[str, Any], position: Position, parts: dict[str, Any]) -> None:
    """Write a state, complete or not at all; every process takes part and the first one writes.

    Args:
        path: the file.
        identity: what has to be equal in the run that goes on.
        position: how far this one is.
        parts: tensors and plain values.
    """
    random_states = distributed.all_gather_object(RandomState.current().to_plain())
    if distributed.rank() != 0:
        return
    state = {
        "version": STATE_VERSION, "identity": identity, "position": asdict(position), "random": random_states,
        **parts,
    }  # fmt: skip
    with atomic_file(path) as file:
        torch.save(state, file)


def load_state(path: Path, identity: dict[str, Any]) -> tuple[Position, dict[str, Any]]:
    """Read a state back and set the generators of random numbers.

    Raises:
        StateError: damaged, of another version, or of another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise StateError(f"{str(path)!r} cannot be read as the state of a run: {e}") from e
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise StateError(f"{str(path)!r} is not a state of this version{_ANEW}")
    differing = {
        name: (state["identity"].get(name), value)
        for name, value in identity.items()
        if state["identity"].get(name) != value
    }
    if differing:
        listed = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in differing.items())
        raise StateError(f"{str(path)!r} is of a run with other settings ({listed}): use those{_ANEW}")
    RandomState.from_plain(state["random"][distributed.rank()]).set()
    return Position(**state["position"]), state
