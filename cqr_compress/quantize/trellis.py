"""Trellis-coded quantization with a rate for each principal direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cqr_compress.errors import SpecError
from cqr_compress.quantize.base import FitEffort, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.layouts import MAX_ROTATED_DIM, budget_bytes, table_fields, value_dtype
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.rates import WIDENING, WINDOWS, allocate
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.base_spec import FLOAT_DTYPES
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.spec import AnySpec, TrellisSpec
from cqr_compress.table.trellis import seeded_values, value_table, values_of_states
from cqr_compress.table.trellis_spec import MAX_RATE, STORED_VALUES

_ROUNDS = 4
_FIT_VALUES, _FIT_ROWS = 2**20, (2048, 16384)
"""Values, and smallest and largest number of rows, of the sample that paths are searched for in each round."""
_LONG_WINDOW, _SHORT_WINDOW, _SHORTEST_WINDOW = 12, 10, 8
_LONG_WINDOW_BYTES, _SHORT_WINDOW_BYTES = 14, 7
"""Smallest rows, in bytes, with windows of 12 and of 10 bits: the state at the seam takes much of a short ring."""
_LONG_WINDOW_VALUES = 2**24
"""Largest table, in values, with a window of 12 bits: its search is four times as slow and gains 0.1 to 0.3 dB."""
_LONG_WINDOW_BITS = 1.5
_MOMENT_ROWS = 4096
_LEAST_SIGMA, _LEAST_GAIN = 1e-9, 1e-3
"""Smallest standard deviation of a dimension relative to the largest, and gain relative to the median norm."""
_STORED_SHARE = 0.0025
"""Largest share of the budget for stored values: they lower the error by about 0.03 dB or 0.005 bits per value."""
_LEAST_SCALE = 1e-3
"""Scale of a dimension without variance, relative to its standard deviation; others have about 1."""
_PRIOR_COUNT = 2.0
"""Weight of a value before a round, in average weights of a row's error, when it is averaged."""


@dataclass(frozen=True)
class TrellisQuantizer:
    """A fitted trellis.

    Attributes:
        spec: the table's spec.
        tensors: the shared tensors, in the spec's dtypes.
        projection: (D, P) float32, from centered rows to dimensions of about unit variance; its diagonal (D,)
            without a rotation.
        weights: (P,) float32 weights of the dimensions' squared errors.
    """

    spec: TrellisSpec
    tensors: dict[str, Tensor]
    projection: Tensor
    weights: Tensor

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the spec without an entry for each row."""
        return self.tensors

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, row_nbytes) and `row_gain` (B,) uint8."""
        parts = [self._encode(rows[a:b]) for a, b in row_blocks(len(rows), self.spec.work_width)]
        return {short: torch.cat([part[short] for part in parts]) for short in parts[0]}

    def _encode(self, rows: Tensor) -> dict[str, Tensor]:
        spec, tensors = self.spec, self.tensors
        centered = rows - tensors["row_mean"].float()
        unit = centered / _norms(centered)[:, None] if spec.gain_bits else centered
        rates, kept = tensors["dim_rates"], tensors["dim_rates"] > 0
        target, values = _projected(unit, self.projection)[:, kept], value_table(spec, tensors)
        found, codes = search_paths(target, self.weights[kept], rates[kept], spec.window, values)
        if not spec.gain_bits:
            return {"codes": codes}
        states = torch.zeros(len(rows), spec.width, dtype=torch.int32, device="cpu")
        states[:, kept] = found
        made = values_of_states(replace(spec, gain_bits=0), tensors, states)
        if spec.rotation:
            made = made @ tensors["rotation"].to(made.dtype)
        gains = (centered * made).sum(1) / made.square().sum(1).clamp_min(1e-30)
        low, log_ratio = tensors["gain_range"].double()
        steps = (gains.double().clamp_min(1e-300).log() - low.log()) / log_ratio.clamp_min(1e-12) * 255
        return {"codes": codes, "row_gain": steps.round().clamp(0, 255).to(torch.uint8)}


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
    sample, D, P = rows.sample, spec.embedding_dim, spec.width
    cost = torch.ones(len(sample), **CPU_FLOAT) if rows.weights is None else rows.weights[rows.sample_ids].clone()
    dtype = FLOAT_DTYPES[spec.codebook_dtype]
    mean = (cost @ sample / cost.sum()).to(dtype).float()
    centered = sample - mean
    norms = _norms(centered) if spec.gain_bits else torch.ones(len(sample), **CPU_FLOAT)
    cost *= norms.square()
    unit = centered.div_(norms[:, None]) if spec.gain_bits else centered
    directions: Tensor | None = None
    if spec.rotation:
        variances, vectors = torch.linalg.eigh(weighted_covariance(unit, cost))
        variances, directions = variances.flip(0)[:P], vectors.flip(1)[:, :P].float()
    else:
        variances = weighted_squares(unit, cost)
    rates = allocate(variances, 8 * spec.row_nbytes, spec.window)
    sigma = variances.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(_LEAST_SIGMA * float(sigma.max())).float().clamp_min(1e-18)
    kept = rates > 0
    widening = torch.tensor((1.0, *WIDENING[spec.window]), **CPU_FLOAT)[rates.long()]
    fitted = _fit_ids(len(sample), D)
    columns = unit[fitted] if directions is None else unit[fitted] @ directions
    columns = columns[:, kept] / sigma[kept]
    scale, values = _fit_values(
        columns, cost[fitted], sigma[kept].square(), rates[kept], widening[kept], spec, effort.refine_rounds, step
    )
    full = torch.zeros(P, **CPU_FLOAT)
    full[kept] = sigma[kept] * scale
    projection = (1.0 if directions is None else directions) / torch.where(kept, full, 1.0)
    tensors = {"dim_rates": rates, "row_mean": mean.to(dtype), "dim_scale": full.to(dtype)}
    if directions is not None:
        tensors |= int8_rotation(full[:, None] * directions.T, dtype)
    if spec.value_source == STORED_VALUES:
        tensors["state_values"] = values.to(dtype)
    if spec.gain_bits:
        tensors["gain_range"] = _gain_range(norms, dtype)
    return TrellisQuantizer(spec, tensors, projection.contiguous(), full.square())


