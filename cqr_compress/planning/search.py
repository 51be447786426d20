"""Search the layouts of a table by trial fits on samples, brief ones of all and longer ones of the best.

This is successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) in three steps. Trials are counted in rows
and iterations, not in seconds, so that the result does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.planning.scan import ScannedTable
from cqr_compress.planning.trial_fit import TrialFit, estimate_error, trial_fit
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec

BRIEF = FitEffort(kmeans_iterations=4, refine_rounds=1, beam=1)
_MIN_SHARE = 0.8
_SCALAR_LOSS = 2.72
_CLOSE = 1.08
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
class Trial:
    """A layout that was tried.

    Attributes:
        layout: the method and the layout in words.
        nbytes: bytes of the table.
        error: estimated relative squared error, by the longest trial of this layout.
    """

    layout: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        spec: the best layout.
        error: its estimated relative squared error.
        num_layouts: number of layouts that were tried.
        trials: the trials, by ascending error.
    """

    spec: AnySpec
    error: float
    num_layouts: int
    trials: tuple[Trial, ...] = ()


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
        key = kind_of(spec)
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


def kind_of(spec: AnySpec) -> tuple[object, ...]:
    """Return what layouts share that differ in the number of levels, or in the bytes of a trellis's rows, only."""
    if isinstance(spec, CodebookSpec):
        sources = spec.code_sources if spec.method == "cqr" else ()
        return spec.num_columns, spec.codebook_size, spec.rotation, spec.rank, sources
    if isinstance(spec, TrellisSpec):
        return spec.rotation, spec.gain_bits, spec.has_tiers
    return (spec.method,)


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
    return Found(best, error, len(specs), trials.all())


def estimate(table: ScannedTable, spec: AnySpec, options: ConvertOptions) -> TrialFit | None:
    """Fit one layout as a finalist of a search is; None where rows have no codes of their own.

    The codewords of hashed ids serve the whole table: on a sample they would have fewer rows to serve.
    """
    if "codes" not in spec.tensor_shapes():
        return None
    effort = SEARCH_EFFORTS[options.effort]
    return trial_fit(table, spec, _longer(spec, options), _rows(effort.second_values, effort.second_rows, table))


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
        self._errors: dict[AnySpec, float] = {}
        self.least = float("inf")

    def error(self, spec: AnySpec, effort: FitEffort, rows: int) -> float:
        """Return the estimated error of a layout."""
        error = estimate_error(self._table, spec, effort, rows)
        self._errors[spec] = error
        if error < self.least:
            self.least = error
            self._progress.status(f"best {error:.4g} ({spec.layout})")
        self._progress.advance()
        return error

    def all(self) -> tuple[Trial, ...]:
        """Return the layouts that were tried, each with its last error."""
        made = [Trial(f"{spec.method} {spec.layout}", spec.nbytes, error) for spec, error in self._errors.items()]
        return tuple(sorted(made, key=lambda trial: trial.error))


def _margin(error: float, spec: AnySpec, table: ScannedTable) -> float:
    """Return the factor on a layout's error in the last comparison."""
    has_tiers = isinstance(spec, TrellisSpec) and spec.has_tiers
    is_uniform = table.weights is None and not table.field_starts
    return 1 + _TIER_MARGIN * error if has_tiers and is_uniform else 1.0


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
