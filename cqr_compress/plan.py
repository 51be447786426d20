"""Choose a spec for each table: from what the user asked, and by measuring on a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cqr_compress.errors import BudgetError, SpecError, TableRefusedError
from cqr_compress.quantize import METHODS, Effort, effort_for, fit
from cqr_compress.rows import MAX_SAMPLE_ROWS, ScannedTable
from cqr_compress.spec import (
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
from cqr_compress.table import decode_rows

DEFAULT_BITS_PER_DIM = 2.0
DEFAULT_MIN_ROWS = 1024
_AUTO_BITS = (4, 5, 6, 8)
_PQ_BITS = tuple(range(1, 13))
_MAX_LEVELS = 64
_SMALLEST_VALUE, _LARGEST_VALUE = 1e-15, 1e15
_MAX_ROTATED_DIM = 1024
_FIRST_TRIAL_ROWS = 4096
_SECOND_TRIAL_ROWS = 16384
_FINALISTS = 4
_BRIEF = Effort(kmeans_iterations=4, rounds=0, beam=1)


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
        rotation: "opq" or "pca" for pq and prq.
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
        kind = "additive" if self.method == "auto" else METHODS[self.method].kind
        if self.rotation and self.method not in ("auto", "pq", "prq"):
            raise SpecError(f"method {self.method!r} takes no rotation: it goes with pq and prq")
        if kind != "additive" and (self.n_bits or self.num_levels):
            raise SpecError(f"method {self.method!r} takes neither n_bits nor num_levels")
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


@dataclass(frozen=True)
class TablePlan:
    """What will be done with one table.

    Attributes:
        name: of the source tensor.
        spec: how it is compressed, or None if it stays dense.
        reason: why this layout, or why it stays dense.
        effort: work for the final fit.
    """

    name: str
    spec: AnySpec | None
    reason: str
    effort: Effort = field(default_factory=Effort)


def plan_table(table: ScannedTable, request: Request, step: Callable[[], None] = lambda: None) -> TablePlan:
    """Choose the spec of one table, by trial fits on its sample where several layouts are possible.

    Args:
        table: from `scan_table`.
        request: what the user asked.
        step: called after each trial.

    Raises:
        BudgetError: no layout of the method fits; the message says what does.
        SpecError: an explicit layout that the table's shape cannot have.
        TableRefusedError: values whose squares float32 cannot hold.
    """
    N, _ = table.shape
    name = table.entry.name
    if request.min_rows > N:
        return TablePlan(name, None, f"{N} rows are fewer than min_rows = {request.min_rows}")
    _check_magnitude(table)
    base = _base_fields(table, request)
    budget = _budget(table, request)
    specs = list(_layouts(request, base, table))
    smallest = min(specs, key=lambda spec: spec.nbytes, default=None)
    if smallest is not None and smallest.nbytes >= smallest.dense_nbytes:
        return TablePlan(name, None, f"the smallest layout takes {smallest.nbytes} bytes, no fewer than it has")
    limit = table.entry.nbytes - 1 if budget is None else min(budget, table.entry.nbytes - 1)
    fitting = [spec for spec in specs if spec.nbytes <= limit]
    if not fitting:
        message = _impossible(table, request, limit, smallest)
        if request.has_budget or smallest is None:
            raise BudgetError(message)
        return TablePlan(name, None, message)
    largest = _largest_of_each(fitting)
    if len(largest) == 1:
        spec, reason = largest[0], "the one layout that was asked for"
    else:
        spec, reason = _choose(table, largest, request, step)
    effort = effort_for(spec, request.rounds) if isinstance(spec, CodebookSpec) else Effort()
    if request.method == "auto" and request.rounds is None:
        effort = replace(effort, rounds=max(effort.rounds, 8))
    return TablePlan(name, spec, reason, effort)


def _check_magnitude(table: ScannedTable) -> None:
    name = table.entry.name
    if table.largest and not _SMALLEST_VALUE < table.largest < _LARGEST_VALUE:
        raise TableRefusedError(
            f"the largest magnitude in {name!r} is {table.largest:.3g}: squared distances leave the "
            f"range of float32. Pass --exclude {name!r}."
        )


def _base_fields(table: ScannedTable, request: Request) -> dict[str, object]:
    N, D = table.shape
    return {
        "num_embeddings": N,
        "embedding_dim": D,
        "dtype": dtype_name(table.entry.dtype),
        "num_kept_rows": len(table.kept_ids),
        "num_zero_rows": len(table.zero_ids),
    }


def _budget(table: ScannedTable, request: Request) -> float | None:
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
    needed = {"pq": (columns, bits), "rq": (levels, bits), "prq": (columns, levels, bits)}
    return request.method in needed and None not in needed[request.method]


def _value_dtype(table: ScannedTable, request: Request) -> str:
    """The codebook dtype, or float32 where float16 cannot hold the table's magnitudes."""
    # rotated values and jointly solved codewords reach the norm of a row
    tiny = 0.0 < table.mean_square**0.5 < 1e-3
    if request.codebook_dtype == "float16" and (table.largest * table.shape[1] ** 0.5 > 3e4 or tiny):
        return "float32"
    return request.codebook_dtype


