"""Options of a conversion."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from cqr_compress.errors import SpecError, brief
from cqr_compress.option_fields import check_fields, documented, option
from cqr_compress.quantize.registry import METHODS, method_of

DEFAULT_BITS_PER_DIM = 2.0
MAX_SAMPLE_ROWS = 131_072
REFIT_ROUNDS = 5
EFFORTS = ("fast", "normal", "max")
HELPERS = ("hashed", "stored", "none")
TABLE_WEIGHTS = ("energy", "frequency", "rows", "equal", "task")
REST_DTYPES = ("float16", "bfloat16")
BUDGETS = ("ratio", "bits_per_dim", "max_error", "min_recall", "size", "file_ratio")
"""Options that set the budget, of which one can be given."""
CODEBOOK_DTYPES = ("int8", "float16", "bfloat16", "float32", "float64")


@documented
@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion: method, budget, and handling of rows."""

    method: str = option(
        "auto", "Compression method; methods are described below.", panel="Method", choices=tuple(METHODS)
    )
    ratio: float | None = option(
        None, "Bytes of each table before / after, all of its tensors counted.", panel="Budget", above=1
    )
    size: int | str | None = option(
        None,
        "Bytes of the whole file, such as 50MB, instead of a ratio for each table: tables are measured at several "
        "sizes, and get the bytes where they save most error. Small tables may stay dense.",
        panel="Budget",
        metavar="SIZE",
    )
    file_ratio: float | None = option(
        None,
        "Bytes of the model before / of the whole file after, instead of a size.",
        panel="Budget",
        above=1,
    )
    max_error: float | None = option(
        None,
        "Largest relative squared error of each table, instead of a ratio: the smallest size that has it.",
        panel="Budget",
        above=0,
        high=1,
    )
    min_recall: float | None = option(
        None,
        "Least recall@10 of each table, instead of a ratio: the smallest size that has it.",
        panel="Budget",
        above=0,
        high=0.9999,
    )
    weight: str | None = option(
        None,
        "Factor on the relative error of each table where tables share a budget, that of a size, or of a ratio, "
        "which is then that of all tables together: its sum of squares (energy), that of its lookups (frequency), "
        "its rows, 1, or how sensitive the loss of a task is to it.",
        panel="Budget",
        choices=TABLE_WEIGHTS,
        shown_default="with a size: task with a task, else energy",
    )
    bits_per_dim: float | None = option(
        None,
        "Bits stored for each value of a table, instead of a ratio.",
        panel="Budget",
        above=0,
        shown_default="2, a ratio of 16 for float32",
    )
    rotation: str | None = option(
        None, "Rotation of the rows before quantization.", panel="Method", choices=("opq", "pca")
    )
    rank: int | str | None = option(
        None,
        "Dimensions after the rotation, or auto to try several.",
        panel="Method",
        metavar="N|auto",
        shown_default="all; several are tried by method auto",
    )
    helper: str | None = option(
        None,
        "Helper codebook of cqr: the codes of hashed take no bytes, those of stored are part of the file.",
        panel="Method",
        choices=HELPERS,
        shown_default="the one with the least error at equal bytes",
    )
    num_columns: int | None = option(None, "Columns (subspaces) that rows are split into.", panel="Method", low=1)
    num_levels: int | None = option(None, "Levels: codewords summed in each column.", panel="Method", low=1)
    n_bits: int | None = option(None, "Bits of a code, 1 to 16.", panel="Method", low=1, high=16)
    window: int | None = option(
        None,
        "Bits of a state of a trellis: 8, 10 or 12; more are slower and reduce the error of rows of many bytes.",
        panel="Method",
        low=8,
        high=12,
        shown_default="8 to 12, by the sizes of the rows and the table",
    )
    max_tiers: int | None = option(
        None,
        "Maximum number of sizes of a trellis's rows: rows of more weight or a larger norm get more bytes.",
        panel="Method",
        low=1,
        high=4,
        shown_default="4",
    )
    codebook_dtype: str | None = option(
        None,
        "Dtype of codebooks and row scales in the file.",
        panel="Method",
        choices=CODEBOOK_DTYPES,
        shown_default="int8 for codebooks that auto chooses, else float16",
    )
    refine_rounds: int | None = option(
        None,
        "Rounds of joint least squares and re-encoding; more rounds are slower and reduce the error.",
        panel="Method",
        low=0,
        shown_default="0 for pq, 4 to 12 otherwise",
    )
    effort: str = option(
        "normal",
        "Effort of the search among layouts: number and size of the trial fits.",
        panel="Method",
        choices=EFFORTS,
    )
    max_sample: int = option(
        MAX_SAMPLE_ROWS, "Maximum number of rows that codebooks are fitted to.", panel="Method", low=1
    )
    seed: int = option(0, "Random seed.", panel="Method", low=0, high=2**31 - 1)
    min_rows: int = option(1024, "Leave tables with fewer rows dense, unless named.", panel="Selection", low=0)
    exact_rows: tuple[int, ...] = option(
        (),
        "Rows of every table to store verbatim, such as 0,1 or -1; all-zero rows are always exact.",
        panel="Selection",
        metavar="IDS",
    )
    prior: str = option(
        "tokenizer",
        "Weights of the rows of language tables, unless frequencies are given: estimated from the order of the "
        "tokens in tokenizer.json or vocab.txt beside the weights, or none.",
        panel="Selection",
        choices=("tokenizer", "none"),
    )
    rest_dtype: str | None = option(
        None,
        "Dtype in the file of all other floating-point tensors. Running statistics, and tensors with values that "
        "it cannot hold, keep theirs. Linear layers are not quantized: torchao and bitsandbytes do that.",
        panel="Budget",
        choices=REST_DTYPES,
        shown_default="that of the source",
    )
    nonfinite: str = option(
        "error",
        "Rows with NaN or infinity: stop with an error, or keep them verbatim.",
        panel="Selection",
        choices=("error", "keep"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.size, (int, str)) and not isinstance(self.size, bool):
            object.__setattr__(self, "size", size_in_bytes("size", self.size))
        elif self.size is not None:
            raise SpecError(f"size is {self.size!r}: give bytes, or a text such as 50MB")
        if not isinstance(self.exact_rows, (tuple, list)) or not all(map(_is_id, self.exact_rows)):
            raise SpecError(f"exact_rows is {str(self.exact_rows)[:100]!r}: give ids of rows, such as (0, 1)")
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            listed = " and ".join(f"{name} is {value!r}" for name, value in given.items())
            raise SpecError(f"{listed}: {'both' if len(given) == 2 else 'all'} set the budget, give one")
        if self.rank not in (None, "auto") and (not isinstance(self.rank, int) or self.rank < 1):
            raise SpecError(f"rank is {self.rank!r}: give a number of dimensions, or 'auto'")
        method_of(self.method).check(self)

    @property
    def has_file_budget(self) -> bool:
        """Whether the size of the whole file is given, as `size` or `file_ratio`."""
        return self.size is not None or self.file_ratio is not None

    @property
    def shares_budget(self) -> bool:
        """Whether tables share a budget: that of the file, or a ratio with a criterion that compares tables."""
        return self.has_file_budget or (self.weight is not None and self.ratio is not None)

    @property
    def has_budget(self) -> bool:
        """Whether a size is given, as `ratio` or `bits_per_dim`."""
        return self.ratio is not None or self.bits_per_dim is not None

    @property
    def has_quality_budget(self) -> bool:
        """Whether a quality of each table is given, as `max_error` or `min_recall`."""
        return self.max_error is not None or self.min_recall is not None

    def without_budget(self) -> ConvertOptions:
        """Return the options without a budget."""
        without: dict[str, Any] = dict.fromkeys((*BUDGETS, "weight"))
        return replace(self, **without)


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def size_in_bytes(name: str, size: int | str) -> int:
    """Parse a size such as 5GB, 500MB or 2GiB to bytes.

    Raises:
        SpecError: no size, or none above 0; the message has the option's `name`.
    """
    match = re.fullmatch(r"(?i)\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(size))
    if match is None or not 0 < float(match[1]) < _MAX_BYTES:
        raise SpecError(f"{name} is {brief(size)}: give a size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[(match[2] or "").lower()]))


_MAX_BYTES = 2**63
_UNITS = {"": 1} | {
    f"{letter}{binary}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for binary in ("", "i")
}
