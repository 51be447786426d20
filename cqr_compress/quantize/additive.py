"""Methods with stored codes: product, residual and product-residual quantization, additive in each column.

PQ (Jegou, Douze & Schmid 2011, doi:10.1109/TPAMI.2010.57) is one level in many columns, RQ (Chen, Guan & Wang
2010, doi:10.3390/s101211259) is many levels in one column. Codebooks are initialized by k-means on residuals.
Then, for `FitEffort.refine_rounds` rounds, all codebooks of a column are re-solved jointly by least squares and
the rows re-encoded, as in additive quantization (Babenko & Lempitsky 2014) and LSQ (Martinez et al. 2016, 2018).

Shapes: n or B rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.errors import SpecError
from cqr_compress.quantize.base import FitEffort, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.code_search import encode_rows, search_codes
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids
from cqr_compress.quantize.layouts import codebook_layouts
from cqr_compress.quantize.normal_equations import solve_codebooks
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.rotation import balanced_pca, procrustes
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import AnySpec, CodebookSpec

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
        rotation: (width, D) in the same dtype, or None; decoded rows are multiplied by it.
        effort: effort of encoding.
    """

    spec: CodebookSpec
    codebooks: Tensor
    rotation: Tensor | None
    effort: FitEffort

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the codebooks, and the rotation if there is one."""
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
    rows: Tensor, spec: CodebookSpec, effort: FitEffort, step: Callable[[], None], weights: Tensor | None = None
) -> AdditiveQuantizer:
    """Fit codebooks, and the rotation where the spec has one, to sampled rows.

    Args:
        rows: (n, D) float32, finite.
        spec: layout to fit.
        effort: effort of the fit.
        step: called after each unit of work, at most `num_steps(spec, effort)` times.
        weights: (n,) float32, positive weights of the rows' squared errors; all 1 if None.

    Returns:
        The quantizer, its tensors rounded to `spec.codebook_dtype`.
    """
    C, L, K = spec.num_columns, spec.num_levels, spec.codebook_size
    rotation = balanced_pca(rows, C, spec.rank) if spec.rotation else None
    rotated = rows if rotation is None else rows @ rotation
    codebooks = torch.empty(C, L, K, spec.sub_dim, **CPU_FLOAT)
    codes = torch.empty(len(rows), C, L, dtype=torch.int64, device="cpu")
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
    if not exact and effort.refine_rounds:
        for c, column in enumerate(columns):
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
    made = {"codebooks": codebooks} if rotation is None else {"codebooks": codebooks, "rotation": rotation.T}
    made = as_in_file(spec, made)
    if rotation is not None:
        made["rotation"] = made["rotation"].contiguous()
    return AdditiveQuantizer(spec, made["codebooks"], made.get("rotation"), effort)


def num_steps(spec: CodebookSpec, effort: FitEffort) -> int:
    """Return the maximum number of calls of `step` in `fit_additive`."""
    return spec.num_columns + effort.refine_rounds


@dataclass(frozen=True)
class AdditiveMethod:
    """A method whose codes are all stored.

    Attributes:
        takes: supported layout options.
        needs: options that together determine the size of a table.
        n_bits: bits of a code to try.
        num_levels: numbers of levels to try.
        single_column: whether rows are not split into columns.
        standard: default effort.
    """

    takes: tuple[str, ...]
    needs: tuple[str, ...]
    n_bits: tuple[int, ...]
    num_levels: tuple[int, ...]
    single_column: bool
    standard: FitEffort

    def check(self, options: ConvertOptions) -> None:
        """Refuse a helper, more levels or columns than the method has, and a rotation without effect."""
        refuse_others(options, self.takes)
        if len(self.num_levels) == 1 and options.num_levels not in (None, *self.num_levels):
            raise SpecError(f"num_levels is {options.num_levels}: pq has one level, use prq for more")
        if self.single_column and options.num_columns not in (None, 1):
            raise SpecError(f"num_columns is {options.num_columns}: rq has one column, use prq for more")
        if options.rank is not None and not options.rotation:
            raise SpecError(f"rank is {options.rank!r} without a rotation: give rotation 'opq' or 'pca'")
        if options.rotation and options.rank is None and self.single_column:
            raise SpecError(
                f"rotation is {options.rotation!r} without a rank: rq has one column, for which a rotation has an "
                "effect only with a reduced rank; give a rank"
            )

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return whether all options of `needs` are given."""
        return all(getattr(options, name) is not None for name in self.needs)

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over layouts whose codes are all stored."""
        levels = (options.num_levels,) if options.num_levels else self.num_levels
        return codebook_layouts(
            options, facts, n_bits=self.n_bits, num_levels=levels, single_column=self.single_column
        )

    def makes(self, spec: AnySpec) -> bool:
        """Return whether all codes are stored, of as many levels and columns as the method has."""
        if not isinstance(spec, CodebookSpec) or spec.num_stored_levels < spec.num_levels:
            return False
        levels_fit = len(self.num_levels) > 1 or spec.num_levels in self.num_levels
        return levels_fit and (spec.num_columns == 1 or not self.single_column)

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the effort of the final fit, with more rounds for OPQ; see `codebook_effort`."""
        return codebook_effort(self.standard, spec, refine_rounds)

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the maximum number of calls of `step` in `fit`."""
        assert isinstance(spec, CodebookSpec)
        return num_steps(spec, effort)

    def fit(
        self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]
    ) -> AdditiveQuantizer:
        """Fit codebooks and rotation to the sampled rows."""
        assert isinstance(spec, CodebookSpec)
        return fit_additive(rows.sample, spec, effort, step, sample_weights(rows))


def codebook_effort(standard: FitEffort, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
    """Return an effort with the given rounds; if None, the method's default, at least 12 with OPQ."""
    if refine_rounds is None:
        rotates = isinstance(spec, CodebookSpec) and spec.rotation == "opq"
        refine_rounds = max(standard.refine_rounds, _OPQ_ROUNDS if rotates else 0)
    return replace(standard, refine_rounds=refine_rounds)


def sample_weights(rows: TableRows) -> Tensor | None:
    """Return the weights (n,) of the sampled rows, or None for equal weights."""
    return None if rows.weights is None else rows.weights[rows.sample_ids]


_ROTATED = ("rotation", "rank")
PQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_columns", "n_bits"),
    n_bits=_PQ_BITS,
    num_levels=(1,),
    single_column=False,
    standard=FitEffort(),
)
RQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_levels", "n_bits"),
    n_bits=_OTHER_BITS,
    num_levels=tuple(range(1, _MAX_LEVELS + 1)),
    single_column=True,
    standard=FitEffort(refine_rounds=4, restarts=1),
)
PRQ = AdditiveMethod(
    takes=("num_columns", "num_levels", "n_bits", *_ROTATED),
    needs=("num_columns", "num_levels", "n_bits"),
    n_bits=_OTHER_BITS,
    num_levels=tuple(range(1, _MAX_LEVELS + 1)),
    single_column=False,
    standard=FitEffort(refine_rounds=6, restarts=2),
)
