"""Possible codebook layouts of a table, and its budget in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cqr_compress.quantize.base import TableFacts
from cqr_compress.quantize.options import DEFAULT_BITS_PER_DIM, ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.base_spec import dtype_name
from cqr_compress.table.spec import STORED, AnySpec, CodebookSpec

MAX_ROTATED_DIM = 1024
_RANK_SIXTEENTHS = (2, 3, 4, 6, 8, 12)


def budget_bytes(facts: TableFacts, options: ConvertOptions) -> float | None:
    """Compute the budget of a table in bytes; None if the options determine its size."""
    N, D = facts.shape
    if options.ratio is not None:
        return facts.nbytes / options.ratio
    if options.bits_per_dim is not None:
        return N * D * options.bits_per_dim / 8
    fixed = method_of(options.method).has_fixed_size(options)
    return None if fixed else N * D * DEFAULT_BITS_PER_DIM / 8


def table_fields(facts: TableFacts) -> dict[str, Any]:
    """Return the fields of a spec that the table itself determines."""
    N, D = facts.shape
    return {
        "num_embeddings": N,
        "embedding_dim": D,
        "dtype": dtype_name(facts.dtype),
        "num_kept_rows": facts.num_exact_rows,
        "num_zero_rows": facts.num_zero_rows,
    }


def value_dtype(facts: TableFacts, options: ConvertOptions, default: str = "float16") -> str:
    """Return the codebook dtype; float32 where the table's magnitudes exceed the range of float16.

    Args:
        facts: facts of the table.
        options: options of the conversion.
        default: dtype without a choice.
    """
    asked = options.codebook_dtype or default
    # rotated values and jointly solved codewords can be as large as the norm of a row
    tiny = 0.0 < facts.mean_square**0.5 < 1e-3
    if asked in ("float16", "int8") and (facts.largest * facts.shape[1] ** 0.5 > 3e4 or tiny):
        return "float32"
    return asked


def codebook_layouts(
    options: ConvertOptions,
    facts: TableFacts,
    *,
    n_bits: Sequence[int],
    num_levels: Sequence[int],
    single_column: bool = False,
    search_rotations: bool = False,
    default_dtype: str = "float16",
) -> Iterator[CodebookSpec]:
    """Iterate over layouts whose codes are all stored.

    Args:
        options: options of the conversion; those that are set restrict the layouts.
        facts: facts of the table.
        n_bits: bits of a code to try, if `options.n_bits` is None.
        num_levels: numbers of levels to try.
        single_column: do not split rows into columns; a rotation is then useful only with a reduced rank.
        default_dtype: dtype of codebooks, if the options have none.
        search_rotations: try rotations and several ranks, if the options do not set them.
    """
    N, D = facts.shape
    for bits in (options.n_bits,) if options.n_bits else n_bits:
        if 2**bits > max(16, N // 4) and not options.n_bits:
            continue
        for rotation, rank in _rotations(options, D, single_column, search_rotations):
            width = rank or D
            for C in _columns(options, width, single_column):
                idle = width == C or (C == 1 and rank is None)  # the codebooks can absorb the rotation
                if rotation and idle and (rotation != options.rotation or single_column or search_rotations):
                    continue
                for L in num_levels:
                    yield CodebookSpec(
                        method=options.method,
                        num_columns=C,
                        num_levels=L,
                        codebook_size=2**bits,
                        code_sources=(STORED,) * L,
                        codebook_dtype=value_dtype(facts, options, default_dtype),
                        rotation=rotation,
                        rank=rank,
                        seed=options.seed,
                        **table_fields(facts),
                    )


def _rotations(
    options: ConvertOptions, D: int, single_column: bool, search: bool
) -> Iterator[tuple[str | None, int | None]]:
    """Iterate over rotations and ranks; ranks that are tried are multiples of `options.num_columns`."""
    rotation = options.rotation
    if rotation is None and options.rank is None:
        yield None, None
    if rotation is None and search and (D <= MAX_ROTATED_DIM or options.rank is not None):
        rotation = "opq"
    if rotation is None:
        return
    if isinstance(options.rank, int):
        whole = None if single_column else rotation, None
        yield (rotation, options.rank) if options.rank < D else whole
        return
    yield rotation, None
    if search or options.rank == "auto":
        for part in sorted(_RANK_SIXTEENTHS, reverse=True):
            rank, rest = divmod(D * part, 16)
            if rest == 0 and rank % (options.num_columns or 1) == 0:
                yield rotation, rank


def _columns(options: ConvertOptions, width: int, single_column: bool) -> list[int]:
    """List the possible numbers of columns."""
    if options.num_columns:
        return [options.num_columns]  # CodebookSpec validates it
    return [1] if single_column else [c for c in range(1, width + 1) if width % c == 0]


def over_budget(facts: TableFacts, options: ConvertOptions, budget: float, smallest: AnySpec | None) -> str:
    """Compose the message that no layout fits `budget` bytes, with the largest possible ratio."""
    N, D = facts.shape
    asked = (
        f"ratio {options.ratio:g}"
        if options.ratio
        else f"{options.bits_per_dim or DEFAULT_BITS_PER_DIM:g} bits per dim"
    )
    if smallest is None:
        return f"no layout of {options.method} fits {facts.name!r} ({N} x {D})"
    return (
        f"cannot compress {facts.name!r} ({N} x {D} {dtype_name(facts.dtype)}, {facts.nbytes} bytes) to {asked}, "
        f"which is {int(budget)} bytes: the smallest layout of {options.method} ({smallest.layout}) takes "
        f"{smallest.nbytes} bytes. Pass at most --ratio {_floor(facts.nbytes / smallest.nbytes)}, exclude the "
        "table, or choose another method."
    )


def _floor(ratio: float) -> str:
    return f"{int(ratio * 100) / 100:g}"
