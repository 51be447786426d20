"""Refine a table's codes and codebooks on its dense rows.

`refine` starts from the codes and codebooks of a table and reads all of its rows in blocks. It alternates between
re-solving the codebooks jointly by least squares, re-encoding the rows by local search (Babenko & Lempitsky 2014;
Martinez et al. 2018), and solving for the rotation (orthogonal Procrustes problem).

Shapes: N rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.quantize.base import TableRows
from cqr_compress.quantize.code_search import beam_search, point_rows, search_codes
from cqr_compress.quantize.normal_equations import NormalEquations
from cqr_compress.quantize.rotation import procrustes
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.codes import row_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import STORED, CodebookSpec, TrellisSpec

_RESTARTS, _BEAM = 4, 16


_ORTHOGONAL = 0.05


@dataclass(frozen=True)
class Refinement:
    """Result of `refine`.

    Attributes:
        tensors: `codes`, `codebooks` and `rotation` where the spec has them, in the spec's dtypes.
        errors: weighted relative squared error before the first round, and after each.
    """

    tensors: dict[str, Tensor]
    errors: tuple[float, ...]


def refine(
    rows: TableRows,
    spec: CodebookSpec,
    tensors: dict[str, Tensor],
    refine_rounds: int,
    step: Callable[[], None] = lambda: None,
) -> Refinement:
    """Re-solve codebooks and re-encode rows alternately, starting from a table's codes.

    Args:
        rows: the dense rows of the table; all rows are read twice in each round.
        spec: spec of the table.
        tensors: `codes`, `codebooks` and `rotation` where the spec has them.
        refine_rounds: number of rounds.
        step: called after each round.

    Raises:
        NonFiniteError: a refined value is outside the range of its dtype.
    """
    C, S = spec.num_columns, spec.sub_dim
    weights = torch.ones(spec.num_embeddings, **CPU_FLOAT) if rows.weights is None else rows.weights.clone()
    weights[rows.stored_apart_ids] = 0
    codebooks = tensors["codebooks"].float()
    packed = tensors["codes"].clone() if "codes" in tensors else None
    rotation = tensors["rotation"].float() if "rotation" in tensors else None

    def columns() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Iterate over blocks: slice of ids, rows (B, D), rotated rows by column (C, B, S), codes (B, C, L)."""
        for start, block in rows.blocks():
            at = slice(start, start + len(block))
            ids = torch.arange(at.start, at.stop, device="cpu")
            transposed = block if rotation is None else block @ rotation.T
            codes = row_codes(spec, None if packed is None else packed[at], ids).to(torch.int64)
            yield at, block, transposed.view(-1, C, S).transpose(0, 1).contiguous(), codes

    def measure(round_: int | None) -> float:
        """Compute the relative error; with a round, re-encode all rows first and re-solve the rotation last."""
        nonlocal rotation
        error = norm = 0.0
        cross = torch.zeros(spec.embedding_dim, spec.width, **CPU_FLOAT)
        for at, block, parts, codes in columns():
            if round_ is not None and packed is not None:
                for c, part in enumerate(parts):
                    codes[:, c] = _encode(part, codebooks[c], codes[:, c], spec, spec.seed + round_ + at.start)
                stored = [i for i, source in enumerate(spec.code_sources) if source == STORED]
                packed[at] = pack_codes(codes[:, :, stored].flatten(1), spec.n_bits)
            decoded = decode_codes(codes, codebooks)
            cost = weights[at]
            transposed = parts.transpose(0, 1).reshape(len(block), -1)
            energy = block.square().sum(1)
            lost = energy - transposed.square().sum(1) if spec.rank else torch.zeros(len(block), **CPU_FLOAT)
            error += float(((lost + (transposed - decoded).square().sum(1)) * cost).sum(dtype=torch.float64))
            norm += float((energy * cost).sum(dtype=torch.float64))
            if spec.rotation == "opq":
                cross += (block * cost[:, None]).T @ decoded
        if round_ is not None and rotation is not None and spec.rotation == "opq":
            rotation = procrustes(torch.eye(len(cross), **CPU_FLOAT), cross).T.contiguous()
        return error / max(norm, 1e-300)

    errors = [measure(None)]
    for round_ in range(refine_rounds):
        equations = [NormalEquations.from_codebooks(codebooks[c]) for c in range(C)]
        for at, _, parts, codes in columns():
            for c, part in enumerate(parts):
                equations[c].add(part, codes[:, c], weights[at])
        codebooks = torch.stack([equations[c].solve(codebooks[c]) for c in range(C)])
        if round_ == refine_rounds - 1:
            held = {"codebooks": codebooks} if rotation is None else {"codebooks": codebooks, "rotation": rotation}
            codebooks = as_in_file(spec, held)["codebooks"].float()
        errors.append(measure(round_))
        step()
    made = {"codebooks": codebooks}
    if packed is not None:
        made["codes"] = packed
    if rotation is not None:
        made["rotation"] = rotation
    return Refinement(as_in_file(spec, made), tuple(errors))


def can_refine(spec: CodebookSpec | TrellisSpec, tensors: dict[str, Tensor]) -> bool:
    """Return whether a refit supports these tensors: the rows of a rotation are orthonormal up to rounding."""
    if "rotation" not in tensors:
        return True
    rotation = torch.nn.functional.normalize(tensors["rotation"].float(), dim=1)
    return float((rotation @ rotation.T - torch.eye(spec.width, **CPU_FLOAT)).abs().max()) < _ORTHOGONAL


def _encode(part: Tensor, codebooks: Tensor, codes: Tensor, spec: CodebookSpec, seed: int) -> Tensor:
    """Improve the codes (B, L) of one column's rows (B, S)."""
    if spec.num_stored_levels == spec.num_levels:
        found = search_codes(part, codebooks, codes, _RESTARTS, seed)
        if spec.num_levels > 1:  # local search depends on its start: beam search gives a second one
            other = search_codes(part, codebooks, beam_search(part, codebooks, _BEAM), _RESTARTS, seed + 1)
            better = _errors(part, codebooks, other) < _errors(part, codebooks, found)
            found[better] = other[better]
        return found
    if spec.num_stored_levels == 1:
        codes = codes.clone()
        codes[:, spec.code_sources.index(STORED)] = point_rows(part, codebooks, codes, spec)
    return codes


def _errors(rows: Tensor, codebooks: Tensor, codes: Tensor) -> Tensor:
    """Compute the squared errors (B,) of codes (B, L) of rows (B, S)."""
    decoded = torch.stack([book[codes[:, level]] for level, book in enumerate(codebooks)]).sum(0)
    return (rows - decoded).square().sum(1)
