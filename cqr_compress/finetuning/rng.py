"""Random numbers in streams: data, training and evaluation do not change what the others draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class RandomState:
    """The state of torch's, numpy's and Python's generators."""

    torch_cpu: torch.Tensor
    torch_cuda: list[torch.Tensor]
    numpy: Any
    python: Any

    @classmethod
    def current(cls) -> RandomState:
        """As it is."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    @classmethod
    def seeded(cls, *seeds: int) -> RandomState:
        """As it is after seeding everything with a mixture of numbers; the current state stays."""
        seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint32)[0])
        before = cls.current()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        state = cls.current()
        before.set()
        return state

    def set(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain values, which torch.load reads without running code."""
        name, keys, position, has_gauss, gauss = self.numpy
        version, internal, gauss_next = self.python
        return {
            "torch_cpu": self.torch_cpu,
            "torch_cuda": self.torch_cuda,
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, torch.tensor(internal), gauss_next],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> RandomState:
        """Back from `to_plain`."""
        name, keys, *rest = plain["numpy"]
        version, internal, gauss_next = plain["python"]
        numpy = (name, keys.numpy().astype(np.uint32), *rest)
        return cls(plain["torch_cpu"], plain["torch_cuda"], numpy, (version, tuple(internal.tolist()), gauss_next))


@dataclass
class RandomStream:
    """A stream of its own: what is drawn inside of `active` goes on where it ended the last time."""

    state: RandomState

    @classmethod
    def seeded(cls, *seeds: int) -> RandomStream:
        """Begin a stream."""
        return cls(RandomState.seeded(*seeds))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream; the generators are as they were afterwards."""
        before = RandomState.current()
        self.state.set()
        try:
            yield
        finally:
            self.state = RandomState.current()
            before.set()
