"""Inner products of queries with all rows of a compressed table, and top-k search, in blocks of rows.

The product of a query with a row is the sum of its products with the row's codewords. Therefore each query is
multiplied with the codebooks once, and a row needs one addition for each of its codes instead of D multiplications
(asymmetric distance computation, Jegou et al. 2011, doi:10.1109/TPAMI.2010.57; for recommenders RecJPQ and PQTopK,
Petrov & Macdonald 2024, arXiv:2312.06165 and arXiv:2408.09992). The products of several queries with one codeword
are contiguous, so that the sum over a row's codes is one embedding_bag. On a GPU, rows are decoded and multiplied
instead, which takes less time there, in larger blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cqr_compress.errors import ShapeError
from cqr_compress.nn.lookup import unrotated_rows
from cqr_compress.table.codes import flat_codes, row_codes
from cqr_compress.table.decode import at_least_float32, decode_rows, sum_codewords
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.tracing import is_exporting, is_tracing

BLOCK_ROWS = 16_384
BLOCK_QUERIES = 64
GPU_BLOCK_VALUES = 2**25
"""Decoded values and scores of one block on a GPU."""
_ALIGNED = 8  # embedding_bag is vectorized over queries, and slow for fewer than a vector


class TopK(NamedTuple):
    """The k rows with the largest inner products for each query, in descending order.

    Attributes:
        values: (..., k) inner products.
        indices: (..., k) int64 ids.
    """

    values: Tensor
    indices: Tensor


def search_scores(spec: AnySpec, tensors: Mapping[str, Tensor], h: Tensor) -> Tensor:
    """Compute h @ rows.T without decoding the rows; see `TableLayer.scores`.

    In addition to the result it needs about 4 * BLOCK_ROWS * (BLOCK_QUERIES + C * L) bytes, and 4 * C * L * K
    bytes for each of BLOCK_QUERIES queries.
    """
    queries, shape = _queries(spec, h), (*h.shape[:-1], spec.num_embeddings)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (h, *tensors.values()))
    if graph or is_exporting():
        parts = [
            torch.cat([scores for _, scores in _blocks(spec, tensors, part)]).t()
            for part in _query_blocks(queries)
        ]
        return torch.cat(parts).to(h.dtype).view(shape)
    out = torch.empty(len(queries), spec.num_embeddings, dtype=h.dtype, device=h.device)
    for part, into in zip(_query_blocks(queries), _query_blocks(out), strict=True):
        for start, scores in _blocks(spec, tensors, part):
            into[:, start : start + len(scores)] = scores.t()
    return out.view(shape)


@torch.no_grad()
def search_topk(spec: AnySpec, tensors: Mapping[str, Tensor], h: Tensor, k: int) -> TopK:
    """Find the k largest of h @ rows.T for each query; see `TableLayer.topk`.

    Ties at the k-th place are resolved in favour of the smaller id for rows of different row blocks.

    Raises:
        ShapeError: k is outside 1 to N, or the queries do not have D dimensions.
    """
    N = spec.num_embeddings
    if not 1 <= k <= N:
        raise ShapeError(f"k is {k}: give a number from 1 to the {N} rows of the table")
    queries, shape = _queries(spec, h), (*h.shape[:-1], k)
    if queries.shape[0] == 0:
        return TopK(h.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=h.device))
    found = [_best_of(spec, tensors, part, k) for part in _query_blocks(queries)]
    return TopK(
        torch.cat([values for values, _ in found]).to(h.dtype).view(shape),
        torch.cat([indices for _, indices in found]).view(shape),
    )


def _best_of(spec: AnySpec, tensors: Mapping[str, Tensor], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best rows; from each block only rows that exceed some query's k-th product are merged."""
    values = queries.new_empty(queries.shape[0], 0)
    indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=queries.device)
    for start, scores in _blocks(spec, tensors, queries):
        rows = torch.arange(start, start + len(scores), device=queries.device)
        if scores.is_cuda:  # where the program would wait for the result of a comparison
            scores, best = scores.t().contiguous().topk(min(k, len(rows)), dim=1)
            scores, rows = scores.t(), rows[best].t()
        elif values.shape[1] == k:
            # `not <= 0` instead of `> 0`: NaN is the largest value, as in torch.topk
            beats = ((scores - values[:, -1]).amax(1) <= 0).logical_not_().nonzero().flatten()
            if len(beats) == 0:
                continue
            scores, rows = scores[beats], rows[beats]
        values = torch.cat([values, scores.t()], 1)
        indices = torch.cat([indices, rows.t() if rows.ndim == 2 else rows.expand(queries.shape[0], -1)], 1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, best)
    return values, indices


