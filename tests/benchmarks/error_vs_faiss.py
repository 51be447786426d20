"""Relative MSE and recall at equal total bytes: our methods beside faiss's quantizers used directly.

    python tests/benchmarks/error_vs_faiss.py TABLE.safetensors --bits-per-dim 0.5 1 2 3 4

For each budget every layout of faiss that fits is fitted and the best is shown: codes, codebooks in float16 and,
for OPQ, the rotation in float16 are counted, and the codebooks are rounded to float16 before decoding, as ours
are. Ours is what `convert --method auto --bits-per-dim B` writes, its bytes measured. The seed is 0 throughout.

The bound is that of Gaussian rows with the table's covariance (reverse water-filling) at the bytes that a row of the
table has in all, in dB of the table's mean square. PRQ and LSQ of faiss are slow: of PRQ, layouts with codes of 4, 6
and 8 bits in 2, 4, 8 and 16 columns are fitted; LSQ up to `--max-lsq-levels`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.commands.convert import convert
from cqr_compress.planning.find import find_tables
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.quality import table_quality

SEED = 1234  # faiss's own default


def total_bytes(N: int, D: int, num_codes: int, n_bits: int, codebook_values: int, rotated: bool) -> int:
    return N * ((num_codes * n_bits + 7) // 8) + 2 * codebook_values + (2 * D * D if rotated else 0)


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
    return additive_quantizer(rows, faiss.ResidualQuantizer(rows.shape[1], M, n_bits))


def local_search_quantizer(rows: np.ndarray, M: int, n_bits: int) -> np.ndarray:
    return additive_quantizer(rows, faiss.LocalSearchQuantizer(rows.shape[1], M, n_bits))


def product_residual_quantizer(rows: np.ndarray, M: int, n_bits: int) -> np.ndarray:
    columns, levels = divmod(M, _LEVELS)
    return additive_quantizer(rows, faiss.ProductResidualQuantizer(rows.shape[1], columns, levels, n_bits))


def additive_quantizer(rows: np.ndarray, quantizer: faiss.AdditiveQuantizer) -> np.ndarray:
    quantizer.train(rows)
    codes = quantizer.compute_codes(rows)
    rounded(quantizer.codebooks)
    return quantizer.decode(codes)


_LEVELS = 1000
"""M of PRQ is columns * _LEVELS + levels."""


def bound_db(rows: np.ndarray, bits: float) -> float:
    """Return the signal-to-noise ratio of the rate-distortion bound of Gaussian rows, at `bits` per dimension."""
    variances = np.linalg.eigvalsh(np.cov(rows.T, bias=True).astype(np.float64)).clip(1e-30)
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        rate = np.maximum(0, np.log2(variances / level) / 2).sum()
        low, high = (level, high) if rate > bits * len(variances) else (low, level)
    mean_square = np.square(rows, dtype=np.float64).sum() / len(rows)
    return float(-10 * np.log10(np.minimum(variances, level).sum() / mean_square))


def faiss_layouts(
    N: int, D: int, budget: int, floor: float, max_levels: int, max_lsq_levels: int
) -> Iterator[tuple[str, int, int, int]]:
    """Layouts of each method whose total lies between floor * budget and budget: (method, M, n_bits, bytes)."""
    for n_bits, columns in itertools.product((4, 6, 8), (2, 4, 8, 16)):
        if D % columns == 0:
            sizes = {m: total_bytes(N, D, columns * m, n_bits, m * 2**n_bits * D, False) for m in range(2, 17)}
            fitting = [m for m, size in sizes.items() if size <= budget]
            if fitting and floor * budget < sizes[fitting[-1]]:
                yield "PRQ", columns * _LEVELS + fitting[-1], n_bits, sizes[fitting[-1]]
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
        fitting = [M for M in fitting if max_lsq_levels >= M and floor * budget < sizes[M]]
        if fitting and n_bits in (4, 6, 8):
            yield "LSQ", fitting[-1], n_bits, sizes[fitting[-1]]


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
    parser.add_argument("--max-lsq-levels", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=["auto"], help="our methods to run")
    parser.add_argument("--ours", action="store_true", help="fit none of faiss's layouts")
    args = parser.parse_args()
    fits = {
        "PQ": product_quantizer, "OPQ": optimized_product_quantizer, "RQ": residual_quantizer,
        "PRQ": product_residual_quantizer, "LSQ": local_search_quantizer,
    }  # fmt: skip
    with open_checkpoint(args.checkpoint) as checkpoint:
        found = [c for c in find_tables(checkpoint) if c.selected]
        name = args.table or max(found, key=lambda c: c.nbytes).name
        rows = checkpoint.entries[name].stored.read().float().numpy()
    (N, D), source = rows.shape, torch.from_numpy(rows)
    print(f"{name} {N} x {D}")
    for bits in args.bits_per_dim:
        budget = int(N * D * bits / 8)
        best: dict[str, tuple[float, str, int, float, float]] = {}
        limits = args.floor, args.max_rq_levels, args.max_lsq_levels
        for method, M, n_bits, size in [] if args.ours else faiss_layouts(N, D, budget, *limits):
            began = time.perf_counter()
            with quiet():
                decoded = torch.from_numpy(fits[method](rows, M, n_bits))
            seconds = time.perf_counter() - began
            quality = table_quality([(0, source)], lambda a, b, rows=decoded: rows[a:b], N)
            shape = f"{M // _LEVELS}x{M % _LEVELS}" if method == "PRQ" else M
            row = (quality.relative_mse, f"{shape}x{n_bits}b", size, quality.recall_at_10, seconds)
            best[method] = min(best.get(method, row), row)
        for method in args.methods:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                report = convert(
                    args.checkpoint,
                    Path(folder) / "small.safetensors",
                    ConvertOptions(method=method, bits_per_dim=bits, prior="none"),
                    tables=[name],
                )
            t = report.tables[0]
            seconds = time.perf_counter() - began
            found_recall = t.recall_at_10 or 0.0
            layout = f"{t.method} {t.layout}"
            best[f"ours {method}"] = (t.relative_mse or 0.0, layout, t.bytes_after, found_recall, seconds)
        for method, (error, layout, size, recall, seconds) in best.items():
            spent = 8 * size / (N * D)
            print(
                f"{bits:4.2f} bits/dim  {method:9s} {layout:14s} {size:>8d} bytes ({spent:.3f} bits/dim)  relative "
                f"MSE {error:.5f}  {-10 * np.log10(error):5.2f} dB (bound {bound_db(rows, spent):5.2f})  recall@10 "
                f"{recall:.3f}  {seconds:6.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
