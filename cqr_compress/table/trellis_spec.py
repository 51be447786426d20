"""Spec of trellis-coded tables: values selected by paths through a trellis, with a rate for each dimension."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from cqr_compress.errors import SpecError, brief
from cqr_compress.table.base_spec import FLOAT_DTYPES, TableSpec, TensorShape

MAX_RATE = 8
"""Maximum number of bits of one dimension."""
STORED_VALUES, SEEDED_VALUES = "stored", "seeded"
_MIN_WINDOW, _MAX_WINDOW = MAX_RATE, 16
"""A state holds all bits that a dimension adds."""
MAX_TIERS = 4
TIER_BLOCK = 128
"""Number of rows for each entry of `tier_starts`."""


@dataclass(frozen=True, kw_only=True)
class TrellisSpec(TableSpec):
    """row(i) = mean + gain(i) * (values[state(i, .)] * scale) @ rotation.

    The bits of a row are a ring (tail-biting); state(i, d) is the window of `window` bits that begins at bit
    rates[0] + ... + rates[d - 1]. Trellis-coded quantization (Marcellin & Fischer 1990, doi:10.1109/26.46532) on a
    bit-shift trellis (Tseng et al. 2024, arXiv:2406.11235), with rates by reverse water-filling (Cover & Thomas,
    "Elements of Information Theory", section 10.3.3). Rows of several tiers have more or less bits, with rates and
    scales of their tier.

    Attributes:
        tier_nbytes: bytes of the codes of a row of each tier, ascending: its rates add up to 8 times as many bits.
        tier_rows: number of rows of each tier; empty for one tier.
        window: L, bits of a state; there are 2**L values.
        rotation: "pca" if the values are multiplied by a matrix (rank, D), int8 in a file, else None.
        rank: P, number of coded dimensions before the rotation; None for D.
        gain_bits: 8 if each row has a factor, on a logarithmic scale; else 0.
        value_source: "stored", or "seeded" if the values are computed from the seed and take no bytes.
        codebook_dtype: dtype of `dim_scale`, `row_mean`, `state_values` and `gain_range`.
        seed: seed of the values and the fit.
    """

    kind: ClassVar[str] = "trellis"
    dtype_sources: ClassVar[dict[str, str]] = {"codebook_dtype": "row_mean"}
    tier_nbytes: tuple[int, ...]
    tier_rows: tuple[int, ...] = ()
    window: int = 10
    rotation: str | None = None
    rank: int | None = None
    gain_bits: int = 0
    value_source: str = SEEDED_VALUES
    codebook_dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _MIN_WINDOW <= self.window <= _MAX_WINDOW:
            raise SpecError(f"window is {self.window}: give {_MIN_WINDOW} to {_MAX_WINDOW} bits")
        if self.rotation not in (None, "pca"):
            raise SpecError(f"rotation {brief(self.rotation)} of a trellis is not 'pca'")
        if self.rank is not None and not (self.rotation and 1 <= self.rank < self.embedding_dim):
            raise SpecError(
                f"rank is {self.rank}: it requires a rotation, and has to be from 1 to {self.embedding_dim - 1}"
            )
        least, most = min(self.tier_nbytes, default=0), max(self.tier_nbytes, default=0)
        if not self.window <= 8 * least <= 8 * most <= MAX_RATE * self.width:
            raise SpecError(
                f"{least} to {most} bytes per row do not fit {self.width} dimensions of at most {MAX_RATE} bits "
                f"and a window of {self.window} bits"
            )
        self._check_tiers()
        if self.gain_bits not in (0, 8):
            raise SpecError(f"gain_bits is {self.gain_bits}: give 0 or 8")
        if self.value_source not in (STORED_VALUES, SEEDED_VALUES):
            raise SpecError(
                f"value_source {brief(self.value_source)} is neither {STORED_VALUES!r} nor {SEEDED_VALUES!r}"
            )
        if self.codebook_dtype not in FLOAT_DTYPES:
            raise SpecError(f"codebook_dtype {brief(self.codebook_dtype)} is not one of {', '.join(FLOAT_DTYPES)}")

    def _check_tiers(self) -> None:
        sizes, rows = self.tier_nbytes, self.tier_rows
        ascending = all(a < b for a, b in itertools.pairwise(sizes))
        counted = rows == () or min(rows) >= 0
        if not ascending or len(sizes) > MAX_TIERS or not counted or len(rows) != self.num_tiers * self.has_tiers:
            raise SpecError(
                f"tier_nbytes {brief(sizes)} and tier_rows {brief(rows)} do not form tiers: give one size, or up "
                f"to {MAX_TIERS} ascending sizes and the number of rows of each"
            )
        if self.has_tiers and sum(rows) != self.num_embeddings:
            raise SpecError(f"tier_rows add up to {sum(rows)} rows, not {self.num_embeddings}")

    @property
    def num_tiers(self) -> int:
        """T, number of tiers."""
        return len(self.tier_nbytes)

    @property
    def has_tiers(self) -> bool:
        """Whether there are several tiers."""
        return self.num_tiers > 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of the codes of a row; of the largest tier, where there are several."""
        return self.tier_nbytes[-1]

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the codes of all rows."""
        rows = self.tier_rows if self.has_tiers else (self.num_embeddings,)
        return sum(count * size for count, size in zip(rows, self.tier_nbytes, strict=True))

    def resized(self, num_embeddings: int) -> TrellisSpec:
        """Return the spec of a table with another number of rows, of which tiers have the same shares."""
        rows: tuple[int, ...] = ()
        if self.has_tiers:
            rows = tuple(count * num_embeddings // self.num_embeddings for count in self.tier_rows[1:])
            rows = (num_embeddings - sum(rows), *rows)
        return replace(self, num_embeddings=num_embeddings, tier_rows=rows, num_kept_rows=0, num_zero_rows=0)

    @property
    def width(self) -> int:
        """Dimensions of a row before the rotation: the rank, or D."""
        return self.embedding_dim if self.rank is None else self.rank

    @property
    def num_columns(self) -> int:
        """1: all dimensions of a row share one path."""
        return 1

    @property
    def num_levels(self) -> int:
        """1: each dimension is one value."""
        return 1

    @property
    def sub_dim(self) -> int:
        """Dimensions of the only column."""
        return self.width

    @property
    def num_values(self) -> int:
        """Number of values, one for each state: 2**window."""
        return 1 << self.window

    def body_shapes(self) -> dict[str, TensorShape]:
        """Return `codes` (N, row_nbytes), `dim_rates`, `dim_scale` (T, P), `row_mean` (D,) and optional tensors.

        These are `state_values` (2**window,), `rotation` (P, D), `row_gain` (N,) uint8 and `gain_range` (2,).
        Rows of several tiers follow each other in `codes` (codes_nbytes,); `row_tiers` (N / 4,) has 2 bits for
        each row, and `tier_starts` (N / TIER_BLOCK,) the first byte of every TIER_BLOCK-th row.
        """
        N, P, D, dtype = self.num_embeddings, self.width, self.embedding_dim, FLOAT_DTYPES[self.codebook_dtype]
        shapes = {
            "codes": TensorShape((N, self.row_nbytes), torch.uint8),
            "dim_rates": TensorShape((self.num_tiers, P), torch.uint8),
            "dim_scale": TensorShape((self.num_tiers, P), self._wide_dtype if self.rotation else dtype),
            "row_mean": TensorShape((D,), dtype),
        }
        if self.has_tiers:
            starts = torch.int32 if self.codes_nbytes < 2**31 else torch.int64
            shapes["codes"] = TensorShape((self.codes_nbytes,), torch.uint8)
            shapes["row_tiers"] = TensorShape((-(-N // 4),), torch.uint8)
            shapes["tier_starts"] = TensorShape((-(-N // TIER_BLOCK),), starts)
        if self.value_source == STORED_VALUES:
            shapes["state_values"] = TensorShape((self.num_values,), dtype)
        if self.rotation:
            shapes["rotation"] = TensorShape((P, D), self._wide_dtype)
        if self.gain_bits:
            shapes["row_gain"] = TensorShape((N,), torch.uint8)
            shapes["gain_range"] = TensorShape((2,), dtype)
        return shapes

    @property
    def _wide_dtype(self) -> torch.dtype:
        return torch.float64 if self.codebook_dtype == "float64" else torch.float32

    def file_shapes(self) -> dict[str, TensorShape]:
        """Return the tensors of a file, in which the rotation is int8."""
        shapes = self.tensor_shapes()
        if self.rotation:
            dtypes = {"rotation": torch.int8, "dim_scale": FLOAT_DTYPES[self.codebook_dtype]}
            shapes |= {short: TensorShape(shapes[short].shape, dtype) for short, dtype in dtypes.items()}
        return shapes

    @property
    def work_width(self) -> int:
        """Memory for decoding one row, codes included, in float32 values."""
        return self.embedding_dim + (10 if self.has_tiers else 6) * self.width + TIER_BLOCK * self.has_tiers

    @property
    def layout(self) -> str:
        """Short form of the layout: bytes per row, rotation and gain."""
        rotated = f" {self.rotation}" if self.rotation else ""
        rotated += f" rank {self.rank}" if self.rank else ""
        gain = " gain" if self.gain_bits else ""
        return f"{'/'.join(map(str, self.tier_nbytes))}B{rotated}{gain}"
