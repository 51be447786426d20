"""Errors of one table at several sizes, by brief fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from cqr_compress.errors import BudgetError, SpecError
from cqr_compress.planning.choose import fit_briefly
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.planning.trial_fit import TrialFit
from cqr_compress.progress import Progress
from cqr_compress.quantize.layouts import MAX_ROTATED_DIM
from cqr_compress.quantize.options import ConvertOptions

BITS_PER_DIM = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Rates at which the error of a table is measured by a brief fit."""
_ROWS_OF_ROTATION, _WINDOW = 64, 10
HIGH_RATES = (12.0, 16.0)
"""Rates for errors of less than about 5e-5, of which a trellis has no less at any rate."""


def options_of_size(scan: ScannedTable, options: ConvertOptions, nbytes: float) -> ConvertOptions:
    """Return the options of one table, with its bytes as the budget."""
    N, D = scan.shape
    return replace(options.without_budget(), bits_per_dim=8 * (nbytes + 0.5) / (N * D))


def measure_sizes(
    scan: ScannedTable,
    options: ConvertOptions,
    progress: Progress,
    stop: Callable[[TrialFit], bool] = lambda fit: False,
    rates: Sequence[float] = BITS_PER_DIM,
) -> list[TrialFit]:
    """Fit a table at several sizes, the smallest first; sizes that no layout fits are left out.

    Of all methods, a trellis is fitted where there is one.

    Args:
        scan: the table.
        options: options of the conversion; their budget is ignored.
        progress: receives a stage with the sizes.
        stop: ends the measurement after a fit.
        rates: bits for each value.

    Raises:
        SpecError: codes are hashed from ids.
        TableRefusedError: values whose squares overflow or underflow float32.
    """
    N, D = scan.shape
    sizes = [size for bits in rates if (size := bits * N * D / 8) < scan.facts.nbytes]
    found: list[TrialFit] = []
    progress.start(f"measuring {scan.entry.name}", len(sizes), "sizes")
    for size in sizes:
        with contextlib.suppress(BudgetError):  # too small for this table
            found.append(_fit(scan, options_of_size(scan, options, size)))
            progress.status(f"error {found[-1].error:.3g} at {found[-1].nbytes:,} bytes")
        progress.advance()
        if found and stop(found[-1]):
            break
    return found


def _fit(scan: ScannedTable, options: ConvertOptions) -> TrialFit:
    if options.method in ("auto", "trellis"):
        with contextlib.suppress(BudgetError, SpecError):  # options of codebooks may be given
            return fit_briefly(scan, _likely(scan, replace(options, method="trellis", rank=None)))
    return fit_briefly(scan, options)


def _likely(scan: ScannedTable, options: ConvertOptions) -> ConvertOptions:
    """Leave out layouts of a trellis that are seldom the best."""
    N, D = scan.shape
    uniform = scan.weights is None and not scan.field_starts
    tiers = 1 if uniform else None  # tiers lower the error of rows of equal weight a little
    rotation = "pca" if N >= _ROWS_OF_ROTATION * D and D <= MAX_ROTATED_DIM else None
    window = _WINDOW if (options.bits_per_dim or 0) * D >= 2 * _WINDOW else None  # shorter rows need a shorter one
    return replace(
        options,
        max_tiers=options.max_tiers or tiers,
        rotation=options.rotation or rotation,
        window=options.window or window,
    )
