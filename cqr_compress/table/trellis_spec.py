"""Spec of trellis-coded tables: values selected by paths through a trellis, with a rate for each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cqr_compress.errors import SpecError, brief
from cqr_compress.table.base_spec import FLOAT_DTYPES, TableSpec, TensorShape

MAX_RATE = 8
"""Maximum number of bits of one dimension."""
STORED_VALUES, SEEDED_VALUES = "stored", "seeded"
_MIN_WINDOW, _MAX_WINDOW = MAX_RATE, 16
"""A state holds all bits that a dimension adds."""


@dataclass(frozen=True, kw_only=True)
class TrellisSpec(TableSpec):
    """row(i) = mean + gain(i) * (values[state(i, .)] * scale) @ rotation.

    The bits of a row are a ring (tail-biting); state(i, d) is the window of `window` bits that begins at bit
    rates[0] + ... + rates[d - 1]. Trellis-coded quantization (Marcellin & Fischer 1990, doi:10.1109/26.46532) on a
    bit-shift trellis (Tseng et al. 2024, arXiv:2406.11235), with rates by reverse water-filling (Cover & Thomas,
    "Elements of Information Theory", section 10.3.3).

    Attributes:
        row_nbytes: bytes of one row's codes: the rates of all dimensions add up to 8 * row_nbytes.
        window: L, bits of a state; there are 2**L values.
        rotation: "pca" if the values are multiplied by an int8 matrix (rank, D), else None.
        rank: P, number of coded dimensions before the rotation; None for D.
        gain_bits: 8 if each row has a factor, on a logarithmic scale; else 0.
        value_source: "stored", or "seeded" if the values are computed from the seed and take no bytes.
        codebook_dtype: dtype of `dim_scale`, `row_mean`, `state_values` and `gain_range`.
        seed: seed of the values and the fit.
    """

    kind: ClassVar[str] = "trellis"
    dtype_sources: ClassVar[dict[str, str]] = {"codebook_dtype": "dim_scale"}
    row_nbytes: int
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
        if not self.window <= 8 * self.row_nbytes <= MAX_RATE * self.width:
            raise SpecError(
                f"{self.row_nbytes} bytes per row do not fit {self.width} dimensions of at most {MAX_RATE} bits "
                f"and a window of {self.window} bits"
            )
        if self.gain_bits not in (0, 8):
            raise SpecError(f"gain_bits is {self.gain_bits}: give 0 or 8")
        if self.value_source not in (STORED_VALUES, SEEDED_VALUES):
            raise SpecError(
                f"value_source {brief(self.value_source)} is neither {STORED_VALUES!r} nor {SEEDED_VALUES!r}"
            )
        if self.codebook_dtype not in FLOAT_DTYPES:
            raise SpecError(f"codebook_dtype {brief(self.codebook_dtype)} is not one of {', '.join(FLOAT_DTYPES)}")

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
        """Return `codes` (N, row_nbytes), `dim_rates` and `dim_scale` (P,), `row_mean` (D,), and optional tensors.

        These are `state_values` (2**window,), `rotation` (P, D) int8, `row_gain` (N,) uint8 and `gain_range` (2,).
        """
        N, P, D, dtype = self.num_embeddings, self.width, self.embedding_dim, FLOAT_DTYPES[self.codebook_dtype]
        shapes = {
            "codes": TensorShape((N, self.row_nbytes), torch.uint8),
            "dim_rates": TensorShape((P,), torch.uint8),
            "dim_scale": TensorShape((P,), dtype),
            "row_mean": TensorShape((D,), dtype),
        }
        if self.value_source == STORED_VALUES:
            shapes["state_values"] = TensorShape((self.num_values,), dtype)
        if self.rotation:
            shapes["rotation"] = TensorShape((P, D), torch.int8)
        if self.gain_bits:
            shapes["row_gain"] = TensorShape((N,), torch.uint8)
            shapes["gain_range"] = TensorShape((2,), dtype)
        return shapes

    @property
    def work_width(self) -> int:
        """Memory for decoding one row, codes included, in float32 values."""
        return self.embedding_dim + 6 * self.width

    @property
    def layout(self) -> str:
        """Short form of the layout: bytes per row, rotation and gain."""
        rotated = f" {self.rotation}" if self.rotation else ""
        rotated += f" rank {self.rank}" if self.rank else ""
        gain = " gain" if self.gain_bits else ""
        return f"{self.row_nbytes}B{rotated}{gain}"
