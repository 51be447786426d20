"""Methods: each makes specs that fit a budget, and fits a spec to a table.

A method is one line of METHODS, one function that lists its layouts and one that fits a layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from cqr_compress.quantize.additive import Effort, fit_additive, num_steps
from cqr_compress.quantize.base import Method, Quantizer, TableRows
from cqr_compress.quantize.cqr import fit_clustered, num_clustered_steps
from cqr_compress.quantize.hashed import fit_sketch, num_sketch_steps
from cqr_compress.quantize.integers import RowwiseQuantizer
from cqr_compress.table.spec import AnySpec, CodebookSpec, RowwiseSpec

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("pq", "product quantization", "doi:10.1109/TPAMI.2010.57", "additive"),
        Method("rq", "residual quantization, beam search", "doi:10.3390/s101211259", "additive"),
        Method("prq", "product-residual: residual codebooks in each column", "doi:10.3390/s101211259", "additive"),
        Method("cqr", "clustering the sketch: pointers and helper codebooks", "arXiv:2210.05974", "cqr"),
        Method("int8", "8-bit integers, scale and zero point per row", "arXiv:2101.05615", "rowwise"),
        Method("int4", "4-bit integers, scale and zero point per row", "arXiv:1911.02079", "rowwise"),
        Method("hash", "hashing trick, fitted by least squares", "doi:10.1145/1553374.1553516", "sketch"),
        Method("qr", "quotient-remainder, fitted by least squares", "doi:10.1145/3394486.3403059", "sketch"),
    )
}


DEFAULT_EFFORT: dict[str, Effort] = {
    "pq": Effort(),
    "rq": Effort(rounds=4, restarts=1),
    "prq": Effort(rounds=6, restarts=2),
    "cqr": Effort(rounds=6, restarts=2),
}
"""Effort of a method where the user sets none; a rotation by OPQ takes at least OPQ_ROUNDS."""


OPQ_ROUNDS = 12


def effort_for(spec: CodebookSpec, rounds: int | None = None) -> Effort:
    """The effort that fits a spec by default, with `rounds` set by the user or None."""
    effort = DEFAULT_EFFORT.get(spec.method, Effort())
    if rounds is None:
        rounds = max(effort.rounds, OPQ_ROUNDS if spec.rotation == "opq" else 0)
    return Effort(effort.kmeans_iterations, rounds, effort.beam, effort.restarts)


def num_fit_steps(spec: AnySpec, effort: Effort) -> int:
    """Calls of `step` that `fit` makes at most."""
    if isinstance(spec, RowwiseSpec):
        return 1
    if spec.num_stored_levels == spec.num_levels:
        return num_steps(spec, effort)
    return num_clustered_steps(spec, effort) if spec.num_stored_levels else num_sketch_steps(spec)


def fit(rows: TableRows, spec: AnySpec, effort: Effort, step: Callable[[], None] = lambda: None) -> Quantizer:
    """Fit what a spec describes to a table's rows.

    Args:
        rows: the table.
        spec: the layout.
        effort: work to put into stored codes; the other methods have one way.
        step: called after each unit of work.
    """
    if isinstance(spec, RowwiseSpec):
        step()
        return RowwiseQuantizer(spec)
    if not spec.num_stored_levels:
        return cast(Quantizer, fit_sketch(rows.blocks, rows.skipped_ids, spec, step, rows.weights))
    weights = None if rows.weights is None else rows.weights[rows.sample_ids]
    if spec.num_stored_levels == spec.num_levels:
        return cast(Quantizer, fit_additive(rows.sample, spec, effort, step, weights))
    return cast(Quantizer, fit_clustered(rows.sample, rows.sample_ids, spec, effort, step, weights))
