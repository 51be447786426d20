"""Which layouts a table can have, and how many bytes it may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cqr_compress.planning.scan import ScannedTable
from cqr_compress.quantize.options import DEFAULT_BITS_PER_DIM, Request
from cqr_compress.table.spec import (
    FLOAT_DTYPES,
    HASHED,
    QUOTIENT,
    REMAINDER,
    STORED,
    AnySpec,
    CodebookSpec,
    RowwiseSpec,
    dtype_name,
)

_HELPERS = {"random": (STORED, HASHED), "fitted": (STORED, STORED), "none": (STORED,)}
"""Code sources of a CQR table, by its helper."""


_AUTO_BITS = (4, 5, 6, 8)


_PQ_BITS = tuple(range(1, 13))


_MAX_LEVELS = 64


_MAX_ROTATED_DIM = 1024


_RANK_SIXTEENTHS = (2, 3, 4, 6, 8, 12)


def _base_fields(table: ScannedTable) -> dict[str, object]:
    N, D = table.shape
    return {
        "num_embeddings": N,
        "embedding_dim": D,
        "dtype": dtype_name(table.entry.dtype),
        "num_kept_rows": len(table.kept_ids),
        "num_zero_rows": len(table.zero_ids),
    }


def budget_bytes(table: ScannedTable, request: Request) -> float | None:
    """Bytes the table may take, or None where the layout alone decides."""
    N, D = table.shape
    if request.ratio is not None:
        return table.entry.nbytes / request.ratio
    if request.bits_per_dim is not None:
        return N * D * request.bits_per_dim / 8
    explicit = _is_explicit(request)
    return None if explicit else N * D * DEFAULT_BITS_PER_DIM / 8


def _is_explicit(request: Request) -> bool:
    """Whether the layout's size is fixed without a budget."""
    if request.method in ("int8", "int4"):
        return True
    columns, levels, bits = request.num_columns, request.num_levels, request.n_bits
    needed = {"pq": (columns, bits), "cqr": (columns, bits), "rq": (levels, bits), "prq": (columns, levels, bits)}
    return request.method in needed and None not in needed[request.method]


def _value_dtype(table: ScannedTable, request: Request) -> str:
    """The codebook dtype, or float32 where float16 cannot hold the table's magnitudes."""
    # rotated values and jointly solved codewords reach the norm of a row
    tiny = 0.0 < table.mean_square**0.5 < 1e-3
    if request.codebook_dtype == "float16" and (table.largest * table.shape[1] ** 0.5 > 3e4 or tiny):
        return "float32"
    return request.codebook_dtype


def layouts(request: Request, table: ScannedTable) -> Iterator[AnySpec]:
    """Every layout of the method that the table's shape and the user's fixed choices allow."""
    base = _base_fields(table)
    dtype = _value_dtype(table, request)
    if request.method in ("int8", "int4"):
        bits = int(request.method[3:])
        yield RowwiseSpec(method=request.method, n_bits=bits, scale_dtype=dtype, **base)  # type: ignore[arg-type]
    elif request.method == "cqr":
        helpers = [request.helper] if request.helper else list(_HELPERS)
        if request.helper is None and budget_bytes(table, request) is None:  # nothing to compare at equal bytes
            helpers = ["random"]
        for sources in (_HELPERS[helper] for helper in helpers):
            for spec in _additive_layouts(request, base, dtype, table, (len(sources),)):
                yield replace(spec, code_sources=sources)
    elif request.method in ("hash", "qr"):
        yield from _sketch_layouts(request, base, dtype, table)
    else:
        yield from _additive_layouts(request, base, dtype, table)


