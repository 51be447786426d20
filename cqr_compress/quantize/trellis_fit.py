"""Fit and encoding of trellis-coded tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.quantize.base import FitEffort, TableRows, weighted_mean
from cqr_compress.quantize.rates import WIDENING, allocate
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.base_spec import FLOAT_DTYPES
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.decode import TIERS
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import TrellisSpec
from cqr_compress.table.tiers import importance_tiers, tier_tensors
from cqr_compress.table.trellis import seeded_values, value_table, values_of_states
from cqr_compress.table.trellis_spec import STORED_VALUES

_FIT_VALUES, _FIT_ROWS = 2**20, (2048, 16384)
"""Values, and smallest and largest number of rows, of the sample that paths are searched for in each round."""
_MOMENT_ROWS = 4096
_LEAST_SIGMA, _LEAST_GAIN = 1e-9, 1e-3
"""Smallest standard deviation of a dimension relative to the largest, and gain relative to the median norm."""
_LEAST_SCALE = 1e-3
"""Scale of a dimension without variance, relative to its standard deviation; others have about 1."""
_PRIOR_ROWS = 256
"""Weight of the variances of all rows, in rows of the sample, in those of a tier."""
ENERGY_POWER = 0.3
"""Power of a row's squared norm in its importance; at 1, rows of small norms lose their neighbours."""
_PRIOR_COUNT = 2.0
"""Weight of a value before a round, in average weights of a row's error, when it is averaged."""


@dataclass(frozen=True)
class TrellisQuantizer:
    """A fitted trellis.

    Attributes:
        spec: the table's spec.
        tensors: the shared tensors, in the spec's dtypes.
        directions: (D, P) float32 orthonormal basis of the rotation, or None.
        scale: (T, P) float32 factors on the values, in the basis; 0 for dimensions without bits.
        tiers: (N,) uint8 tier of each row; None for one tier.
    """

    spec: TrellisSpec
    tensors: dict[str, Tensor]
    directions: Tensor | None
    scale: Tensor
    tiers: Tensor | None

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the spec without an entry for each row."""
        return self.tensors

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, row_nbytes) and `row_gain` (B,) uint8, and their TIERS."""
        tiers = None if self.tiers is None else self.tiers[first_row : first_row + len(rows)].long()
        parts = [
            self._encode(rows[a:b], None if tiers is None else tiers[a:b])
            for a, b in row_blocks(len(rows), self.spec.work_width)
        ]
        return {short: torch.cat([part[short] for part in parts]) for short in parts[0]}

    def _encode(self, rows: Tensor, tiers: Tensor | None) -> dict[str, Tensor]:
        spec, tensors = self.spec, self.tensors
        centered = rows - tensors["row_mean"].float()
        unit = centered / row_norms(centered)[:, None] if spec.gain_bits else centered
        target = unit if self.directions is None else unit @ self.directions
        codes = torch.zeros(len(rows), spec.row_nbytes, dtype=torch.uint8, device="cpu")
        states = torch.zeros(len(rows), spec.width, dtype=torch.int32, device="cpu")
        for tier, row_nbytes in enumerate(spec.tier_nbytes):
            here = slice(None) if tiers is None else tiers == tier
            rates, scale = tensors["dim_rates"][tier], self.scale[tier]
            kept = rates > 0
            found, packed = search_paths(
                target[here][:, kept] / scale[kept], scale[kept].square(), rates[kept], spec.window,
                value_table(spec, tensors),
            )  # fmt: skip
            all_states = torch.zeros(len(found), spec.width, dtype=torch.int32, device="cpu")
            all_states[:, kept] = found
            states[here], codes[here, :row_nbytes] = all_states, packed
        encoded = {"codes": codes} if tiers is None else {"codes": codes, TIERS: tiers}
        if not spec.gain_bits:
            return encoded
        made = values_of_states(replace(spec, gain_bits=0), tensors, states, tiers=tiers)
        if spec.rotation:
            made = made @ tensors["rotation"].to(made.dtype)
        gains = (centered * made).sum(1) / made.square().sum(1).clamp_min(1e-30)
        low, log_ratio = tensors["gain_range"].double()
        steps = (gains.double().clamp_min(1e-300).log() - low.log()) / log_ratio.clamp_min(1e-12) * 255
        return encoded | {"row_gain": steps.round().clamp(0, 255).to(torch.uint8)}


