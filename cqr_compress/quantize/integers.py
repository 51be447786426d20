"""Row-wise integer quantization, with a scale and an offset for each row, as in FBGEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.quantize.base import FitEffort, TableFacts, TableRows, refuse_int8, refuse_others
from cqr_compress.quantize.layouts import table_fields, value_dtype
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.base_spec import FLOAT_DTYPES
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.spec import AnySpec, RowwiseSpec

_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Fractions of a row's range that are tried; clipping the range makes the quantization step smaller."""


@dataclass(frozen=True)
class RowwiseQuantizer:
    """Quantizer of rows, without shared tensors."""

    spec: RowwiseSpec

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return no tensors: all of them have one entry for each row."""
        return {}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows, each with the clipping range of _CLIPS that minimizes its squared error.

        Args:
            rows: (B, D) float32.
            first_row: unused; the codes of a row depend on its values only.

        Returns:
            `codes` (B, width) uint8, `row_scale` and `row_offset` (B,) in the spec's dtype.
        """
        low, high = rows.amin(1), rows.amax(1)
        middle, half = (high + low) / 2, (high - low) / 2
        best = self._quantize(rows, middle - half, half)
        for clip in _CLIPS[1:]:
            trial = self._quantize(rows, middle - half * clip, half * clip)
            better = trial[3] < best[3]
            best = tuple(
                torch.where(better if a.ndim == 1 else better[:, None], a, b)
                for a, b in zip(trial, best, strict=True)
            )
        codes, scale, offset, _ = best
        return {"codes": pack_codes(codes, self.spec.n_bits), "row_scale": scale, "row_offset": offset}

    def _quantize(self, rows: Tensor, low: Tensor, half: Tensor) -> tuple[Tensor, ...]:
        """Return codes, scale, offset and squared error of each row for ranges [low, low + 2 * half]."""
        levels = 2**self.spec.n_bits - 1
        dtype = FLOAT_DTYPES[self.spec.scale_dtype]
        scale, offset = (2 * half / levels).to(dtype), low.to(dtype)
        step = scale.float()[:, None]
        codes = torch.where(step > 0, (rows - offset.float()[:, None]) / step, 0.0)
        codes = codes.round_().clamp_(0, levels)
        error = (offset.float()[:, None] + step * codes - rows).square().sum(1)
        return codes.to(torch.int32), scale, offset, error


@dataclass(frozen=True)
class IntegerMethod:
    """Row-wise integer quantization.

    Attributes:
        n_bits: bits of each value.
    """

    n_bits: int

    def check(self, options: ConvertOptions) -> None:
        """Refuse all layout options."""
        refuse_others(options, ())
        refuse_int8(options)

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return True: the shape of a table determines its size."""
        return True

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over the only layout."""
        yield RowwiseSpec(
            method=options.method,
            n_bits=self.n_bits,
            scale_dtype=value_dtype(facts, options),
            **table_fields(facts),
        )

    def makes(self, spec: AnySpec) -> bool:
        """Return whether the spec has rows of integers of these bits."""
        return isinstance(spec, RowwiseSpec) and spec.n_bits == self.n_bits

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the default effort, which has no effect."""
        return FitEffort()

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return 1: `fit` calls `step` once."""
        return 1

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> RowwiseQuantizer:
        """Return a quantizer; nothing is fitted, because each row is encoded by itself."""
        assert isinstance(spec, RowwiseSpec)
        step()
        return RowwiseQuantizer(spec)


INT8, INT4 = IntegerMethod(8), IntegerMethod(4)
