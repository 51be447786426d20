"""Search the layouts of a table by trial fits on samples, brief ones of all and longer ones of the best.

This is successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) in three steps. Trials are counted in rows
and iterations, not in seconds, so that the result does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.planning.scan import ScannedTable
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import FitEffort, importance_of, weighted_mean
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.decode import decode_rows
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec

BRIEF = FitEffort(kmeans_iterations=4, refine_rounds=1, beam=1)
_MIN_SHARE = 0.8
_SCALAR_LOSS = 2.72
_CLOSE = 1.08
_LIMIT = 0.75
_PROBES, _HOPELESS = 5, 1.25
"""Number of codebooks that are tried before the others are dropped, if all have 25% more error than a trellis."""
_PROMISING = 1.5
"""Layouts with more error in a brief trial, relative to the best, have no longer one."""
_TIER_MARGIN = 0.2
"""Tiers of equally weighted rows have to lower an error of 0.3 by 6%, one of 0.05 by 1%: the larger the error, the
more rows of the smallest tier lose their neighbours."""
_BEST_SIZES, _ALL_RANKS_DIM = 4, 128
"""Of tables with more dimensions, reduced ranks are tried with the best codebook sizes only."""


@dataclass(frozen=True)
class SearchEffort:
    """Sizes of the trials of a search.

    Attributes:
        first_values: values (rows times dimensions) of a brief trial, within `first_rows`.
        first_rows: smallest and largest number of rows of a brief trial.
        finalists: number of layouts with a longer trial.
        second_values: values of a longer trial, within `second_rows`.
        second_rows: smallest and largest number of rows of a longer trial.
        deciders: number of layouts that are compared with the effort of the final fit, where several are within 8%
            of the best.
    """

    first_values: int = 2**19
    first_rows: tuple[int, int] = (1024, 4096)
    finalists: int = 8
    second_values: int = 2**21
    second_rows: tuple[int, int] = (4096, 16384)
    deciders: int = 3


SEARCH_EFFORTS = {
    "fast": SearchEffort(finalists=3, second_values=2**20, deciders=0),
    "normal": SearchEffort(),
    "max": SearchEffort(
        first_values=2**20, finalists=16, second_values=2**40, second_rows=(4096, 2**40), deciders=8
    ),
}


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        spec: the best layout.
        error: its estimated relative squared error.
        num_layouts: number of layouts that were tried.
    """

    spec: AnySpec
    error: float
    num_layouts: int


def worth_trying(specs: Sequence[AnySpec]) -> list[AnySpec]:
    """Drop layouts that cannot be the best by their sizes.

    Of layouts that differ in the number of levels only, the largest is kept. A layout is dropped if it uses less
    than 80% of the bytes of the largest one; or if its codebooks leave it so few bits of codes that a scalar
    quantizer of another layout's bits would be better. A bit per value divides the squared error by 4, and at
    equal bits scalar quantization of Gaussian values has 2.72 times the least possible error (Panter & Dite 1951,
    doi:10.1109/JRPROC.1951.230419); sums of small codebooks have more, and are compared with larger ones only;
    likewise reduced ranks with higher ones.
    """
    best: dict[tuple[object, ...], AnySpec] = {}
    for spec in specs:
        key: tuple[object, ...] = (spec.method,)
        if isinstance(spec, CodebookSpec):
            sources = spec.code_sources if spec.method == "cqr" else ()
            key = (spec.num_columns, spec.codebook_size, spec.rotation, spec.rank, sources)
        elif isinstance(spec, TrellisSpec):
            key = (spec.rotation, spec.gain_bits, spec.has_tiers)
        if key not in best or spec.nbytes > best[key].nbytes:
            best[key] = spec
    most = max(spec.nbytes for spec in best.values())
    large = [spec for spec in best.values() if spec.nbytes >= _MIN_SHARE * most]

    def is_dominated(spec: AnySpec) -> bool:
        return any(
            4.0 ** (_bits_per_value(other) - _bits_per_value(spec)) > _SCALAR_LOSS
            for other in large
            if _left_out(other) <= _left_out(spec)
            and (_num_levels(other) == 1 or _codebook_size(other) >= _codebook_size(spec))
        )

    return [spec for spec in large if not is_dominated(spec)]


