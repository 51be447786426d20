"""Independent streams of random numbers for data, training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MODEL, DATA, TRAINING, EVALUATION, PASS = range(5)
"""Names of streams, mixed with a run's seed."""


@dataclass
class RandomState:
    """The state of torch's, numpy's and Python's generators."""

    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    numpy: Any
    python: Any

    @classmethod
    def current(cls) -> RandomState:
        """Return the current state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    @classmethod
    def seeded(cls, *seeds: int) -> RandomState:
        """Return the state after seeding all generators from several numbers; the current state is unchanged."""
        seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint32)[0])
        before = cls.current()
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():  # torch.manual_seed formats the stack for CUDA, which takes milliseconds
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)
        random.seed(seed)
        state = cls.current()
        before.set()
        return state

    def set(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def to_plain(self) -> dict[str, Any]:
        """Convert to tensors and plain values, which torch.load reads with weights_only=True."""
        name, keys, position, has_gauss, gauss = self.numpy
        version, internal, gauss_next = self.python
        return {
            "torch_cpu": self.torch_cpu,
            "torch_cuda": self.torch_cuda,
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, torch.tensor(internal, device="cpu"), gauss_next],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> RandomState:
        """Restore from the values of `to_plain`."""
        name, keys, *rest = plain["numpy"]
        version, internal, gauss_next = plain["python"]
        numpy = (name, keys.numpy().astype(np.uint32), *rest)
        return cls(plain["torch_cpu"], plain["torch_cuda"], numpy, (version, tuple(internal.tolist()), gauss_next))


@dataclass
class RandomStream:
    """A separate stream of random numbers: each `active` context continues where the last one ended."""

    state: RandomState

    @classmethod
    def seeded(cls, *seeds: int) -> RandomStream:
        """Create a stream seeded from several numbers."""
        return cls(RandomState.seeded(*seeds))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside the context; the generators are restored afterwards."""
        before = RandomState.current()
        self.state.set()
        try:
            yield
        finally:
            self.state = RandomState.current()
            before.set()
