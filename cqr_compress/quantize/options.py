"""What a user asks of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from cqr_compress.errors import SpecError
from cqr_compress.quantize.registry import METHODS
from cqr_compress.table.spec import FLOAT_DTYPES

DEFAULT_BITS_PER_DIM = 2.0


DEFAULT_MIN_ROWS = 1024
MAX_SAMPLE_ROWS = 131_072


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks of a conversion; the command line's defaults are these.

    Attributes:
        method: a name of METHODS, or "auto".
        ratio: bytes of a table before / after, all its stored tensors counted.
        bits_per_dim: the same as a size: bits stored for each value of the table.
        num_columns: C, fixed instead of chosen.
        num_levels: L, fixed instead of chosen.
        n_bits: bits of a code, fixed instead of chosen.
        rotation: "opq" or "pca" for pq and prq, and for rq with a rank.
        rank: dimensions that a rotation keeps, fewer than D; "auto" to try several; None for all of them, and for
            "auto" where the method is.
        helper: of cqr: "random" (hashed, no bytes for codes), "fitted" (stored codes) or "none"; if None, the one
            with the least error at equal bytes, or "random" where num_columns and n_bits set the size.
        codebook_dtype: dtype of codebooks and row scales.
        min_rows: tables with fewer rows stay dense.
        keep_rows: ids of rows stored verbatim in every table.
        nonfinite: "error" or "keep" for rows with NaN or infinity.
        rounds: joint refinements of the codebooks; None for the method's own.
        max_sample: rows that fits are made on, at most.
        seed: of every random choice.
    """

    method: str = "auto"
    ratio: float | None = None
    bits_per_dim: float | None = None
    num_columns: int | None = None
    num_levels: int | None = None
    n_bits: int | None = None
    rotation: str | None = None
    rank: int | str | None = None
    helper: str | None = None
    codebook_dtype: str = "float16"
    min_rows: int = DEFAULT_MIN_ROWS
    keep_rows: tuple[int, ...] = ()
    nonfinite: str = "error"
    rounds: int | None = None
    max_sample: int = MAX_SAMPLE_ROWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method != "auto" and self.method not in METHODS:
            raise SpecError(f"method {self.method!r} is not one of auto, {', '.join(METHODS)}")
        if self.ratio is not None and self.bits_per_dim is not None:
            raise SpecError("ratio and bits_per_dim say the same thing twice: give one of them")
        if self.ratio is not None and self.ratio <= 1:
            raise SpecError(f"ratio is {self.ratio}: give more than 1")
        for name in ("ratio", "bits_per_dim"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SpecError(f"{name} is {value}: give a positive number")
        for name, low, high in (("num_columns", 1, None), ("num_levels", 1, None), ("n_bits", 1, 16)):
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                raise SpecError(f"{name} is {value}: give {low} to {high}" if high else f"{name} is {value}")
        if self.codebook_dtype not in FLOAT_DTYPES:
            raise SpecError(f"codebook_dtype {self.codebook_dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
        if self.nonfinite not in ("error", "keep"):
            raise SpecError(f"nonfinite is {self.nonfinite!r}: give 'error' or 'keep'")
        if self.rotation not in (None, "opq", "pca"):
            raise SpecError(f"rotation {self.rotation!r} is neither 'opq' nor 'pca'")
        if self.helper not in (None, "random", "fitted", "none"):
            raise SpecError(f"helper {self.helper!r} is not one of random, fitted, none")
        if self.helper and self.method != "cqr":
            raise SpecError(f"method {self.method!r} has no helper: it goes with cqr")
        kind = "additive" if self.method == "auto" else METHODS[self.method].kind
        if self.rank is not None and self.rank != "auto" and (not isinstance(self.rank, int) or self.rank < 1):
            raise SpecError(f"rank is {self.rank!r}: give a number of dimensions, or 'auto'")
        if self.rank is not None and self.method != "auto" and not self.rotation:
            raise SpecError("rank goes with a rotation: 'opq' or 'pca'")
        takes = ("auto", "pq", "prq") if self.rank is None else ("auto", "pq", "prq", "rq")
        if self.rotation and self.method not in takes:
            raise SpecError(f"method {self.method!r} takes no rotation: it goes with pq and prq")
        if kind in ("sketch", "rowwise") and (self.n_bits or self.num_levels):
            raise SpecError(f"method {self.method!r} takes neither n_bits nor num_levels")
        if kind == "cqr" and self.num_levels:
            raise SpecError("cqr takes no num_levels: its helper is the second level")
        if kind == "rowwise" and self.num_columns:
            raise SpecError(f"method {self.method!r} takes no num_columns")
        if self.method == "pq" and self.num_levels not in (None, 1):
            raise SpecError(f"pq has one level, not {self.num_levels}; prq has more")
        if self.method == "rq" and self.num_columns not in (None, 1):
            raise SpecError(f"rq has one column, not {self.num_columns}; prq has more")
        if not 0 <= self.seed < 2**31:
            raise SpecError(f"seed is {self.seed}: give 0 to {2**31 - 1}")
        if self.min_rows < 0 or self.max_sample < 1 or (self.rounds is not None and self.rounds < 0):
            raise SpecError("min_rows and rounds are at least 0, max_sample at least 1")

    @property
    def has_budget(self) -> bool:
        """Whether the user named a size."""
        return self.ratio is not None or self.bits_per_dim is not None