def _additive_layouts(
    request: Request, base: dict[str, object], dtype: str, table: ScannedTable, levels: tuple[int, ...] = ()
) -> Iterator[CodebookSpec]:
    N, D = table.shape
    auto = request.method == "auto"
    bits_choices = (
        (request.n_bits,) if request.n_bits else (_PQ_BITS if request.method in ("pq", "cqr") else _AUTO_BITS)
    )
    if levels or request.method == "pq":
        levels_choices = levels or (1,)
    else:
        levels_choices = (request.num_levels,) if request.num_levels else tuple(range(1, _MAX_LEVELS + 1))
    for n_bits in bits_choices:
        if 2**n_bits > max(16, N // 4) and not request.n_bits:
            continue
        for rotation, rank in _bases(request, D):
            width = rank or D
            for C in _columns(request, width):
                idle = width == C or (C == 1 and rank is None)
                if rotation and idle and (rotation != request.rotation or request.method in ("auto", "rq")):
                    continue
                for L in levels_choices:
                    if auto and not request.num_levels and (L > 4 if C > 1 else L > 16):
                        break
                    method = request.method if not auto else ("pq" if L == 1 else "rq" if C == 1 else "prq")
                    yield CodebookSpec(
                        method=method,
                        num_columns=C,
                        num_levels=L,
                        codebook_size=2**n_bits,
                        code_sources=(STORED,) * L,
                        codebook_dtype=dtype,
                        rotation=rotation,
                        rank=rank,
                        seed=request.seed,
                        **base,  # type: ignore[arg-type]
                    )


def _bases(request: Request, D: int) -> Iterator[tuple[str | None, int | None]]:
    """Rotations and their ranks; of those that are tried, only ranks that the user's columns divide."""
    auto = request.method == "auto"
    if request.rotation is None and request.rank is None:
        yield None, None
    rotation = request.rotation
    if rotation is None and auto and (D <= _MAX_ROTATED_DIM or request.rank is not None):
        rotation = "opq"
    if rotation is None:
        return
    if isinstance(request.rank, int):
        whole = None if request.method == "rq" else rotation, None
        yield (rotation, request.rank) if request.rank < D else whole
        return
    yield rotation, None
    if auto or request.rank == "auto":
        for part in sorted(_RANK_SIXTEENTHS, reverse=True):
            rank, rest = divmod(D * part, 16)
            if rest == 0 and rank % (request.num_columns or 1) == 0:
                yield rotation, rank


def _columns(request: Request, width: int) -> list[int]:
    """Into how many columns rows can be split."""
    if request.num_columns:
        return [request.num_columns]  # CodebookSpec says what is wrong with a bad one
    return [1] if request.method == "rq" else [c for c in range(1, width + 1) if width % c == 0]


def _sketch_layouts(
    request: Request, base: dict[str, object], dtype: str, table: ScannedTable
) -> Iterator[CodebookSpec]:
    """The one codebook size that uses up the budget."""
    N, D = table.shape
    sources = (HASHED,) if request.method == "hash" else (QUOTIENT, REMAINDER)
    C = request.num_columns or 1
    budget = budget_bytes(table, request) or 0.0
    smallest = 1 if request.method == "hash" else int((N - 1) ** 0.5) + 1

    def spec(size: int) -> CodebookSpec:
        return CodebookSpec(
            method=request.method,
            num_columns=C,
            num_levels=len(sources),
            codebook_size=size,
            code_sources=sources,
            codebook_dtype=dtype,
            seed=request.seed,
            **base,  # type: ignore[arg-type]
        )

    fixed = spec(smallest).nbytes - smallest * len(sources) * D * FLOAT_DTYPES[dtype].itemsize
    size = int((budget - fixed) // (len(sources) * D * FLOAT_DTYPES[dtype].itemsize))
    yield spec(max(smallest, min(size, N)))


def impossible(table: ScannedTable, request: Request, budget: float, smallest: AnySpec | None) -> str:
    """Say why no layout fits `budget` bytes, and what is possible."""
    N, D = table.shape
    asked = (
        f"ratio {request.ratio:g}"
        if request.ratio
        else f"{request.bits_per_dim or DEFAULT_BITS_PER_DIM:g} bits per dim"
    )
    if smallest is None:
        return f"no layout of {request.method} fits {table.entry.name!r} ({N} x {D})"
    return (
        f"cannot compress {table.entry.name!r} ({N} x {D} {dtype_name(table.entry.dtype)}, {table.entry.nbytes} "
        f"bytes) to {asked}, which is {int(budget)} bytes: the smallest layout of {request.method} "
        f"({smallest.layout}) takes {smallest.nbytes} bytes. Ask for at most "
        f"--ratio {_floor(table.entry.nbytes / smallest.nbytes)}, exclude the table, or choose another method."
    )


def _floor(ratio: float) -> str:
    return f"{int(ratio * 100) / 100:g}"
