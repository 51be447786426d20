"""Stored codes: product, residual and product-residual quantization as one additive quantizer per column.

PQ (Jegou, Douze & Schmid 2011, doi:10.1109/TPAMI.2010.57) is one level in many columns, RQ (Chen, Guan & Wang
2010, doi:10.3390/s101211259) many levels in one column. Codebooks start from k-means on residuals. Where
`Effort.refine_rounds` allows, all codebooks of a column are then re-solved jointly by least squares between
re-encodings, as in additive quantization (Babenko & Lempitsky 2014) and LSQ (Martinez et al. 2016, 2018).

Shapes: n or B rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.errors import SpecError
from cqr_compress.quantize.base import Effort, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.code_search import encode_rows, search_codes
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids
from cqr_compress.quantize.layouts import codebook_layouts
from cqr_compress.quantize.normal_equations import solve_codebooks
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.rotation import balanced_pca, procrustes
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.spec import FLOAT_DTYPES, AnySpec, CodebookSpec

_PQ_BITS = tuple(range(1, 13))
_OTHER_BITS = (4, 5, 6, 8)
_MAX_LEVELS = 64
_OPQ_ROUNDS = 12


@dataclass(frozen=True)
class AdditiveQuantizer:
    """Fitted codebooks that encode rows.

    Attributes:
        spec: the table's spec.
        codebooks: (C, L, K, S) in `spec.codebook_dtype`.
        rotation: (width, D) in the same dtype, or None; decoded rows are on_matmul by it.
        effort: how rows are encoded.
    """

    spec: CodebookSpec
    codebooks: Tensor
    rotation: Tensor | None
    effort: Effort

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors of the table that do not grow with its rows."""
        tensors = {"codebooks": self.codebooks}
        return tensors if self.rotation is None else {**tensors, "rotation": self.rotation}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, codes_width) uint8."""
        if self.rotation is not None:
            rows = rows @ self.rotation.float().T
        seed = self.spec.seed + first_row
        codes = encode_rows(rows, self.codebooks.float(), self.effort, seed)
        return {"codes": pack_codes(codes.flatten(1), self.spec.n_bits)}


def fit_additive(
    rows: Tensor, spec: CodebookSpec, effort: Effort, step: Callable[[], None], weights: Tensor | None = None
) -> AdditiveQuantizer:
    """Fit codebooks, and the rotation where the spec has one, to sampled rows.

    Args:
        rows: (n, D) float32, finite.
        spec: layout to fit.
        effort: work to put in.
        step: called after each unit of work; there are `num_steps(spec, effort)`.
        weights: (n,) float32, positive: what an error at a row costs; 1 for each if None.

    Returns:
        The quantizer, its tensors rounded to `spec.codebook_dtype`.
    """
    C, L, K = spec.num_columns, spec.num_levels, spec.codebook_size
    rotation = balanced_pca(rows, C, spec.rank) if spec.rotation else None
    rotated = rows if rotation is None else rows @ rotation
    codebooks = torch.empty(C, L, K, spec.sub_dim)
    codes = torch.empty(len(rows), C, L, dtype=torch.int64)
    columns = rotated.view(len(rows), C, spec.sub_dim).transpose(0, 1).contiguous()
    for c, column in enumerate(columns):
        residual = column
        for level in range(L):
            seed = spec.seed + c * L + level
            codebooks[c, level] = fit_centroids(residual, K, seed, effort.kmeans_iterations, weights)
            codes[:, c, level] = nearest_centroids(residual, codebooks[c, level])
            residual = residual - codebooks[c, level][codes[:, c, level]]
        step()
    exact = len(rows) <= K
    for round_ in range(0 if exact else effort.refine_rounds):
        for c, column in enumerate(columns):
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
            codes[:, c] = search_codes(column, codebooks[c], codes[:, c], effort.restarts, spec.seed + round_)
        if spec.rotation == "opq":
            rotation = procrustes(rows, decode_codes(codes, codebooks), weights)
            columns = (rows @ rotation).view(len(rows), C, spec.sub_dim).transpose(0, 1).contiguous()
        step()
    dtype = FLOAT_DTYPES[spec.codebook_dtype]
    if not exact and effort.refine_rounds:
        for c, column in enumerate(columns):
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
    decode_rotation = None if rotation is None else rotation.T.contiguous().to(dtype)
    return AdditiveQuantizer(spec, codebooks.to(dtype), decode_rotation, effort)


def num_steps(spec: CodebookSpec, effort: Effort) -> int:
    """Calls of `step` that `fit_additive` makes at most."""
    return spec.num_columns + effort.refine_rounds


@dataclass(frozen=True)
class AdditiveMethod:
    """A method whose codes are all stored.

    Attributes:
        takes: options of the layout that it takes.
        needs: those of them that fix the size of a table.
        n_bits: bits of a code that are tried.
        num_levels: levels that are tried.
        single_column: rows are not split.
        standard: effort where the user sets none.
    """

    takes: tuple[str, ...]
    needs: tuple[str, ...]
    n_bits: tuple[int, ...]
    num_levels: tuple[int, ...]
    single_column: bool
    standard: Effort

    def check(self, options: ConvertOptions) -> None:
        """Refuse a helper, more levels or columns than the method has, and a rotation that would do nothing."""
        refuse_others(options, self.takes)
        if len(self.num_levels) == 1 and options.num_levels not in (None, *self.num_levels):
            raise SpecError(f"pq has one level, not {options.num_levels}; prq has more")
        if self.single_column and options.num_columns not in (None, 1):
            raise SpecError(f"rq has one column, not {options.num_columns}; prq has more")
        if options.rank is not None and not options.rotation:
            raise SpecError("rank goes with a rotation: 'opq' or 'pca'")
        if options.rotation and options.rank is None and self.single_column:
            raise SpecError("rq takes a rotation only with a rank: its one codebook rotates by itself")

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Whether bits and counts of columns and levels are all given."""
        return all(getattr(options, name) is not None for name in self.needs)

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Layouts of stored codes."""
        levels = (options.num_levels,) if options.num_levels else self.num_levels
        return codebook_layouts(
            options, facts, n_bits=self.n_bits, num_levels=levels, single_column=self.single_column
        )

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> Effort:
        """The method's own; OPQ alternates between codes and rotation."""
        return codebook_effort(self.standard, spec, refine_rounds)

    def num_steps(self, spec: AnySpec, effort: Effort) -> int:
        """Columns, and rounds."""
        assert isinstance(spec, CodebookSpec)
        return num_steps(spec, effort)

    def fit(self, rows: TableRows, spec: AnySpec, effort: Effort, step: Callable[[], None]) -> AdditiveQuantizer:
        """Fit the sampled rows."""
        assert isinstance(spec, CodebookSpec)
        return fit_additive(rows.sample, spec, effort, step, sample_weights(rows))


