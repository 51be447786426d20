"""Refit of a trellis-coded table: scales and values by least squares, and all paths searched for again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cqr_compress.quantize.base import TableRows
from cqr_compress.quantize.trellis_fit import TierPart, TrellisQuantizer, fit_values, row_norms
from cqr_compress.table.decode import stored_rows
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import TrellisSpec
from cqr_compress.table.table import CompressedTable
from cqr_compress.table.tiers import tiers_of
from cqr_compress.table.trellis import value_table
from cqr_compress.table.trellis_spec import STORED_VALUES

_LEAST_SCALE = 1e-18


def refine_trellis(
    rows: TableRows, table: CompressedTable, rounds: int, step: Callable[[], None] = lambda: None
) -> CompressedTable:
    """Re-solve the scales and stored values of a table on the whole sample of its rows, and encode all rows.

    Mean, basis, rates, tiers and the range of the gains stay. A fit reads up to 16,384 rows of the sample in its
    rounds, and this one all of it.

    Args:
        rows: the dense rows of the table.
        table: a table with a `TrellisSpec`, whose rotation is orthogonal.
        rounds: rounds of search and least squares.
        step: called after each round.
    """
    spec, tensors = table.spec, dict(table.tensors)
    assert isinstance(spec, TrellisSpec)
    ids = rows.sample_ids
    cost = torch.ones(len(ids), **CPU_FLOAT) if rows.weights is None else rows.weights[ids]
    target = rows.sample - tensors["row_mean"].float()
    if spec.gain_bits:
        norms = row_norms(target)
        target, cost = target / norms[:, None], cost * norms.square()
    directions: Tensor | None = None
    if spec.rotation:
        directions = torch.nn.functional.normalize(tensors["rotation"].float(), dim=1).T
        target = target @ directions
    tiers = None
    if spec.has_tiers:
        tiers = tiers_of(tensors, torch.arange(spec.num_embeddings, device="cpu")).to(torch.uint8)
    parts = []
    for tier in range(spec.num_tiers):
        own = slice(None) if tiers is None else tiers[ids] == tier
        rates = tensors["dim_rates"][tier]
        kept, scale = rates > 0, tensors["dim_scale"][tier].float()
        scale = torch.where(scale.abs() < _LEAST_SCALE, _LEAST_SCALE, scale)[kept]
        one = torch.ones(len(scale), **CPU_FLOAT)
        parts.append(TierPart(rates, kept, rates[kept], scale, target[own][:, kept] / scale, cost[own], one))
    values = fit_values(parts, spec, rounds, step, value_table(spec, tensors).float())
    scales = torch.zeros(spec.num_tiers, spec.width, **CPU_FLOAT)
    for tier, part in enumerate(parts):
        scales[tier, part.kept] = part.sigma * part.scale
    names = spec.tensor_shapes().keys() & {"dim_rates", "row_mean", "rotation", "gain_range"}
    shared = {short: tensors[short] for short in sorted(names)}
    shared["dim_scale"] = scales
    if spec.value_source == STORED_VALUES:
        shared["state_values"] = values
    shared = as_in_file(spec, shared)
    quantizer = TrellisQuantizer(spec, shared, directions, scales, tiers)
    encoded = [stored_rows(spec, quantizer.encode(block, start)) for start, block in rows.blocks()]
    codes = {short: torch.cat([part[short] for part in encoded]) for short in encoded[0]}
    return CompressedTable(spec, tensors | shared | codes)