def search(table: ScannedTable, specs: Sequence[AnySpec], options: ConvertOptions, progress: Progress) -> Found:
    """Find the layout with the least estimated error.

    Args:
        table: the scanned table.
        specs: the layouts, from `worth_trying`.
        options: options of the conversion.
        progress: receives a stage with the trials.
    """
    effort = SEARCH_EFFORTS[options.effort]
    trials = _Trials(table, progress)
    whole = [spec for spec in specs if not _left_out(spec)]
    reduced = [spec for spec in specs if _left_out(spec)]
    finalists = min(effort.finalists, len(specs))
    deciders = min(effort.deciders, finalists)
    label, longer = f"choosing a layout for {table.entry.name}", finalists + deciders
    rows = _rows(effort.first_values, effort.first_rows, table)

    def brief(spec: AnySpec) -> tuple[float, AnySpec]:
        return trials.error(_with_pca(spec), BRIEF, rows), spec

    probes = _probes(whole)
    if probes:
        progress.start(label, len(probes) + longer, "trials")
    first = [brief(spec) for spec in probes]
    if _are_hopeless(first):
        whole = reduced = []
    else:
        whole = [spec for spec in whole if spec not in probes]
        progress.start(label, len(whole) + len(reduced) + longer, "trials")
        first += [brief(spec) for spec in whole]
    sizes = {_codebook_size(spec) for _, spec in sorted(first, key=_error)[:_BEST_SIZES]}
    lost = _lost_energy(table) if reduced else None
    for spec in sorted(reduced, key=_left_out):
        promising = not first or table.shape[1] <= _ALL_RANKS_DIM or _codebook_size(spec) in sizes
        if promising and lost is not None and float(lost[_left_out(spec)]) < trials.least:
            first.append(brief(spec))
        else:
            progress.advance()
    trials.least = float("inf")
    rows = _rows(effort.second_values, effort.second_rows, table)
    first = _one_of_each_trellis(first)
    least = min(error for error, _ in first)
    second = [
        (trials.error(spec, _longer(spec, options), rows), spec)
        for error, spec in sorted(first, key=_error)[:finalists]
        if error <= _PROMISING * least
    ]
    progress.advance(finalists - len(second))
    second.sort(key=_error)
    close = [spec for error, spec in second[:deciders] if error <= _CLOSE * second[0][0]]
    if len(close) > 1 and not all(isinstance(spec, TrellisSpec) for spec in close):
        method = method_of(options.method)
        trials.least = float("inf")
        second = [(trials.error(spec, method.effort(spec, options.refine_rounds), rows), spec) for spec in close]
        progress.advance(deciders - len(close))
    else:  # of one layout, or of trellises, of which longer trials are close to the final fit
        progress.advance(deciders)
    error, best = min(second, key=lambda pair: pair[0] * _margin(pair[0], pair[1], table))
    return Found(best, error, len(specs))


def estimate(table: ScannedTable, spec: AnySpec, options: ConvertOptions) -> float | None:
    """Estimate the error of one layout, as for a finalist of a search; None where rows have no codes of their own.

    The codewords of hashed ids serve the whole table: on a sample they would have fewer rows to serve.
    """
    if "codes" not in spec.tensor_shapes():
        return None
    effort = SEARCH_EFFORTS[options.effort]
    return estimate_error(
        table, spec, _longer(spec, options), _rows(effort.second_values, effort.second_rows, table)
    )


