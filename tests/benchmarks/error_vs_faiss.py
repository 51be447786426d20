"""Relative MSE at equal total bytes: our methods beside faiss's PQ, OPQ and RQ used directly.

    python tests/benchmarks/error_vs_faiss.py TABLE.safetensors --bits-per-dim 1 2

For each budget every layout of faiss that fits is fitted and the best is shown: codes, codebooks in float16 and,
for OPQ, the rotation in float16 are counted, and the codebooks are rounded to float16 before decoding, as ours
are. Ours is what `convert --method auto --bits-per-dim B` writes, its bytes measured. The seed is 0 throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.commands.convert import convert
from cqr_compress.planning.find import find_tables
from cqr_compress.quantize.options import ConvertOptions

SEED = 1234  # faiss's own default


def total_bytes(N: int, D: int, num_codes: int, n_bits: int, codebook_values: int, rotated: bool) -> int:
    return N * ((num_codes * n_bits + 7) // 8) + 2 * codebook_values + (2 * D * D if rotated else 0)


def relative_mse(rows: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.square(rows - decoded, dtype=np.float64).sum() / np.square(rows, dtype=np.float64).sum())


def rounded(vector: faiss.Float32Vector) -> None:
    values = faiss.vector_to_array(vector).astype(np.float16).astype(np.float32)
    faiss.copy_array_to_vector(values, vector)


def product_quantizer(rows: np.ndarray, M: int, n_bits: int) -> np.ndarray:
    pq = faiss.ProductQuantizer(rows.shape[1], M, n_bits)
    pq.cp.seed = SEED
    pq.train(rows)
    codes = pq.compute_codes(rows)
    rounded(pq.centroids)
    return pq.decode(codes)


def optimized_product_quantizer(rows: np.ndarray, M: int, n_bits: int) -> np.ndarray:
    D = rows.shape[1]
    opq = faiss.OPQMatrix(D, M)
    inner = faiss.ProductQuantizer(D, M, n_bits)
    inner.cp.min_points_per_centroid = 1
    opq.pq = inner
    opq.train(rows)
    return opq.reverse_transform(product_quantizer(opq.apply(rows), M, n_bits))


def residual_quantizer(rows: np.ndarray, M: int, n_bits: int) -> np.ndarray:
    rq = faiss.ResidualQuantizer(rows.shape[1], M, n_bits)
    rq.train(rows)
    codes = rq.compute_codes(rows)
    rounded(rq.codebooks)
    return rq.decode(codes)


def faiss_layouts(
    N: int, D: int, budget: int, floor: float, max_levels: int
) -> Iterator[tuple[str, int, int, int]]:
    """Layouts of each method whose total lies between floor * budget and budget: (method, M, n_bits, bytes)."""
    for n_bits in range(3, 11):
        for M in (M for M in range(1, D + 1) if D % M == 0):
            for method in ("PQ", "OPQ"):
                size = total_bytes(N, D, M, n_bits, 2**n_bits * D, method == "OPQ")
                if floor * budget < size <= budget:
                    yield method, M, n_bits, size
        sizes = {M: total_bytes(N, D, M, n_bits, M * 2**n_bits * D, False) for M in range(1, max_levels + 1)}
        fitting = [M for M, size in sizes.items() if size <= budget]
        if fitting:
            yield "RQ", fitting[-1], n_bits, sizes[fitting[-1]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop faiss's warnings of few points per centroid, which C++ prints to stderr."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as sink:  # noqa: PTH123
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--table", help="name of the table; the largest found by default")
    parser.add_argument("--bits-per-dim", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument(
        "--floor", type=float, default=0.85, help="least share of the budget that faiss PQ/OPQ uses"
    )
    parser.add_argument("--max-rq-levels", type=int, default=64, help="faiss takes minutes for many levels")
    parser.add_argument("--methods", nargs="+", default=["auto"], help="our methods to run")
    args = parser.parse_args()
    fits = {"PQ": product_quantizer, "OPQ": optimized_product_quantizer, "RQ": residual_quantizer}
    with open_checkpoint(args.checkpoint) as checkpoint:
        found = [c for c in find_tables(checkpoint) if c.selected]
        name = args.table or max(found, key=lambda c: c.nbytes).name
        rows = checkpoint.entries[name].stored.read().float().numpy()
    N, D = rows.shape
    print(f"{name} {N} x {D}")
    for bits in args.bits_per_dim:
        budget = int(N * D * bits / 8)
        best: dict[str, tuple[float, str, int, float]] = {}
        for method, M, n_bits, size in faiss_layouts(N, D, budget, args.floor, args.max_rq_levels):
            began = time.perf_counter()
            with quiet():
                error = relative_mse(rows, fits[method](rows, M, n_bits))
            row = (error, f"{M}x{n_bits}b", size, time.perf_counter() - began)
            best[method] = min(best.get(method, row), row)
        for method in args.methods:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                report = convert(
                    args.checkpoint,
                    Path(folder) / "small.safetensors",
                    ConvertOptions(method=method, bits_per_dim=bits),
                    tables=[name],
                )
            t = report.tables[0]
            seconds = time.perf_counter() - began
            best[f"ours {method}"] = (t.relative_mse or 0.0, f"{t.method} {t.layout}", t.bytes_after, seconds)
        for method, (error, layout, size, seconds) in best.items():
            print(
                f"{bits:5.2f} bits/dim  {method:10s} {layout:16s} {size:>9d} bytes "
                f"({8 * size / (N * D):.3f} bits/dim)  relative MSE {error:.4f}  {seconds:6.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