def _layouts(request: Request, base: dict[str, object], table: ScannedTable) -> Iterator[AnySpec]:
    """Every layout of the method that the table's shape and the user's fixed choices allow."""
    dtype = _value_dtype(table, request)
    if request.method in ("int8", "int4"):
        bits = int(request.method[3:])
        yield RowwiseSpec(method=request.method, n_bits=bits, scale_dtype=dtype, **base)  # type: ignore[arg-type]
    elif request.method in ("hash", "qr"):
        yield from _sketch_layouts(request, base, dtype, table)
    else:
        yield from _additive_layouts(request, base, dtype, table)


def _additive_layouts(
    request: Request, base: dict[str, object], dtype: str, table: ScannedTable
) -> Iterator[CodebookSpec]:
    N, D = table.shape
    auto = request.method == "auto"
    all_columns = [c for c in range(1, D + 1) if D % c == 0]
    if request.num_columns:
        all_columns = [request.num_columns]  # CodebookSpec says what is wrong with a bad one
    elif request.method == "rq":
        all_columns = [1]
    bits_choices = (
        (request.n_bits,) if request.n_bits else (_AUTO_BITS if auto or request.method != "pq" else _PQ_BITS)
    )
    rotations: tuple[str | None, ...] = (request.rotation,)
    if auto and request.rotation is None and D <= _MAX_ROTATED_DIM:
        rotations = (None, "opq")
    if request.method == "pq":
        levels_choices: tuple[int, ...] = (1,)
    else:
        levels_choices = (request.num_levels,) if request.num_levels else tuple(range(1, _MAX_LEVELS + 1))
    for n_bits in bits_choices:
        if 2**n_bits > max(16, N // 4) and not request.n_bits:
            continue
        for rotation in rotations:
            for C in all_columns:
                if rotation and (C == 1 or C == D) and rotation != request.rotation:
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
                        seed=request.seed,
                        **base,  # type: ignore[arg-type]
                    )


def _sketch_layouts(
    request: Request, base: dict[str, object], dtype: str, table: ScannedTable
) -> Iterator[CodebookSpec]:
    """The one codebook size that uses up the budget."""
    N, D = table.shape
    sources = (HASHED,) if request.method == "hash" else (QUOTIENT, REMAINDER)
    C = request.num_columns or 1
    budget = _budget(table, request) or 0.0
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


def _largest_of_each(specs: list[AnySpec]) -> list[AnySpec]:
    """Of layouts that differ in their levels alone, keep the one with most levels; drop small ones.

    A layout that uses less than 80% of the bytes of the largest is not worth a trial.
    """
    best: dict[tuple[object, ...], AnySpec] = {}
    for spec in specs:
        key: tuple[object, ...] = (spec.method,)
        if isinstance(spec, CodebookSpec):
            key = (spec.num_columns, spec.codebook_size, spec.rotation)
        if key not in best or spec.nbytes > best[key].nbytes:
            best[key] = spec
    most = max(spec.nbytes for spec in best.values())
    return [spec for spec in best.values() if spec.nbytes >= 0.8 * most]


