"""Trellis-coded quantization with a rate for each principal direction: the method and its layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from cqr_compress.errors import SpecError
from cqr_compress.quantize.base import FitEffort, TableFacts, TableRows, refuse_int8, refuse_others
from cqr_compress.quantize.layouts import MAX_ROTATED_DIM, budget_bytes, table_fields, value_dtype
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.rates import WINDOWS, allocate, errors_by_bytes
from cqr_compress.quantize.tiers import RankedRows, allocate_tiers
from cqr_compress.quantize.trellis_fit import ENERGY_POWER, TrellisQuantizer, fit_trellis
from cqr_compress.table.base_spec import FLOAT_DTYPES
from cqr_compress.table.spec import AnySpec, TrellisSpec
from cqr_compress.table.trellis_spec import MAX_RATE, MAX_TIERS, STORED_VALUES, TIER_BLOCK

_ROUNDS = 4
_LONG_WINDOW, _SHORT_WINDOW, _SHORTEST_WINDOW = 12, 10, 8
_LONG_WINDOW_BYTES, _SHORT_WINDOW_BYTES = 14, 7
"""Smallest rows, in bytes, with windows of 12 and of 10 bits: the state at the seam takes much of a short ring."""
_LEAST_ROW_BYTES = {8: 3, 10: _SHORT_WINDOW_BYTES, 12: _LONG_WINDOW_BYTES}
"""Smallest rows of a tier, in bytes, by window."""
_LONG_WINDOW_VALUES = 2**24
"""Largest table, in values, with a window of 12 bits: its search is four times as slow and gains 0.1 to 0.3 dB."""
_LONG_WINDOW_BITS = 1.5
_STORED_SHARE = 0.0025
"""Largest share of the budget for stored values: they lower the error by about 0.03 dB or 0.005 bits per value."""
_TIERED_ROWS = 2**24
"""Largest table, in rows, that gets tiers unless asked for: to rank its rows takes about 32 bytes for each."""
_LEAST_SHARE = 0.85
"""Smallest rows of tiers of equally weighted rows, relative to those of one tier: rows of far fewer bits than the
others lose their neighbours, and become neighbours of many."""
_MIN_TIER_GAIN = 0.99
"""Largest predicted error of tiers, relative to one tier, for which they are tried."""


@dataclass(frozen=True)
class TrellisMethod:
    """Trellis-coded quantization."""

    def check(self, options: ConvertOptions) -> None:
        """Refuse layout options other than a rotation, a window and a number of tiers."""
        refuse_others(options, ("rotation", "window", "max_tiers"))
        refuse_int8(options)
        if options.rotation not in (None, "pca"):
            raise SpecError(f"rotation is {options.rotation!r}: a trellis takes 'pca'")
        if options.window not in (None, *WINDOWS):
            raise SpecError(f"window is {options.window}: choose from {', '.join(map(str, WINDOWS))}")

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return False: rows take as many bytes as the budget allows."""
        return False

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over layouts with and without rotation and gain, as large as the budget allows."""
        D, budget = facts.shape[1], budget_bytes(facts, options) or facts.nbytes
        window = options.window or (_SHORT_WINDOW if D > 1 else _SHORTEST_WINDOW)
        if window > MAX_RATE * D:
            return
        rotations = (options.rotation,) if options.rotation else (None, "pca") if D <= MAX_ROTATED_DIM else (None,)
        for rotation, gain_bits in product(rotations, (0, 8)):
            variances = facts.variances(rotation is not None)
            spec = TrellisSpec(
                method="trellis",
                tier_nbytes=(D,),
                window=window,
                rotation=rotation,
                gain_bits=gain_bits,
                codebook_dtype=value_dtype(facts, options),
                seed=options.seed,
                **table_fields(facts),
            )
            spec = _largest(spec, variances, budget)
            if options.window is None:
                spec = _largest(replace(spec, window=_best_window(spec, options.effort)), variances, budget)
            if spec.num_values * FLOAT_DTYPES[spec.codebook_dtype].itemsize <= _STORED_SHARE * budget:
                spec = _largest(replace(spec, value_source=STORED_VALUES), variances, budget)
            yield spec
            max_tiers = options.max_tiers or (MAX_TIERS if facts.shape[0] <= _TIERED_ROWS else 1)
            if max_tiers > 1:
                ranked = RankedRows.of(facts.importance(ENERGY_POWER))
                windows = [w for w in WINDOWS if w == spec.window or (w < spec.window and options.window is None)]
                weights = facts.importance(0.0)  # without the energies of the rows
                counted = weights[weights > 0]
                is_weighted = len(counted) > 0 and bool(counted.max() > counted.min())
                least = 1 if is_weighted or facts.num_fields > 1 else math.ceil(_LEAST_SHARE * spec.row_nbytes)
                tiered = _with_tiers(spec, variances, ranked, budget, max_tiers, windows, least)
                if tiered is not None:
                    yield tiered

    def makes(self, spec: AnySpec) -> bool:
        """Return whether the spec is that of a trellis."""
        return isinstance(spec, TrellisSpec)

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return 4 rounds, if `refine_rounds` is None."""
        return FitEffort(refine_rounds=_ROUNDS if refine_rounds is None else max(1, refine_rounds))

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the number of rounds."""
        return effort.refine_rounds

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> TrellisQuantizer:
        """Fit a trellis to the rows of a table."""
        assert isinstance(spec, TrellisSpec)
        return fit_trellis(rows, spec, effort, step)


def _best_window(spec: TrellisSpec, effort: str) -> int:
    """Return the window for rows of a size: 12 bits not at low rates, nor where it takes long."""
    N, D = spec.num_embeddings, spec.embedding_dim
    if spec.row_nbytes < _SHORT_WINDOW_BYTES:
        return _SHORTEST_WINDOW
    has_time = effort != "fast" and N * D <= _LONG_WINDOW_VALUES
    gains = spec.row_nbytes >= max(_LONG_WINDOW_BYTES, _LONG_WINDOW_BITS * D / 8)
    return _LONG_WINDOW if gains and has_time else _SHORT_WINDOW


def _largest(spec: TrellisSpec, variances: Tensor, budget: float) -> TrellisSpec:
    """Return the layout with the most bytes per row within a budget, and the rank that those bytes are worth."""
    N = spec.num_embeddings
    least = -(-spec.window // 8)
    for _ in range(4):  # the rotation takes bytes, of which the number depends on the rates
        row_nbytes = max(least, min(spec.width, int((budget - _side_bytes(spec)) // N)))
        rank = _useful_rank(spec, variances, row_nbytes)
        if (row_nbytes, rank) == (spec.row_nbytes, spec.rank):
            break
        spec = replace(spec, tier_nbytes=(row_nbytes,), rank=rank)
    over = max(0, -int((budget - spec.nbytes) // N))
    return replace(spec, tier_nbytes=(max(least, spec.row_nbytes - over),))


def _side_bytes(spec: TrellisSpec) -> int:
    """Return the bytes of all tensors but the codes."""
    return spec.nbytes - spec.codes_nbytes


def _useful_rank(spec: TrellisSpec, variances: Tensor, row_nbytes: int) -> int | None:
    """Return the number of dimensions that get bits of a row; None for all, or without a rotation."""
    if not spec.rotation:
        return spec.rank
    rates = allocate(variances, 8 * row_nbytes, spec.window)
    coded = max(int((rates > 0).sum()), row_nbytes)
    return coded if coded < spec.embedding_dim else None


def _with_tiers(
    spec: TrellisSpec,
    variances: Tensor,
    ranked: RankedRows,
    budget: float,
    max_tiers: int,
    windows: Iterable[int],
    least_nbytes: int,
) -> TrellisSpec | None:
    """Return the layout of up to `max_tiers` tiers with the least predicted error, if that is below one tier's.

    Args:
        spec: the layout of one tier.
        variances: (D,) float64, as of `TableFacts.variances`.
        ranked: the rows of the table.
        budget: bytes of the table.
        max_tiers: 2 to 4.
        windows: bits of a state to try.
        least_nbytes: bytes of the smallest rows.
    """
    best, D = None, spec.embedding_dim
    least_error = _MIN_TIER_GAIN * float(errors_by_bytes(variances, D, spec.window)[spec.row_nbytes])
    for window in windows:
        errors = errors_by_bytes(variances, D, window)
        for num_tiers in sorted({2, max_tiers}):
            rank, tiers = spec.rank, None
            for _ in range(4):  # the rotation takes bytes, of which the number depends on the rates
                one = replace(spec, window=window, rank=rank, tier_nbytes=(rank or D,))
                num_bytes = int(budget - _side_bytes(one) - _tier_bytes(one, num_tiers))
                least = max(_LEAST_ROW_BYTES[window], least_nbytes)
                tiers = allocate_tiers(ranked, errors[: one.width + 1], num_bytes, least, num_tiers)
                useful = rank if tiers is None else _useful_rank(spec, variances, tiers.nbytes[-1])
                if useful == rank:
                    break
                rank = useful
            if tiers is not None and len(tiers.rows) > 1 and tiers.error < least_error:
                made = replace(one, tier_nbytes=tiers.nbytes, tier_rows=tiers.rows)
                if made.nbytes <= budget:
                    least_error, best = tiers.error, made
    return best


def _tier_bytes(spec: TrellisSpec, num_tiers: int) -> int:
    """Return the bytes that several tiers take more than one, with 64 bits for each start."""
    N, itemsize = spec.num_embeddings, FLOAT_DTYPES[spec.codebook_dtype].itemsize
    return -(-N // 4) + 8 * -(-N // TIER_BLOCK) + (num_tiers - 1) * spec.width * (1 + itemsize)


TRELLIS = TrellisMethod()