def codebook_effort(standard: Effort, spec: AnySpec, refine_rounds: int | None) -> Effort:
    """Effort with the rounds that the user set; if None, the method's own, and at least 12 with OPQ."""
    if refine_rounds is None:
        rotates = isinstance(spec, CodebookSpec) and spec.rotation == "opq"
        refine_rounds = max(standard.refine_rounds, _OPQ_ROUNDS if rotates else 0)
    return replace(standard, refine_rounds=refine_rounds)


def sample_weights(rows: TableRows) -> Tensor | None:
    """Weights of the sampled rows, (n,), or None."""
    return None if rows.weights is None else rows.weights[rows.sample_ids]


_ROTATED = ("rotation", "rank")
PQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_columns", "n_bits"),
    n_bits=_PQ_BITS,
    num_levels=(1,),
    single_column=False,
    standard=Effort(),
)
RQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_levels", "n_bits"),
    n_bits=_OTHER_BITS,
    num_levels=tuple(range(1, _MAX_LEVELS + 1)),
    single_column=True,
    standard=Effort(refine_rounds=4, restarts=1),
)
PRQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_columns", "num_levels", "n_bits"),
    n_bits=_OTHER_BITS,
    num_levels=tuple(range(1, _MAX_LEVELS + 1)),
    single_column=False,
    standard=Effort(refine_rounds=6, restarts=2),
)