def fit_trellis(
    rows: TableRows, spec: TrellisSpec, effort: FitEffort, step: Callable[[], None] = lambda: None
) -> TrellisQuantizer:
    """Fit mean, basis, rates, scales and values to the sample of a table.

    Args:
        rows: rows of the table.
        spec: the layout.
        effort: `refine_rounds` rounds of search, scales by least squares, and values by weighted averages.
        step: called after each round.
    """
    sample, P = rows.sample, spec.width
    cost = torch.ones(len(sample), **CPU_FLOAT) if rows.weights is None else rows.weights[rows.sample_ids].clone()
    dtype = FLOAT_DTYPES[spec.codebook_dtype]
    tiers = None
    if spec.has_tiers:
        tiers = importance_tiers(spec, rows.importance(ENERGY_POWER))
    mean = weighted_mean(sample, cost).to(dtype).float()
    centered = sample - mean
    norms = row_norms(centered) if spec.gain_bits else torch.ones(len(sample), **CPU_FLOAT)
    cost *= norms.square()
    unit = centered.div_(norms[:, None]) if spec.gain_bits else centered
    directions: Tensor | None = None
    if spec.rotation:
        vectors = torch.linalg.eigh(weighted_covariance(unit, cost)).eigenvectors
        directions = vectors.flip(1)[:, :P].float()
    variances = _tier_variances(unit, cost, directions, None if tiers is None else tiers[rows.sample_ids], spec)
    parts = [
        _fit_tier_part(unit, cost, directions, tiers, rows.sample_ids, tier, variances[tier], spec)
        for tier in range(spec.num_tiers)
    ]
    values = fit_values(parts, spec, effort.refine_rounds, step, seeded_values(spec.window, spec.seed))
    scale = torch.zeros(spec.num_tiers, P, **CPU_FLOAT)
    for tier, part in enumerate(parts):
        scale[tier, part.kept] = part.sigma * part.scale
    tensors = {"dim_rates": torch.stack([part.all_rates for part in parts]), "row_mean": mean.to(dtype)}
    tensors["dim_scale"] = scale
    if directions is not None:
        tensors["rotation"] = directions.T
    if spec.value_source == STORED_VALUES:
        tensors["state_values"] = values.to(dtype)
    if spec.gain_bits:
        tensors["gain_range"] = _gain_range(norms, dtype)
    if tiers is not None:
        tensors |= tier_tensors(spec, tiers)
    return TrellisQuantizer(spec, as_in_file(spec, tensors), directions, scale, tiers)


def _tier_variances(
    unit: Tensor, cost: Tensor, directions: Tensor | None, tiers: Tensor | None, spec: TrellisSpec
) -> Tensor:
    """Compute the weighted variances of the dimensions in each tier: (T, P) float64.

    Those of a tier with few rows in the sample are close to those of all rows.
    """
    total = torch.zeros(spec.num_tiers, spec.width, dtype=torch.float64, device="cpu")
    weight = torch.zeros(spec.num_tiers, 1, dtype=torch.float64, device="cpu")
    at = torch.zeros(len(unit), dtype=torch.int64, device="cpu") if tiers is None else tiers.long()
    for a in range(0, len(unit), _MOMENT_ROWS):
        part, here = unit[a : a + _MOMENT_ROWS], at[a : a + _MOMENT_ROWS]
        squares = (part if directions is None else part @ directions).square()
        total.index_add_(0, here, (squares * cost[a : a + _MOMENT_ROWS, None]).double())
        weight.index_add_(0, here, cost[a : a + _MOMENT_ROWS, None].double())
    mean = total.sum(0) / weight.sum()
    rows = torch.bincount(at, minlength=spec.num_tiers)[:, None]
    own = rows / (rows + _PRIOR_ROWS) if spec.has_tiers else 1.0
    found: Tensor = own * total / weight.clamp_min(1e-300) + (1 - own) * mean
    return found


@dataclass
class TierPart:
    """The rows of one tier in the sample, as the rounds of a fit read them.

    Attributes:
        all_rates: (P,) uint8.
        kept: (P,) bool, dimensions with bits; the other attributes have p entries for these.
        rates: (p,) uint8.
        sigma: (p,) float32 standard deviations.
        columns: (n, p) float32 values, divided by sigma.
        cost: (n,) float32 weights of the rows.
        scale: (p,) float32 factors on the values, relative to sigma.
    """

    all_rates: Tensor
    kept: Tensor
    rates: Tensor
    sigma: Tensor
    columns: Tensor
    cost: Tensor
    scale: Tensor


