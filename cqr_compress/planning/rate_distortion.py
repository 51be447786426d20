"""Points of sizes and errors of planned tables, for reports: trials, measured sizes and the bound."""

from __future__ import annotations

from typing import Any

from cqr_compress.planning.curves import BITS_PER_DIM
from cqr_compress.planning.plan_tables import Planned
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.quantize.rates import rate_distortion_bound

_MAX_TRIALS = 100
_MAX_DIM = 2048
"""Tables of more dimensions have no bound in the report: their covariance takes minutes."""


def rate_distortion(planned: Planned) -> dict[str, Any]:
    """Collect the points of all planned tables, see `SizeReport.rate_distortion`."""
    return {
        name: {
            "trials": [[t.layout, t.nbytes, _rounded(t.error)] for t in table.plan.trials[:_MAX_TRIALS]],
            "curve": [[round(nbytes), _rounded(error)] for nbytes, error in table.plan.curve],
            "bound": _bound(table.scan),
        }
        for name, table in planned.tables.items()
    }


def _bound(scan: ScannedTable) -> list[list[float]]:
    """Compute the bound at several rates; nothing for a table whose sample is no longer held."""
    N, D = scan.shape
    if not len(scan.sample) or D > _MAX_DIM:
        return []
    variances = scan.variances(principal=True)
    energies = scan.sample.square().sum(1)
    weights = None if scan.weights is None else scan.weights[scan.sample_ids]
    energy = float(energies.mean() if weights is None else (energies * weights).sum() / weights.sum())
    return [
        [round(bits * N * D / 8), _rounded(rate_distortion_bound(variances, energy, bits * D))]
        for bits in BITS_PER_DIM
    ]


def _rounded(error: float) -> float:
    return float(f"{error:.6g}")
