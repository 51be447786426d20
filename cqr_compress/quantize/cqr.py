"""CQR of a trained table: stored pointers and a hashed helper in each column, fitted without data.

"Clustering the Sketch", arXiv:2210.05974, Algorithm 3, applied to a table that is there: k-means gives pointers
and codewords. Unlike the paper, the helper's codewords are not zero: both codebooks of a column are solved jointly
by least squares, and ids point anew to the codeword nearest to what the helper leaves, in turns.

Shapes: n or B rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.quantize.additive import codebook_effort, fit_additive, num_steps, sample_weights
from cqr_compress.quantize.base import Effort, Quantizer, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids
from cqr_compress.quantize.layouts import budget_bytes, codebook_layouts
from cqr_compress.quantize.normal_equations import solve_codebooks
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.codes import computed_codes
from cqr_compress.table.spec import FLOAT_DTYPES, HASHED, STORED, AnySpec, CodebookSpec

_N_BITS = tuple(range(1, 13))
_SOURCES = {"hashed": (STORED, HASHED), "stored": (STORED, STORED), "none": (STORED,)}
"""Code sources by helper."""


@dataclass(frozen=True)
class ClusteredQuantizer:
    """Fitted codebooks that point rows to codewords, given what the helper adds.

    Attributes:
        spec: the table's spec, with one level of stored codes.
        codebooks: (C, L, K, S) in `spec.codebook_dtype`.
    """

    spec: CodebookSpec
    codebooks: Tensor

    def shared_tensors(self) -> dict[str, Tensor]:
        """The codebooks."""
        return {"codebooks": self.codebooks}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, codes_width) uint8."""
        spec, books = self.spec, self.codebooks.float()
        helper = computed_codes(spec, torch.arange(first_row, first_row + len(rows)))
        columns = rows.view(len(rows), spec.num_columns, spec.sub_dim).unbind(1)
        codes = [point_rows(column, books[c], helper[:, c], spec) for c, column in enumerate(columns)]
        return {"codes": pack_codes(torch.stack(codes, 1), spec.n_bits)}


def fit_clustered(
    rows: Tensor,
    ids: Tensor,
    spec: CodebookSpec,
    effort: Effort,
    step: Callable[[], None],
    weights: Tensor | None = None,
) -> ClusteredQuantizer:
    """Fit pointers and helpers to sampled rows.

    Args:
        rows: (n, D) float32, finite.
        ids: (n,) int64, which rows they are.
        spec: a spec with one level of stored codes and others that are computed.
        effort: k-means iterations, and refine_rounds of solving and pointing.
        step: called after k-means and after each round of each column; `num_clustered_steps`.
        weights: (n,) float32, positive: what an error at a row costs; 1 for each if None.

    Returns:
        The quantizer, its codebooks rounded to `spec.codebook_dtype`.
    """
    C, L, K, S = spec.num_columns, spec.num_levels, spec.codebook_size, spec.sub_dim
    level = spec.code_sources.index(STORED)
    codebooks = torch.zeros(C, L, K, S)
    codes = computed_codes(spec, ids)
    for c in range(C):
        column = rows[:, c * S : (c + 1) * S].contiguous()
        codebooks[c, level] = fit_centroids(column, K, spec.seed + c, effort.kmeans_iterations, weights)
        step()
        for _ in range(effort.refine_rounds):
            codes[:, c, level] = point_rows(column, codebooks[c], codes[:, c], spec)
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
            step()
    return ClusteredQuantizer(spec, codebooks.to(FLOAT_DTYPES[spec.codebook_dtype]))


def num_clustered_steps(spec: CodebookSpec, effort: Effort) -> int:
    """Calls of `step` that `fit_clustered` makes."""
    return spec.num_columns * (1 + effort.refine_rounds)


def point_rows(column: Tensor, codebooks: Tensor, codes: Tensor, spec: CodebookSpec) -> Tensor:
    """Name the stored codeword nearest to what the other levels leave of a column.

    Args:
        column: (B, S) float32.
        codebooks: (L, K, S) float32.
        codes: (B, L) int64; the stored level's are not read.
        spec: which level is stored.

    Returns:
        (B,) int64.
    """
    stored = spec.code_sources.index(STORED)
    rest = column
    for level in range(spec.num_levels):
        if level != stored:
            rest = rest - codebooks[level][codes[:, level]]
    return nearest_centroids(rest.contiguous(), codebooks[stored])


@dataclass(frozen=True)
class CqrMethod:
    """Cluster pointers in each column, with or without a helper codebook."""

    standard: Effort

    def check(self, options: ConvertOptions) -> None:
        """Levels follow from the helper, and no rotation would survive a clustering."""
        refuse_others(options, ("num_columns", "n_bits", "helper"))

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Whether columns and bits are given."""
        return options.num_columns is not None and options.n_bits is not None

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Layouts of the helper that was asked for; of all of them where they are compared at equal bytes."""
        helpers = [options.helper] if options.helper else list(_SOURCES)
        if options.helper is None and budget_bytes(facts, options) is None:
            helpers = ["hashed"]
        for sources in (_SOURCES[helper] for helper in helpers):
            for spec in codebook_layouts(options, facts, n_bits=_N_BITS, num_levels=(len(sources),)):
                yield replace(spec, code_sources=sources)

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> Effort:
        """Rounds of least squares and re-encoding."""
        return codebook_effort(self.standard, spec, refine_rounds)

    def num_steps(self, spec: AnySpec, effort: Effort) -> int:
        """Rounds of each column, with a hashed helper; else those of additive codes."""
        assert isinstance(spec, CodebookSpec)
        return num_steps(spec, effort) if _is_additive(spec) else num_clustered_steps(spec, effort)

    def fit(self, rows: TableRows, spec: AnySpec, effort: Effort, step: Callable[[], None]) -> Quantizer:
        """Fit pointers and helper to the sampled rows."""
        assert isinstance(spec, CodebookSpec)
        if _is_additive(spec):
            return fit_additive(rows.sample, spec, effort, step, sample_weights(rows))
        return fit_clustered(rows.sample, rows.sample_ids, spec, effort, step, sample_weights(rows))


def _is_additive(spec: CodebookSpec) -> bool:
    return spec.num_stored_levels == spec.num_levels


CQR = CqrMethod(Effort(refine_rounds=6, restarts=2))