def _choose(
    table: ScannedTable, specs: list[AnySpec], request: Request, step: Callable[[], None]
) -> tuple[AnySpec, str]:
    """Try all layouts briefly, the best again with more rows and work (successive halving)."""
    errors = []
    for spec in specs:
        pca = replace(spec, rotation="pca") if isinstance(spec, CodebookSpec) and spec.rotation else spec
        errors.append((estimate_error(table, pca, _BRIEF, _FIRST_TRIAL_ROWS), spec))
        step()
    errors.sort(key=lambda pair: pair[0])
    finalists = [spec for _, spec in errors[:_FINALISTS]]
    longer = []
    for spec in finalists:
        rounds = 4 if isinstance(spec, CodebookSpec) and spec.rotation == "opq" else 1
        effort = Effort(
            kmeans_iterations=10, rounds=rounds if request.rounds is None else request.rounds, restarts=1
        )
        longer.append((estimate_error(table, spec, effort, _SECOND_TRIAL_ROWS), spec))
        step()
    error, best = min(longer, key=lambda pair: pair[0])
    return best, f"least error on a sample ({error:.4f} relative) of {len(specs)} layouts that fit"


def estimate_error(table: ScannedTable, spec: AnySpec, effort: Effort, num_rows: int) -> float:
    """Estimate the relative squared error of a layout fitted to the whole table.

    With fewer rows than the table's the error on the fitted rows is too good and that on other rows too bad,
    by about the same amount, which shrinks as 1 / rows: the estimate is interpolated to the table's N.

    Args:
        table: the scanned table.
        spec: the layout.
        effort: of the trial fit.
        num_rows: rows to fit on, at most.
    """
    N, _ = table.shape
    generator = torch.Generator().manual_seed(spec.num_embeddings)
    order = torch.randperm(len(table.sample), generator=generator)
    fitted = table.sample[order[:num_rows]]
    other = table.sample[order[num_rows : num_rows + num_rows // 2]]
    rows = _SampleRows(fitted)
    small = replace(spec, num_embeddings=max(len(fitted), 1), num_kept_rows=0, num_zero_rows=0)
    quantizer = fit(rows, small, effort)

    def error(part: Tensor) -> float:
        body = {**quantizer.shared_tensors(), **quantizer.encode(part, 0)}
        decoded = decode_rows(small, body, torch.arange(len(part)))
        return float((decoded - part).square().sum() / part.square().sum().clamp_min(1e-30))

    inside = error(fitted)
    if len(other) == 0:
        return inside
    outside = error(other)
    return (inside + outside) / 2 - (outside - inside) / 2 * min(1.0, len(fitted) / N)


def estimate_ratio(table: ScannedTable, request: Request) -> float:
    """Estimate quickly what a request would cost: one brief fit of its likeliest layout.

    Returns:
        Relative squared error.

    Raises:
        BudgetError: no layout fits.
    """
    _check_magnitude(table)
    base, budget = _base_fields(table, request), _budget(table, request)
    specs = list(_layouts(request, base, table))
    fitting = [spec for spec in specs if budget is None or spec.nbytes <= budget]
    if not fitting:
        raise BudgetError(
            _impossible(table, request, budget or 0, min(specs, key=lambda s: s.nbytes, default=None))
        )
    likely = max(_largest_of_each(fitting), key=lambda spec: spec.tensor_shapes()["codes"].nbytes)
    return estimate_error(table, likely, _BRIEF, _FIRST_TRIAL_ROWS)


@dataclass(frozen=True)
class _SampleRows:
    sample: Tensor

    @property
    def skipped_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.sample


def _impossible(table: ScannedTable, request: Request, budget: float, smallest: AnySpec | None) -> str:
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
