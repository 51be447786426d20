"""Sketches: tables with random codebooks and hashed codes, to be trained from scratch.

All sketches use the codebook formula, with different columns, levels and code sources. A layer over a sketch is
trained like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cqr_compress.errors import SpecError
from cqr_compress.table.base_spec import dtype_name
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.hashing import hash_ids
from cqr_compress.table.spec import DIGIT, HASHED, QUOTIENT, REMAINDER, STORED, CodebookSpec
from cqr_compress.table.table import CompressedTable


@dataclass(frozen=True)
class Sketch:
    """A kind of sketch.

    Attributes:
        code_sources: code source of each level, as in `CodebookSpec`.
        num_columns: default of C.
        paper: reference.
        summary: description in one line.
    """

    code_sources: tuple[str, ...]
    num_columns: int
    paper: str
    summary: str


SKETCHES: dict[str, Sketch] = {
    "hash": Sketch((HASHED,), 1, "doi:10.1145/1553374.1553516", "hashing trick: ids share whole rows"),
    "qr": Sketch((QUOTIENT, REMAINDER), 1, "doi:10.1145/3394486.3403059", "quotient-remainder, added"),
    "qr_concat": Sketch((DIGIT,), 2, "doi:10.1145/3394486.3403059", "quotient-remainder, concatenated"),
    "hash_embeddings": Sketch((HASHED, HASHED), 1, "arXiv:1709.03933", "two hashed rows, added"),
    "ce": Sketch((HASHED,), 4, "arXiv:2210.05974", "compositional embeddings: one hash in each column"),
    "qr_hybrid": Sketch((HASHED, HASHED), 4, "arXiv:2210.05974", "hash embeddings in each column"),
    "cqr": Sketch((STORED,), 8, "arXiv:2210.05974", "pointers that clustering reassigns"),
    "cqr_helper": Sketch((STORED, HASHED), 4, "arXiv:2210.05974", "pointers and a hashed helper in each column"),
}


def sketch_table(
    method: str,
    num_embeddings: int,
    embedding_dim: int,
    codebook_size: int,
    *,
    num_columns: int | None = None,
    init_scale: float = 1.0,
    zero_row: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> CompressedTable:
    """Create a table with random codebooks, to be trained.

    Unlike in Svenstrup et al. (arXiv:1709.03933), hash embeddings sum their rows without trained weights, as in
    "Clustering the Sketch" (arXiv:2210.05974). Stored pointers are initialized with hashes of the ids.

    Args:
        method: a name of SKETCHES.
        num_embeddings: N.
        embedding_dim: D.
        codebook_size: K codewords in each codebook; a power of two if pointers are stored.
        num_columns: C; the default of SKETCHES if None.
        init_scale: codewords are initialized uniformly in +-init_scale / sqrt(D).
        zero_row: id of a constant zero row (a padding row), or None.
        seed: seed of the hash functions and the codebooks; drawn from torch's generator if None.
        dtype: dtype of the rows and the codebooks.

    Returns:
        The table, on the CPU.

    Raises:
        SpecError: an unknown method, or an invalid shape.
    """
    sketch = SKETCHES.get(method)
    if sketch is None:
        raise SpecError(f"sketch {method!r} is not one of {', '.join(SKETCHES)}")
    if zero_row is not None and not 0 <= zero_row < num_embeddings:
        raise SpecError(f"zero_row {zero_row} is outside the table of {num_embeddings} rows")
    if seed is None:
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    spec = CodebookSpec(
        method=method.removesuffix("_helper"),
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        dtype=dtype_name(dtype),
        num_zero_rows=0 if zero_row is None else 1,
        num_columns=num_columns or sketch.num_columns,
        num_levels=len(sketch.code_sources),
        codebook_size=codebook_size,
        code_sources=sketch.code_sources,
        codebook_dtype=dtype_name(dtype),
        seed=seed,
    )
    shapes = spec.tensor_shapes()
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.rand(shapes["codebooks"].shape, generator=generator, **CPU_FLOAT) * 2 - 1
    tensors = {"codebooks": (codebooks * (init_scale * embedding_dim**-0.5)).to(dtype)}
    if "codes" in shapes:
        tensors["codes"] = torch.empty(shapes["codes"].shape, dtype=torch.uint8, device="cpu")
        C, L = spec.num_columns, spec.num_levels
        for a, b in row_blocks(num_embeddings, 8 * C):
            codes = hash_ids(torch.arange(a, b, device="cpu"), codebook_size, seed, range(0, C * L, L))
            tensors["codes"][a:b] = pack_codes(codes, spec.n_bits)
    if zero_row is not None:
        tensors["kept_ids"] = torch.tensor([zero_row], dtype=shapes["kept_ids"].dtype, device="cpu")
        tensors["kept_rows"] = torch.empty(shapes["kept_rows"].shape, dtype=dtype, device="cpu")
    return CompressedTable(spec, tensors)