def _probes(specs: Sequence[AnySpec]) -> list[AnySpec]:
    """Return the trellises, and some codebooks of all sizes to compare them with; nothing without trellises."""
    others = [spec for spec in specs if not isinstance(spec, CodebookSpec)]
    codebooks = sorted((spec for spec in specs if isinstance(spec, CodebookSpec)), key=_codebook_size)
    return [*others, *codebooks[:: max(1, len(codebooks) // _PROBES)]] if others else []


def _are_hopeless(trials: Sequence[tuple[float, AnySpec]]) -> bool:
    """Return whether brief trials of several codebooks have much larger errors than another quantizer."""
    codebooks = [error for error, spec in trials if isinstance(spec, CodebookSpec)]
    others = [error for error, spec in trials if not isinstance(spec, CodebookSpec)]
    return bool(others) and len(codebooks) >= _PROBES and min(codebooks) > _HOPELESS * min(others)


def _one_of_each_trellis(trials: Sequence[tuple[float, AnySpec]]) -> list[tuple[float, AnySpec]]:
    """Keep the number of tiers with the least error of each other layout of a trellis."""
    best: dict[object, tuple[float, AnySpec]] = {}
    for error, spec in trials:
        key: object = (spec.rotation, spec.gain_bits) if isinstance(spec, TrellisSpec) else spec
        if key not in best or error < best[key][0]:
            best[key] = error, spec
    return list(best.values())


class _Trials:
    """Trial fits of a table, with the least error so far."""

    def __init__(self, table: ScannedTable, progress: Progress) -> None:
        self._table, self._progress = table, progress
        self.least = float("inf")

    def error(self, spec: AnySpec, effort: FitEffort, rows: int) -> float:
        """Return the estimated error of a layout."""
        error = estimate_error(self._table, spec, effort, rows)
        if error < self.least:
            self.least = error
            self._progress.status(f"best {error:.4g} ({spec.layout})")
        self._progress.advance()
        return error


def _margin(error: float, spec: AnySpec, table: ScannedTable) -> float:
    """Return the factor on a layout's error in the last comparison."""
    has_tiers = isinstance(spec, TrellisSpec) and spec.has_tiers
    return 1 + _TIER_MARGIN * error if has_tiers and table.weights is None else 1.0


def _error(pair: tuple[float, AnySpec]) -> float:
    return pair[0]


def _rows(values: int, limits: tuple[int, int], table: ScannedTable) -> int:
    return min(max(values // table.shape[1], limits[0]), limits[1])


def _longer(spec: AnySpec, options: ConvertOptions) -> FitEffort:
    """Return the effort of a longer trial."""
    rounds = 4 if isinstance(spec, CodebookSpec) and spec.rotation == "opq" else 2
    if options.refine_rounds is not None:
        rounds = min(rounds, options.refine_rounds)
    elif method_of(options.method).effort(spec, None).refine_rounds == 0:
        rounds = 0
    return FitEffort(kmeans_iterations=10, refine_rounds=rounds, restarts=1)


def _with_pca(spec: AnySpec) -> AnySpec:
    """Replace a fitted rotation by PCA, its initial value."""
    return replace(spec, rotation="pca") if isinstance(spec, CodebookSpec) and spec.rotation else spec


def _codebook_size(spec: AnySpec) -> int:
    return spec.codebook_size if isinstance(spec, CodebookSpec) else 0


def _num_levels(spec: AnySpec) -> int:
    return spec.num_levels if isinstance(spec, CodebookSpec) else 1


def _bits_per_value(spec: AnySpec) -> float:
    """Return the stored bits of codes per value of the table."""
    codes = spec.tensor_shapes().get("codes")
    return 0.0 if codes is None else 8 * codes.nbytes / (spec.num_embeddings * spec.embedding_dim)


def _left_out(spec: AnySpec) -> int:
    """Count the dimensions that a rotation of reduced rank drops; 0 without one."""
    return 0 if not isinstance(spec, CodebookSpec) else spec.embedding_dim - spec.width


def _lost_energy(table: ScannedTable) -> Tensor:
    """Compute the relative squared error of the best projection that drops 0, 1, 2, ... dimensions."""
    rows = table.sample
    if table.weights is not None:
        rows = rows * table.weights[table.sample_ids].sqrt()[:, None]
    energies = torch.linalg.eigvalsh((rows.T @ rows).double()).clamp_min(0)
    return torch.cat([energies.new_zeros(1), energies.cumsum(0) / energies.sum().clamp_min(1e-300)])


def estimate_error(table: ScannedTable, spec: AnySpec, effort: FitEffort, num_rows: int) -> float:
    """Estimate the relative squared error of a layout fitted to the whole table.

    With fewer rows than the table has, the error on the fitted rows is too low and the held-out error too high, by
    amounts that decrease with the number of rows. The limit of both is about three quarters of the way from the
    first to the second (.72 to .77 for pq and prq of a table of 340,000 x 100 fitted to 16,384 rows); the estimate
    is interpolated from it to the table's N.

    Args:
        table: the scanned table.
        spec: the layout.
        effort: effort of the trial fit.
        num_rows: maximum number of rows to fit on; up to half as many are held out.
    """
    N, _ = table.shape
    generator = torch.Generator().manual_seed(spec.num_embeddings)
    order = torch.randperm(len(table.sample), generator=generator, device="cpu")
    if len(table.sample) <= num_rows:
        order = torch.arange(len(table.sample), device="cpu")  # with the effort of the final fit, this is that fit
    order = order[: num_rows + num_rows // 2]
    weights = None if table.weights is None else table.weights[table.sample_ids[order]]
    rows = _SampleRows(table.sample[order], weights, min(num_rows, len(order)))
    if isinstance(spec, TrellisSpec):
        small: AnySpec = spec.resized(len(order))
    else:
        small = replace(spec, num_embeddings=max(rows.num_fitted, 1), num_kept_rows=0, num_zero_rows=0)
    quantizer = method_of(spec.method).fit(rows, small, effort, lambda: None)

    def error(start: int, stop: int) -> float:
        part = rows.every[start:stop]
        encoded = quantizer.encode(part, start if isinstance(small, TrellisSpec) else 0)
        decoded = decode_rows(
            small, {**quantizer.shared_tensors(), **encoded}, torch.arange(len(part), device="cpu")
        )
        lost, energy = (decoded - part).square().sum(1), part.square().sum(1)
        if weights is not None:
            lost, energy = lost * weights[start:stop], energy * weights[start:stop]
        return float(lost.sum() / energy.sum().clamp_min(1e-30))

    inside = error(0, rows.num_fitted)
    if len(order) == rows.num_fitted:
        return inside
    outside = error(rows.num_fitted, len(order))
    return inside + _LIMIT * (outside - inside) * (1 - min(1.0, rows.num_fitted / N))


@dataclass(frozen=True)
class _SampleRows:
    """Rows of a sample, of which the first are fitted and the others held out; `weights` (n,) are those of all."""

    every: Tensor
    weights: Tensor | None
    num_fitted: int

    @property
    def sample(self) -> Tensor:
        return self.every[: self.num_fitted]

    @property
    def sample_ids(self) -> Tensor:
        return torch.arange(self.num_fitted, device="cpu")

    @property
    def stored_apart_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device="cpu")

    def importance(self, power: float) -> Tensor:
        energies = (self.every - weighted_mean(self.every, self.weights)).square().sum(1)
        return importance_of(energies, power, self.weights, self.stored_apart_ids)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.sample
