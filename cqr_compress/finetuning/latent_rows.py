"""Train the codes of tables: floating-point rows behind them are trained, and encoded again every few steps.

The model computes with the decoded rows, and their gradient moves the rows behind the codes as if encoding were
the identity (straight-through estimation, Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress import distributed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.planning.scan import source_rows
from cqr_compress.progress import NoProgress
from cqr_compress.quantize.additive import AdditiveQuantizer
from cqr_compress.quantize.base import FitEffort, Quantizer
from cqr_compress.quantize.trellis_fit import TrellisQuantizer
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.decode import PER_ROW, TIERS, gather_rows, write_rows
from cqr_compress.table.spec import STORED, AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.table import CompressedTable

ENCODE_EVERY = 10
"""Optimizer steps after which rows that were used are encoded again."""
_EFFORT = FitEffort(refine_rounds=1, restarts=1)
MAX_VALUES = 2**28
"""Values of the largest table whose rows are trained: with the optimizer's state they take 16 bytes each."""


def has_trainable_codes(spec: AnySpec) -> bool:
    """Return whether the codes of a table can be trained: all are stored, and the rows fit into memory."""
    stored = isinstance(spec, CodebookSpec) and set(spec.code_sources) == {STORED}
    return (stored or isinstance(spec, TrellisSpec)) and spec.num_embeddings * spec.embedding_dim <= MAX_VALUES


@dataclass(eq=False)
class LatentRows:
    """The rows behind the codes of one layer; an observer of the layer.

    Attributes:
        layer: the layer, whose codes are replaced.
        start: (N, D) float32, the rows before training.
        unit: size of a step of `moved`: the root mean square of the rows.
        moved: (N, D) parameter, by which the rows have moved in these units, at first 0.
        used: (N,) bool, rows that were used since they were encoded.
    """

    layer: TableLayer
    start: Tensor
    unit: float
    moved: nn.Parameter
    used: Tensor

    @classmethod
    def begin(cls, layer: TableLayer, rows: Tensor | None) -> LatentRows:
        """Start from rows (N, D), or from the decoded ones if None, and observe the layer."""
        start = (layer.decode() if rows is None else rows).detach().to(layer.device, torch.float32, copy=True)
        moved = nn.Parameter(torch.zeros_like(start))
        used = torch.zeros(len(start), dtype=torch.bool, device=layer.device)
        latent = cls(layer, start, _root_mean_square(start), moved, used)
        layer.observer = latent
        return latent

    def on_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return rows (B, D) whose gradient moves the rows behind the codes, too."""
        if not torch.is_grad_enabled():
            return rows
        self.used[ids] = True
        moved = F.embedding(ids, self.moved) * self.unit
        return rows + (moved - moved.detach()).to(rows.dtype)

    def on_matmul(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Return products of queries (..., D) with such rows (V, D)."""
        return h @ self.on_lookup(ids, rows).T

    @torch.no_grad()
    def encode(self) -> float:
        """Encode the rows that were used in any process; return the share of those whose codes changed."""
        layer, used = self.layer, self.used.to(torch.int32)
        distributed.all_reduce_(used)
        ids = used.nonzero().flatten()
        if not len(ids):
            return 0.0
        tensors = {short: t.detach() for short, t in layer.table_tensors().items()}
        held = gather_rows(layer.spec, tensors, ids)
        quantizer = quantizer_of(layer.spec, {short: t.cpu() for short, t in held.items()})
        parts = [
            quantizer.encode((self.start[ids[a:b]] + self.unit * self.moved[ids[a:b]]).cpu(), a)
            for a, b in row_blocks(len(ids), layer.spec.work_width)
        ]
        encoded = {short: torch.cat([part[short] for part in parts]) for short in parts[0]}
        write_rows(layer.spec, tensors, ids, encoded)
        for short in PER_ROW & tensors.keys():
            distributed.broadcast_(tensors[short])
        self.used.zero_()
        return float((encoded["codes"] != held["codes"].cpu()).any(1).float().mean())

    def end(self) -> None:
        """Leave the codes as they are from now on."""
        self.used.zero_()
        self.layer.observer = None

    def state(self) -> dict[str, Tensor]:
        """Return the state, from which a resumed run goes on."""
        ended = torch.tensor(self.layer.observer is not self, device="cpu")
        return {
            "start": self.start,
            "moved": self.moved.detach().clone(),
            "used": self.used.clone(),
            "ended": ended,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`."""
        self.start.copy_(state["start"])
        self.unit = _root_mean_square(self.start)
        self.moved.copy_(state["moved"])
        self.used.copy_(state["used"])
        if state["ended"]:
            self.end()


@dataclass(frozen=True)
class TrainedCodes:
    """The rows behind the codes of all tables that are trained, by name; none where codes are not trained."""

    latents: Mapping[str, LatentRows]

    @classmethod
    def begin(cls, tables: Mapping[str, TableLayer], original: Path | None) -> TrainedCodes:
        """Start from the rows of the original, or from the decoded ones without it."""
        rows = {
            name: None if original is None else original_rows(original, name, layer.table())
            for name, layer in tables.items()
        }
        return cls({name: LatentRows.begin(layer, rows[name]) for name, layer in tables.items()})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer."""
        return [latent.moved for latent in self.latents.values()]

    def encode(self) -> None:
        """Encode the rows that were used."""
        for latent in self.latents.values():
            latent.encode()

    def end(self) -> None:
        """Leave the codes as they are from now on."""
        for latent in self.latents.values():
            latent.end()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state, from which a resumed run goes on."""
        return {name: latent.state() for name, latent in self.latents.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore `state`."""
        for name, latent in self.latents.items():
            latent.load(state[name])


def _root_mean_square(rows: Tensor) -> float:
    return float(rows.square().mean().sqrt().clamp_min(1e-12))


def quantizer_of(spec: AnySpec, gathered: Mapping[str, Tensor]) -> Quantizer:
    """Return a quantizer with the codebooks of a table.

    Args:
        spec: the table's spec, with stored codes only.
        gathered: tensors of the table, from `gather_rows` of the rows that it will encode, on the CPU.
    """
    rotation = gathered.get("rotation")
    directions = None if rotation is None else torch.linalg.pinv(rotation.float())
    if isinstance(spec, TrellisSpec):
        tiers = gathered.get(TIERS)
        tiers = None if tiers is None else tiers.to(torch.uint8)
        return TrellisQuantizer(spec, dict(gathered), directions, gathered["dim_scale"].float(), tiers)
    assert isinstance(spec, CodebookSpec)
    return AdditiveQuantizer(spec, gathered["codebooks"], None if directions is None else directions.T, _EFFORT)


def original_rows(original: Path, name: str, table: CompressedTable) -> Tensor:
    """Read the dense rows (N, D) that a table was made of.

    Raises:
        TableNotFoundError: the original lacks the table.
        ShapeError: it has another shape in the original.
    """
    with open_checkpoint(original) as checkpoint:
        scan = source_rows(checkpoint, name, table, None, NoProgress())
        return torch.cat([rows for _, rows in scan.blocks()])
