"""An index of faiss that holds the codes of a compressed table, for searches in faiss."""

from __future__ import annotations

from typing import Any, cast

import faiss
import numpy as np

from cqr_compress.errors import SpecError
from cqr_compress.table.spec import STORED, CodebookSpec
from cqr_compress.table.table import CompressedTable


def to_faiss(layer: Any, metric: str = "inner_product") -> faiss.Index:
    """Make an index of faiss with the codes and codebooks of a table; vectors are not encoded again.

        index = cqr.to_faiss(model.item_embedding)
        scores, ids = index.search(queries, 10)

    One column or several without further levels become an IndexPQ, one column with levels an
    IndexResidualQuantizer, several with levels an IndexProductResidualQuantizer; a rotation becomes an
    IndexPreTransform around it.

    Args:
        layer: a layer with a compressed table, or a `CompressedTable`.
        metric: "inner_product", or "l2", which of rotations takes orthonormal ones only.

    Raises:
        SpecError: a layout that faiss has no index for.
    """
    table: CompressedTable = layer if isinstance(layer, CompressedTable) else layer.table()
    spec = table.spec
    if metric not in ("inner_product", "l2"):
        raise SpecError(f"metric is {metric!r}: choose from inner_product, l2")
    if not isinstance(spec, CodebookSpec) or set(spec.code_sources) != {STORED}:
        raise SpecError(
            f"faiss has no index for {spec.method} {spec.layout}: use layer.topk, or convert with pq, rq or prq"
        )
    if spec.codebook_size != 1 << spec.n_bits:
        raise SpecError(f"faiss has no codebooks of {spec.codebook_size} codewords: a power of 2 is required")
    if spec.num_kept_rows or spec.num_zero_rows:
        raise SpecError(
            f"faiss has no index with {spec.num_kept_rows + spec.num_zero_rows} rows that are stored apart: use "
            "layer.topk, or leave rows of zeros out of the table"
        )
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    codebooks = table.tensors["codebooks"].detach().float().cpu().numpy()  # (C, L, K, S)
    C, L, _, _ = codebooks.shape
    library: Any = faiss  # its type stubs lack some names
    if L == 1:
        index: Any = faiss.IndexPQ(spec.width, C, spec.n_bits, kind)
        faiss.copy_array_to_vector(codebooks.reshape(-1), index.pq.centroids)
    elif C == 1:
        index = faiss.IndexResidualQuantizer(spec.width, L, spec.n_bits, kind)
        _set_codebooks(index.rq, codebooks)
    else:
        index = library.IndexProductResidualQuantizer(spec.width, C, L, spec.n_bits, kind)
        for column in range(C):
            _set_codebooks(library.downcast_AdditiveQuantizer(index.prq.subquantizer(column)), codebooks[column])
        _set_codebooks(index.prq, codebooks)
    index.is_trained = True
    codes = table.tensors["codes"].cpu().numpy()
    if index.code_size != codes.shape[1]:
        raise SpecError(f"faiss has codes of {index.code_size} bytes for {spec.layout}, not {codes.shape[1]}")
    faiss.copy_array_to_vector(np.ascontiguousarray(codes).reshape(-1), index.codes)
    index.ntotal = len(codes)
    if "rotation" not in table.tensors:
        return cast(faiss.Index, index)
    rotation = table.tensors["rotation"].detach().float().cpu().numpy()  # (width, D)
    is_orthonormal = bool(np.allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-2))
    if kind == faiss.METRIC_L2 and not (is_orthonormal and rotation.shape[0] == rotation.shape[1]):
        raise SpecError("distances after this rotation are not those before it: use metric='inner_product'")
    transform = faiss.LinearTransform(rotation.shape[1], rotation.shape[0], False)
    faiss.copy_array_to_vector(np.ascontiguousarray(rotation).reshape(-1), transform.A)
    transform.is_trained, transform.is_orthonormal = True, is_orthonormal
    whole = faiss.IndexPreTransform(transform, index)
    whole.is_trained, whole.ntotal = True, index.ntotal
    return whole


def _set_codebooks(quantizer: Any, codebooks: np.ndarray[Any, Any]) -> None:
    faiss.copy_array_to_vector(np.ascontiguousarray(codebooks).reshape(-1), quantizer.codebooks)
    quantizer.is_trained = True
