"""Methods with hashed codes: the hashing trick and quotient-remainder embeddings, fitted to a trained table.

The codes are computed from the ids, so only the codebooks are stored. The codebooks M solve the least-squares
problem min ||H M - T||: row i of H has a one at the code of id i in each level, T is the table.

hash: Weinberger et al. 2009, doi:10.1145/1553374.1553516. qr: Shi et al. 2020, doi:10.1145/3394486.3403059.
Unlike in the paper, the quotient is i // ceil(N / K) instead of i // K, so that K rows of both codebooks are used
for every K; pairs of codes are still unique if N <= K * K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.quantize.base import FitEffort, TableFacts, TableRows, refuse_int8, refuse_others
from cqr_compress.quantize.layouts import budget_bytes, table_fields, value_dtype
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.base_spec import FLOAT_DTYPES
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.codes import computed_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import HASHED, QUOTIENT, REMAINDER, AnySpec, CodebookSpec

_CG_ITERATIONS = 30
_CG_TOLERANCE = 1e-5


@dataclass(frozen=True)
class HashedQuantizer:
    """Fitted codebooks with computed codes, of which nothing is stored for a row."""

    spec: CodebookSpec
    codebooks: Tensor

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the codebooks (C, L, K, S)."""
        return {"codebooks": self.codebooks}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Return no tensors: all codes are computed from the ids."""
        return {}


def fit_hashed(
    blocks: Callable[[], Iterator[tuple[int, Tensor]]],
    stored_apart_ids: Tensor,
    spec: CodebookSpec,
    step: Callable[[], None],
    weights: Tensor | None = None,
) -> HashedQuantizer:
    """Fit the codebooks to all rows of a table, read once in row blocks.

    The right-hand side H^T W T, W the weights, takes one pass over the rows; the normal equations are then solved
    by preconditioned conjugate gradients (Hestenes & Stiefel 1952), which needs the ids only.

    Args:
        blocks: begins a pass over the table, as pairs of the first id and a (B, D) float32 block.
        stored_apart_ids: (r,) int64, ids of rows that are left out of the fit.
        spec: a spec whose codes are all computed.
        step: called after the pass and after each iteration.
        weights: (N,) float32, positive weights of the rows' squared errors; all 1 if None.

    Returns:
        The quantizer, its codebooks rounded to `spec.codebook_dtype`.
    """
    shape = (spec.num_columns, spec.num_levels, spec.codebook_size, spec.sub_dim)
    target, counts = torch.zeros(shape, **CPU_FLOAT), torch.zeros(shape[:3], **CPU_FLOAT)
    for first, rows in blocks():
        ids = torch.arange(first, first + len(rows), device="cpu")
        wanted = ~torch.isin(ids, stored_apart_ids)
        ids, rows = ids[wanted], rows[wanted]
        codes = computed_codes(spec, ids)
        cost = torch.ones(len(rows), **CPU_FLOAT) if weights is None else weights[ids]
        _add_rows(target, codes, rows * cost[:, None])
        for c in range(shape[0]):
            for level in range(shape[1]):
                counts[c, level].index_add_(0, codes[:, c, level], cost)
    step()
    inverse = 1.0 / counts.clamp_min(1e-6)[..., None]  # Jacobi preconditioner; exact for one level
    solution = target * inverse
    if spec.num_levels > 1:
        solution = _conjugate_gradients(
            lambda x: _normal_product(spec, stored_apart_ids, x, weights), target, solution * 0, inverse, step
        )
    return HashedQuantizer(spec, as_in_file(spec, {"codebooks": solution})["codebooks"])


def num_hashed_steps(spec: CodebookSpec) -> int:
    """Return the maximum number of calls of `step` in `fit_hashed`."""
    return 1 + (_CG_ITERATIONS if spec.num_levels > 1 else 0)


def _add_rows(out: Tensor, codes: Tensor, rows: Tensor) -> None:
    """Add H^T rows to `out` in place: each row's columns to the codewords it uses."""
    C, L, _, S = out.shape
    for c in range(C):
        for level in range(L):
            out[c, level].index_add_(0, codes[:, c, level], rows[:, c * S : (c + 1) * S])


