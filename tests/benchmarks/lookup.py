"""Time lookups in compressed layers beside nn.Embedding, as ratios on the same ids.

    python tests/benchmarks/lookup.py [--rows 100000 4000000] [--batch 512 4096 65536] [--device cpu]

Both sides are called in turn, in blocks of calls on fresh batches; a figure is the median over the rounds of
compressed time / dense time, below 1 where the compressed layer is faster. Tables are random: the time does not
depend on their values. CQR_COMPRESS_NATIVE=0 turns the compiled lookup off.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cqr_compress import CompressedEmbedding, CompressedTable
from cqr_compress.kernel.build import native
from cqr_compress.table.spec import STORED, AnySpec, CodebookSpec, RowwiseSpec, TrellisSpec


def specs(num_rows: int, dim: int) -> dict[str, AnySpec]:
    """The layouts that are timed."""

    def codebook(columns: int, levels: int, bits: int) -> CodebookSpec:
        return CodebookSpec(
            method="benchmark", num_embeddings=num_rows, embedding_dim=dim, num_columns=columns, num_levels=levels,
            codebook_size=2**bits, code_sources=(STORED,) * levels,
        )  # fmt: skip

    def trellis(rotation: str | None) -> TrellisSpec:
        return TrellisSpec(
            method="trellis",
            num_embeddings=num_rows,
            embedding_dim=dim,
            tier_nbytes=(dim // 4,),
            rotation=rotation,
        )

    return {
        "pq 16x8": codebook(16, 1, 8),
        "rq 8x8": codebook(1, 8, 8),
        "pq 16x4": codebook(16, 1, 4),
        "int8": RowwiseSpec(method="int8", num_embeddings=num_rows, embedding_dim=dim, n_bits=8),
        "trellis": trellis(None),
        "trellis pca": trellis("pca"),
    }


def random_table(spec: AnySpec) -> CompressedTable:
    tensors = {}
    for short, shape in spec.tensor_shapes().items():
        if short == "dim_rates":
            tensors[short] = torch.full(shape.shape, 2, dtype=torch.uint8)
        elif not shape.dtype.is_floating_point:
            tensors[short] = torch.randint(torch.iinfo(shape.dtype).max, shape.shape).to(shape.dtype)
        else:
            tensors[short] = torch.randn(shape.shape).to(shape.dtype)
    return CompressedTable(spec, tensors)


def draw_ids(distribution: str, num_rows: int, batch: int, count: int) -> list[Tensor]:
    """Batches of ids: uniform, or Zipf's law with exponent 1 over shuffled ids."""
    if distribution == "uniform":
        return [torch.randint(num_rows, (batch,)) for _ in range(count)]
    cumulative = (1.0 / torch.arange(1, num_rows + 1, dtype=torch.float64)).cumsum(0)
    cumulative /= cumulative[-1].clone()
    order = torch.randperm(num_rows)
    places = [torch.searchsorted(cumulative, torch.rand(batch, dtype=torch.float64)) for _ in range(count)]
    return [order[place.clamp_max(num_rows - 1)] for place in places]


def forward(layer: nn.Module) -> Callable[[Tensor], None]:
    def run(ids: Tensor) -> None:
        with torch.no_grad():
            layer(ids)

    return run


def forward_backward(layer: nn.Module, gradient: Tensor) -> Callable[[Tensor], None]:
    def run(ids: Tensor) -> None:
        layer.zero_grad(set_to_none=True)
        layer(ids).backward(gradient)

    return run


def seconds(run: Callable[[Tensor], None], batches: list[Tensor]) -> float:
    """Mean time of a call over the batches."""
    on_gpu = batches[0].is_cuda
    run(batches[-1])
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for ids in batches:
        run(ids)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(batches)


def compare(
    dense: Callable[[Tensor], None],
    compressed: Callable[[Tensor], None],
    pool: list[Tensor],
    calls: int,
    rounds: int,
) -> tuple[float, float]:
    """Median ratio of the times, and the median time of the dense side in seconds."""
    ratios, times = [], []
    for each in range(rounds):
        batches = [pool[(each * calls + i) % len(pool)] for i in range(calls)]
        a = seconds(dense, batches)
        b = seconds(compressed, batches)
        ratios.append(b / a)
        times.append(a)
    return statistics.median(ratios), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time lookups in compressed layers beside nn.Embedding.")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 4_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 4096, 65_536])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layouts", nargs="+", help="layouts to time; all by default")
    parser.add_argument("--forward", action="store_true", help="time no backward passes")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the compressed layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "gradients of float16")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, native: {native().library is not None}")
    for num_rows in args.rows:
        dense = nn.Embedding(num_rows, args.dim, device=args.device)
        table_mb = num_rows * args.dim * 4 / 2**20
        print(f"\n{num_rows} x {args.dim}, {table_mb:.0f} MiB dense; compressed time / dense time")
        layers = {
            name: CompressedEmbedding(random_table(spec)).to(args.device)
            for name, spec in specs(num_rows, args.dim).items()
            if name in (args.layouts or [name])
        }
        if args.compile:
            layers |= {f"{n} compiled": torch.compile(layer) for n, layer in list(layers.items())}
        print(f"{'':38}{'dense':>10} " + " ".join(f"{name:>17}" for name in layers), flush=True)
        for distribution in ("uniform", "zipf"):
            for batch in args.batch:
                pool = [ids.to(args.device) for ids in draw_ids(distribution, num_rows, batch, 40)]
                gradient = torch.randn(batch, args.dim, device=args.device)
                for direction in ("forward", "forward+backward")[: 1 if args.forward else 2]:
                    cells, base = [], 0.0
                    for layer in layers.values():
                        if direction == "forward":
                            calls, sides = max(4, min(40, 200_000 // batch)), (forward(dense), forward(layer))
                        else:
                            calls = 1 if num_rows > 10**6 else 4
                            sides = forward_backward(dense, gradient), forward_backward(layer, gradient)
                        ratio, base = compare(*sides, pool, calls, args.rounds)
                        cells.append(f"{ratio:17.2f}")
                    dense.zero_grad(set_to_none=True)
                    label = f"{distribution:8} {batch:6} {direction}"
                    print(f"{label:38}{base * 1e6:7.0f} us " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