def _queries(spec: AnySpec, h: Tensor) -> Tensor:
    """Return queries as (Q, D) in the dtype of the computation."""
    if h.ndim == 0 or h.shape[-1] != spec.embedding_dim:
        raise ShapeError(f"queries of shape {tuple(h.shape)} do not match rows of {spec.embedding_dim} dimensions")
    return at_least_float32(h.reshape(-1, spec.embedding_dim))


def _query_blocks(queries: Tensor) -> Sequence[Tensor]:
    """Split queries into blocks; an exported program has one, because its number of queries varies."""
    return (queries,) if is_exporting() else torch.split(queries, BLOCK_QUERIES)


def _blocks(spec: AnySpec, tensors: Mapping[str, Tensor], queries: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the scores of all rows, exact and zero rows included: pairs of the first id and (R, Q)."""
    N, Q = spec.num_embeddings, queries.shape[0]
    rows = N if is_tracing() else BLOCK_ROWS
    on_gpu = queries.is_cuda and not is_tracing()
    if on_gpu:
        rows = max(rows, GPU_BLOCK_VALUES // (Q + spec.embedding_dim))
    decodes = on_gpu or isinstance(spec, TrellisSpec)
    products: Tensor | None = None
    if decodes:  # (x R + m) . h = x . (h R^T) + m . h
        projected, mean = _projected(tensors, queries.t()), tensors.get("row_mean")
        constant = None if mean is None else mean.to(queries.dtype) @ queries.t()
    elif isinstance(spec, CodebookSpec):
        products = _codeword_products(spec, tensors, queries)
    for start in range(0, N, rows):
        ids = torch.arange(start, min(start + rows, N), device=queries.device)
        if decodes:
            scores = unrotated_rows(spec, tensors, ids).to(queries.dtype) @ projected
            scores = scores if constant is None else scores + constant
        elif isinstance(spec, CodebookSpec):
            assert products is not None, "made of the same spec"
            packed = tensors["codes"][start : start + rows] if "codes" in tensors else None
            flat = flat_codes(row_codes(spec, packed, ids), spec.codebook_size).flatten(1)
            scores = sum_codewords(flat, products, flat.shape[1])[:, :Q]
        else:
            here = {short: tensors[short][start : start + rows] for short in spec.body_shapes()}
            scores = decode_rows(spec, here, ids).to(queries.dtype) @ queries.t()
        yield start, _with_exact_rows(spec, tensors, queries, start, scores)


def _projected(tensors: Mapping[str, Tensor], queries: Tensor) -> Tensor:
    """Multiply the rotation (P, D), if there is one, with queries (D, Q)."""
    return tensors["rotation"].to(queries.dtype) @ queries if "rotation" in tensors else queries


def _codeword_products(spec: CodebookSpec, tensors: Mapping[str, Tensor], queries: Tensor) -> Tensor:
    """Compute the products of all codewords with all queries, (C * L * K, Q), Q padded to a multiple of 8."""
    C, S = spec.num_columns, spec.sub_dim
    codebooks = tensors["codebooks"].to(queries.dtype)
    if "rotation" in tensors:  # (x R) . h = x . (h R^T)
        queries = queries @ tensors["rotation"].to(queries.dtype).t()
    if not is_exporting():
        Q = queries.shape[0]
        queries = F.pad(queries, (0, 0, 0, -Q % _ALIGNED if Q else _ALIGNED))
    products = torch.einsum("clks,qcs->clkq", codebooks, queries.view(queries.shape[0], C, S))
    return products.reshape(spec.num_levels * C * spec.codebook_size, queries.shape[0])


def _with_exact_rows(
    spec: AnySpec, tensors: Mapping[str, Tensor], queries: Tensor, start: int, scores: Tensor
) -> Tensor:
    if "kept_ids" not in tensors:
        return scores
    kept, zero = tensors["kept_ids"].tensor_split([spec.num_kept_rows])
    whole = is_tracing()  # a traced graph has one block of all rows, and must not depend on values
    for sorted_ids, values in ((kept, tensors["kept_rows"]), (zero, None)):
        inside = slice(None) if whole else (sorted_ids >= start) & (sorted_ids < start + len(scores))
        at = sorted_ids[inside].to(torch.int64) - start
        if len(at) == 0:
            continue
        if values is None:
            scores = scores.index_fill(0, at, 0.0)
        else:
            scores = scores.index_copy(0, at, values[inside].to(queries.dtype) @ queries.t())
    return scores