def _fit_tier_part(
    unit: Tensor,
    cost: Tensor,
    directions: Tensor | None,
    tiers: Tensor | None,
    sample_ids: Tensor,
    tier: int,
    variances: Tensor,
    spec: TrellisSpec,
) -> TierPart:
    """Allocate the rates of a tier, and draw rows of the sample."""
    rates = allocate(variances, 8 * spec.tier_nbytes[tier], spec.window)
    kept = rates > 0
    sigma = variances.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(_LEAST_SIGMA * float(sigma.max())).float().clamp_min(1e-18)[kept]
    if tiers is None:
        ids = _fit_ids(len(unit), unit.shape[1])
    else:
        own = (tiers[sample_ids] == tier).nonzero().flatten()
        ids = own[_fit_ids(len(own), unit.shape[1])]
    columns = unit[ids] if directions is None else unit[ids] @ directions
    widening = torch.tensor((1.0, *WIDENING[spec.window]), **CPU_FLOAT)[rates.long()]
    return TierPart(rates, kept, rates[kept], sigma, columns[:, kept] / sigma, cost[ids], widening[kept])


def _gain_range(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the least gain and the logarithm of its ratio to the largest (2,), from norms (n,) of rows.

    Norms far below the others, of rows that almost equal the mean, take the least gain: they add little to the
    error, and would make the steps large, or the least gain 0 in float16.
    """
    low = max(float(norms.min()) * 0.9, float(norms.median()) * _LEAST_GAIN, torch.finfo(dtype).tiny)
    high = max(float(norms.max()) * 1.1, low)
    return torch.tensor([low, math.log(high / low)], **CPU_FLOAT).to(dtype)


def multiplied(spec: TrellisSpec, tensors: dict[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """Return shared tensors of a table with a rotation, whose rows are multiplied by `matrix` (D, D)."""
    made = {short: tensors[short].float() @ matrix for short in ("rotation", "row_mean")}
    return as_in_file(spec, tensors | made)


def fit_values(
    parts: list[TierPart], spec: TrellisSpec, rounds: int, step: Callable[[], None], values: Tensor
) -> Tensor:
    """Alternate between search, the scales of the parts by least squares, and values by averages if stored.

    Args:
        parts: the rows of each tier; their scales are replaced.
        spec: the layout.
        rounds: number of rounds.
        step: called after each round.
        values: (2**window,) float32 values to begin with.

    Returns:
        The values (2**window,) float32.
    """
    dtype, S = FLOAT_DTYPES[spec.codebook_dtype], 2**spec.window
    for _ in range(rounds):
        total, count = (torch.zeros(S, dtype=torch.float64, device="cpu") for _ in range(2))
        num_values = 0
        for part in parts:
            if not len(part.columns):
                continue
            variances = part.sigma.square()
            states, _ = search_paths(
                part.columns / part.scale, variances * part.scale.square(), part.rates, spec.window, values
            )
            made = values[states.long()]
            by_row = made * part.cost[:, None]
            scale = (part.columns * by_row).sum(0) / (made * by_row).sum(0).clamp_min(1e-9)
            part.scale = scale.clamp_min(_LEAST_SCALE)
            if spec.value_source == STORED_VALUES:
                share = (part.cost[:, None] * (variances * part.scale.square())).flatten().double()
                flat = states.flatten().long()
                total += torch.bincount(flat, share * (part.columns / part.scale).flatten(), S)
                count += torch.bincount(flat, share, S)
                num_values += len(flat)
        if num_values:
            prior = _PRIOR_COUNT * count.sum() / num_values
            values = ((total + prior * values) / (count + prior)).to(dtype).float()
        step()
    return values


def weighted_covariance(rows: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted second moments of rows (n, D) with weights (n,), in blocks: (D, D) float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device="cpu")
    for part, cost in zip(torch.split(rows, _MOMENT_ROWS), torch.split(weights, _MOMENT_ROWS), strict=True):
        total += ((part * cost[:, None]).T @ part).double()
    return total / weights.sum(dtype=torch.float64)


def row_norms(rows: Tensor) -> Tensor:
    """Return the root mean squares (B,) of rows (B, D), at least 1e-9 of a unit."""
    return rows.square().mean(1).sqrt().clamp_min(1e-9)


def _fit_ids(num_rows: int, dim: int) -> Tensor:
    """Draw the rows of the sample that paths are searched for."""
    limit = min(max(_FIT_VALUES // dim, _FIT_ROWS[0]), _FIT_ROWS[1])
    if num_rows <= limit:
        return torch.arange(num_rows, device="cpu")
    return torch.randperm(num_rows, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:limit]