def _gain_range(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the least gain and the logarithm of its ratio to the largest (2,), from norms (n,) of rows.

    Norms far below the others, of rows that almost equal the mean, take the least gain: they add little to the
    error, and would make the steps large, or the least gain 0 in float16.
    """
    low = max(float(norms.min()) * 0.9, float(norms.median()) * _LEAST_GAIN, torch.finfo(dtype).tiny)
    high = max(float(norms.max()) * 1.1, low)
    return torch.tensor([low, math.log(high / low)], **CPU_FLOAT).to(dtype)


def _projected(rows: Tensor, projection: Tensor) -> Tensor:
    """Multiply rows (B, D) with a matrix (D, P), or with the diagonal (D,) of one."""
    return rows * projection if projection.ndim == 1 else rows @ projection


def int8_rotation(matrix: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round a matrix (P, D) to `rotation` (P, D) int8 and `dim_scale` (P,), its scale for each row."""
    scale = matrix.abs().amax(1).clamp_min(1e-30) / 127
    return {"rotation": (matrix / scale[:, None]).round().to(torch.int8), "dim_scale": scale.to(dtype)}


def multiplied(tensors: dict[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """Return shared tensors of a table with a rotation, whose rows are multiplied by `matrix` (D, D)."""
    dtype = tensors["dim_scale"].dtype
    rotation = tensors["dim_scale"].float()[:, None] * tensors["rotation"].float()
    mean = (tensors["row_mean"].float() @ matrix).to(dtype)
    return tensors | int8_rotation(rotation @ matrix, dtype) | {"row_mean": mean}


def _fit_values(
    columns: Tensor,
    cost: Tensor,
    variances: Tensor,
    rates: Tensor,
    scale: Tensor,
    spec: TrellisSpec,
    rounds: int,
    step: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Alternate between search, scales (P,) by least squares, and values (2**window,) by averages if stored."""
    values, dtype = seeded_values(spec.window, spec.seed), FLOAT_DTYPES[spec.codebook_dtype]
    for _ in range(rounds):
        target, weights = columns / scale, variances * scale.square()
        states, _ = search_paths(target, weights, rates, spec.window, values)
        made = values[states.long()]
        by_row = made * cost[:, None]
        scale = ((columns * by_row).sum(0) / (made * by_row).sum(0).clamp_min(1e-9)).clamp_min(_LEAST_SCALE)
        if spec.value_source == STORED_VALUES:
            share = (cost[:, None] * (variances * scale.square())).flatten().double()
            flat, prior = states.flatten().long(), _PRIOR_COUNT * share.mean()
            total = torch.bincount(flat, share * (columns / scale).flatten(), 2**spec.window)
            count = torch.bincount(flat, share, 2**spec.window)
            values = ((total + prior * values) / (count + prior)).to(dtype).float()
        step()
    return scale, values


def weighted_covariance(rows: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted second moments of rows (n, D) with weights (n,), in blocks: (D, D) float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device="cpu")
    for part, cost in zip(torch.split(rows, _MOMENT_ROWS), torch.split(weights, _MOMENT_ROWS), strict=True):
        total += ((part * cost[:, None]).T @ part).double()
    return total / weights.sum(dtype=torch.float64)


def weighted_squares(rows: Tensor, weights: Tensor) -> Tensor:
    """Compute the diagonal of `weighted_covariance`: (D,) float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device="cpu")
    for part, cost in zip(torch.split(rows, _MOMENT_ROWS), torch.split(weights, _MOMENT_ROWS), strict=True):
        total += part.square().T @ cost
    return total / weights.sum(dtype=torch.float64)


def _norms(rows: Tensor) -> Tensor:
    """Return the root mean squares (B,) of rows (B, D), at least 1e-9 of a unit."""
    return rows.square().mean(1).sqrt().clamp_min(1e-9)


def _fit_ids(num_rows: int, dim: int) -> Tensor:
    """Draw the rows of the sample that paths are searched for."""
    limit = min(max(_FIT_VALUES // dim, _FIT_ROWS[0]), _FIT_ROWS[1])
    if num_rows <= limit:
        return torch.arange(num_rows, device="cpu")
    return torch.randperm(num_rows, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:limit]


@dataclass(frozen=True)
class TrellisMethod:
    """Trellis-coded quantization."""

    def check(self, options: ConvertOptions) -> None:
        """Refuse layout options other than a rotation and a window."""
        refuse_others(options, ("rotation", "window"))
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
        variances = facts.principal_variances() if "pca" in rotations else torch.empty(0, **CPU_FLOAT)
        for rotation, gain_bits in product(rotations, (0, 8)):
            spec = TrellisSpec(
                method="trellis",
                row_nbytes=D,
                window=window,
                rotation=rotation,
                gain_bits=gain_bits,
                codebook_dtype=value_dtype(facts, options),
                seed=options.seed,
                **table_fields(facts),
            )
            spec = _largest(spec, variances, budget)
            if options.window is None:
                spec = _largest(replace(spec, window=_best_window(spec)), variances, budget)
            if spec.num_values * FLOAT_DTYPES[spec.codebook_dtype].itemsize <= _STORED_SHARE * budget:
                spec = _largest(replace(spec, value_source=STORED_VALUES), variances, budget)
            yield spec

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


def _best_window(spec: TrellisSpec) -> int:
    """Return the window for rows of a size: 12 bits not at low rates, nor in large tables, where it takes long."""
    N, D = spec.num_embeddings, spec.embedding_dim
    if spec.row_nbytes < _SHORT_WINDOW_BYTES:
        return _SHORTEST_WINDOW
    long = spec.row_nbytes >= max(_LONG_WINDOW_BYTES, _LONG_WINDOW_BITS * D / 8) and N * D <= _LONG_WINDOW_VALUES
    return _LONG_WINDOW if long else _SHORT_WINDOW


def _largest(spec: TrellisSpec, variances: Tensor, budget: float) -> TrellisSpec:
    """Return the layout with the most bytes per row within a budget, and the rank that those bytes are worth."""
    N, D = spec.num_embeddings, spec.embedding_dim
    least = -(-spec.window // 8)
    for _ in range(4):  # the rotation takes bytes, of which the number depends on the rates
        side = spec.nbytes - N * spec.row_nbytes
        row_nbytes = max(least, min(spec.width, int((budget - side) // N)))
        rank = spec.rank
        if spec.rotation:
            rates = allocate(variances, 8 * row_nbytes, spec.window)
            coded = max(int((rates > 0).sum()), row_nbytes)
            rank = coded if coded < D else None
        if (row_nbytes, rank) == (spec.row_nbytes, spec.rank):
            break
        spec = replace(spec, row_nbytes=row_nbytes, rank=rank)
    over = max(0, -int((budget - spec.nbytes) // N))
    return replace(spec, row_nbytes=max(least, spec.row_nbytes - over))


TRELLIS = TrellisMethod()
