"""CQR of a trained table: stored pointers and a hashed helper in each column, fitted without training data.

"Clustering the Sketch", arXiv:2210.05974, Algorithm 3, applied to an existing table: k-means gives pointers and
codewords. Unlike in the paper, the helper's codewords are not zero: alternately, both codebooks of a column are
solved jointly by least squares, and each pointer is reassigned to the codeword nearest to the helper's residual.

Shapes: n or B rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.quantize.additive import codebook_effort, fit_additive, num_steps, sample_weights
from cqr_compress.quantize.base import FitEffort, Quantizer, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.code_search import point_rows
from cqr_compress.quantize.kmeans import fit_centroids
from cqr_compress.quantize.layouts import budget_bytes, codebook_layouts
from cqr_compress.quantize.normal_equations import solve_codebooks
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.codes import computed_codes
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import HASHED, STORED, AnySpec, CodebookSpec

_N_BITS = tuple(range(1, 13))
_SOURCES = {"hashed": (STORED, HASHED), "stored": (STORED, STORED), "none": (STORED,)}
"""Code sources by helper."""


@dataclass(frozen=True)
class ClusteredQuantizer:
    """Fitted codebooks, whose pointers encode the residual of the computed levels.

    Attributes:
        spec: the table's spec, with one level of stored codes.
        codebooks: (C, L, K, S) in `spec.codebook_dtype`.
    """

    spec: CodebookSpec
    codebooks: Tensor

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the codebooks."""
        return {"codebooks": self.codebooks}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, codes_width) uint8."""
        spec, books = self.spec, self.codebooks.float()
        helper = computed_codes(spec, torch.arange(first_row, first_row + len(rows), device="cpu"))
        columns = rows.view(len(rows), spec.num_columns, spec.sub_dim).unbind(1)
        codes = [point_rows(column, books[c], helper[:, c], spec) for c, column in enumerate(columns)]
        return {"codes": pack_codes(torch.stack(codes, 1), spec.n_bits)}


def fit_clustered(
    rows: Tensor,
    ids: Tensor,
    spec: CodebookSpec,
    effort: FitEffort,
    step: Callable[[], None],
    weights: Tensor | None = None,
) -> ClusteredQuantizer:
    """Fit pointers and helpers to sampled rows.

    Args:
        rows: (n, D) float32, finite.
        ids: (n,) int64, ids of the rows.
        spec: a spec with one level of stored codes; the codes of the others are computed.
        effort: k-means iterations, and rounds of reassigning pointers and solving.
        step: called after k-means and after each round of each column; see `num_clustered_steps`.
        weights: (n,) float32, positive weights of the rows' squared errors; all 1 if None.

    Returns:
        The quantizer, its codebooks rounded to `spec.codebook_dtype`.
    """
    C, L, K, S = spec.num_columns, spec.num_levels, spec.codebook_size, spec.sub_dim
    level = spec.code_sources.index(STORED)
    codebooks = torch.zeros(C, L, K, S, **CPU_FLOAT)
    codes = computed_codes(spec, ids)
    for c in range(C):
        column = rows[:, c * S : (c + 1) * S].contiguous()
        codebooks[c, level] = fit_centroids(column, K, spec.seed + c, effort.kmeans_iterations, weights)
        step()
        for _ in range(effort.refine_rounds):
            codes[:, c, level] = point_rows(column, codebooks[c], codes[:, c], spec)
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
            step()
    return ClusteredQuantizer(spec, as_in_file(spec, {"codebooks": codebooks})["codebooks"])


def num_clustered_steps(spec: CodebookSpec, effort: FitEffort) -> int:
    """Return the number of calls of `step` in `fit_clustered`."""
    return spec.num_columns * (1 + effort.refine_rounds)


@dataclass(frozen=True)
class CqrMethod:
    """Pointers to clusters in each column, with or without a helper codebook.

    Attributes:
        standard: default effort.
    """

    standard: FitEffort

    def check(self, options: ConvertOptions) -> None:
        """Refuse levels, which follow from the helper, and rotations, which clustering does not support."""
        refuse_others(options, ("num_columns", "n_bits", "helper"))

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return whether columns and bits are given."""
        return options.num_columns is not None and options.n_bits is not None

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over layouts of the given helper; without one, of all helpers, or hashed if without budget."""
        helpers = [options.helper] if options.helper else list(_SOURCES)
        if options.helper is None and budget_bytes(facts, options) is None:
            helpers = ["hashed"]
        for sources in (_SOURCES[helper] for helper in helpers):
            for spec in codebook_layouts(options, facts, n_bits=_N_BITS, num_levels=(len(sources),)):
                yield replace(spec, code_sources=sources)

    def makes(self, spec: AnySpec) -> bool:
        """Return whether the levels are those of one of the helpers."""
        return isinstance(spec, CodebookSpec) and spec.code_sources in _SOURCES.values() and not spec.rotation

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the effort of the final fit; see `codebook_effort`."""
        return codebook_effort(self.standard, spec, refine_rounds)

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the maximum number of calls of `step` in `fit`."""
        assert isinstance(spec, CodebookSpec)
        return num_steps(spec, effort) if _is_additive(spec) else num_clustered_steps(spec, effort)

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> Quantizer:
        """Fit pointers and helper to the sampled rows; as additive codes if no level is hashed."""
        assert isinstance(spec, CodebookSpec)
        if _is_additive(spec):
            return fit_additive(rows.sample, spec, effort, step, sample_weights(rows))
        return fit_clustered(rows.sample, rows.sample_ids, spec, effort, step, sample_weights(rows))


def _is_additive(spec: CodebookSpec) -> bool:
    return spec.num_stored_levels == spec.num_levels


CQR = CqrMethod(FitEffort(refine_rounds=6, restarts=2))