def _normal_product(
    spec: CodebookSpec, stored_apart_ids: Tensor, codebooks: Tensor, weights: Tensor | None
) -> Tensor:
    """Compute H^T W H codebooks, from the ids only."""
    out = torch.zeros_like(codebooks)
    for start, stop in row_blocks(spec.num_embeddings, spec.embedding_dim * 2):
        ids = torch.arange(start, stop, device="cpu")
        ids = ids[~torch.isin(ids, stored_apart_ids)]
        codes = computed_codes(spec, ids)
        rows = decode_codes(codes, codebooks)
        _add_rows(out, codes, rows if weights is None else rows * weights[ids, None])
    return out


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, x: Tensor, inverse: Tensor, step: Callable[[], None]
) -> Tensor:
    """Solve product(x) = target for a symmetric positive semidefinite operator, starting from x."""
    residual = target - product(x)
    preconditioned = residual * inverse
    direction = preconditioned
    energy = first_energy = (residual * preconditioned).sum()
    for _ in range(_CG_ITERATIONS):
        if energy <= first_energy * _CG_TOLERANCE**2:
            break
        image = product(direction)
        length = energy / (direction * image).sum()
        x = x + length * direction
        residual = residual - length * image
        preconditioned = residual * inverse
        new_energy = (residual * preconditioned).sum()
        direction = preconditioned + new_energy / energy * direction
        energy = new_energy
        step()
    return x


@dataclass(frozen=True)
class HashedMethod:
    """A method whose codes are computed from the ids.

    Attributes:
        code_sources: code source of each level.
    """

    code_sources: tuple[str, ...]

    def check(self, options: ConvertOptions) -> None:
        """Refuse all layout options except num_columns: the budget determines the codebook size."""
        refuse_others(options, ("num_columns",))
        refuse_int8(options)

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return False: the codebook size follows from the budget."""
        return False

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over the only layout: the largest codebooks within the budget; pairs of qr have to be unique."""
        N, D = facts.shape
        dtype = value_dtype(facts, options)
        smallest = 1 if self.code_sources == (HASHED,) else int((N - 1) ** 0.5) + 1

        def spec(size: int) -> CodebookSpec:
            return CodebookSpec(
                method=options.method,
                num_columns=options.num_columns or 1,
                num_levels=len(self.code_sources),
                codebook_size=size,
                code_sources=self.code_sources,
                codebook_dtype=dtype,
                seed=options.seed,
                **table_fields(facts),
            )

        codeword_bytes = len(self.code_sources) * D * FLOAT_DTYPES[dtype].itemsize
        fixed_bytes = spec(smallest).nbytes - smallest * codeword_bytes
        size = int(((budget_bytes(facts, options) or 0.0) - fixed_bytes) // codeword_bytes)
        yield spec(max(smallest, min(size, N)))

    def makes(self, spec: AnySpec) -> bool:
        """Return whether the codes of all levels are those of the method."""
        return isinstance(spec, CodebookSpec) and spec.code_sources == self.code_sources and not spec.rotation

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the default effort, which has no effect."""
        return FitEffort()

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the maximum number of calls of `step` in `fit`: the pass and the solver's iterations."""
        assert isinstance(spec, CodebookSpec)
        return num_hashed_steps(spec)

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> HashedQuantizer:
        """Fit the codebooks to all rows."""
        assert isinstance(spec, CodebookSpec)
        return fit_hashed(rows.blocks, rows.stored_apart_ids, spec, step, rows.weights)


HASH = HashedMethod((HASHED,))
QR = HashedMethod((QUOTIENT, REMAINDER))
