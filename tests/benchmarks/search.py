"""Choose weight decay on validation data, by the same search for every method.

`Search` trains with each weight decay of the grid, once for each key (a method at a size), and keeps what is best on
the validation part; further seeds of the key train with the weight decay that the first one chose. The number of
epochs is chosen within a training: the epoch that is best on the validation part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


@dataclass(frozen=True)
class Decay:
    """Weight decay of an optimizer.

    Attributes:
        value: 0 for none.
        decoupled: of AdamW, which multiplies weights by 1 - learning rate * value in each step; else a term of the
            gradient (L2) in Adam, which divides it by the gradient's size.
    """

    value: float
    decoupled: bool = False

    def optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return kind(parameters, lr=learning_rate, weight_decay=self.value, fused=True)

    def __str__(self) -> str:
        return f"{'AdamW' if self.decoupled else 'Adam'} {self.value:g}"

    @classmethod
    def parse(cls, text: str) -> Decay:
        """Read `0.1` (Adam) or `AdamW:0.1`."""
        kind, _, value = text.rpartition(":")
        return cls(float(value), decoupled=kind == "AdamW")


GRID = (
    *(Decay(value) for value in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
    *(Decay(value, decoupled=True) for value in (1e-2, 1e-1, 1.0)),
)
"""The decay of AdamW is multiplied by the learning rate, and so has larger values."""


@dataclass(frozen=True)
class Trained(Generic[Result]):
    """What one training gave.

    Attributes:
        score: on the validation part, larger is better.
        result: whatever the caller needs of it.
        when: the epoch or step that was best, in words.
    """

    score: float
    result: Result
    when: str


@dataclass
class Search:
    """The choices of one run of a benchmark, by key."""

    grid: tuple[Decay, ...] = GRID
    chosen: dict[Hashable, Decay] = field(default_factory=dict)

    def best(self, key: Hashable, train: Callable[[Decay], Trained[Result]]) -> Result:
        """Train with each weight decay, or with the one that is chosen already, and print what was chosen."""
        best: tuple[Decay, Trained[Result]] | None = None
        scores = []
        for decay in [self.chosen[key]] if key in self.chosen else self.grid:
            trained = train(decay)
            scores.append(f"{decay} {trained.score:.4f}")
            if best is None or not trained.score <= best[1].score:
                best = decay, trained
        assert best is not None
        self.chosen[key] = best[0]
        name = " ".join(map(str, key)) if isinstance(key, tuple) else key
        print(f"  {name}: {best[0]}, {best[1].when}; on validation: {', '.join(scores)}", flush=True)
        return best[1].result
