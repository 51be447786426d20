"""Serving: keep a catalogue of item vectors compressed in memory, and answer top-k queries from the codes.

    python examples/serving.py [--num-items 500000] [--dim 64] [--ratio 16]

Items are drawn around cluster centers. Their table is compressed and loaded into a model that was built without
memory for its weights; `layer.topk(queries, k)` finds the largest inner products with all rows without decoding
the table: each query is multiplied with the codebooks once, and a row costs one addition for each of its codes.
Shown are the bytes, the time of a query compared with the dense product, and how many of the dense table's 10 best
are among 10 and among 100 found, a short list that can be re-ranked with exact vectors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cqr_compress as cqr


class Catalogue(nn.Module):
    """Items, and the query tower of a retrieval model."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(num_items, dim)
        self.query = nn.Linear(dim, dim)


def draw_items(num_items: int, dim: int, seed: int) -> Tensor:
    """Rows (N, D) around 1,000 centers, with unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.3, -1, dim)
    centers = torch.randn(1000, dim, generator=generator) * scale
    rows = centers[torch.randint(1000, (num_items,), generator=generator)]
    return rows + 0.7 * torch.randn(num_items, dim, generator=generator) * scale


def median_ms(call: Callable[[], object], rounds: int = 7) -> float:
    """Median time of a call in milliseconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve top-k queries from a compressed table.")
    parser.add_argument("--num-items", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--folder", type=Path, default=Path("serving"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    dense, small = args.folder / "model.safetensors", args.folder / "small.safetensors"
    torch.manual_seed(0)
    model = Catalogue(args.num_items, args.dim)
    model.item_embedding.weight.data = draw_items(args.num_items, args.dim, seed=0)
    save_file(model.state_dict(), dense)
    cqr.convert(dense, small, method="pq", ratio=args.ratio, force=True)

    with cqr.init_empty_weights():  # no memory for the dense table
        served = Catalogue(args.num_items, args.dim)
    cqr.load_compressed(served, small, device="cpu")
    layer = served.item_embedding
    queries = model.query(model.item_embedding.weight[torch.randint(args.num_items, (64,))]).detach()
    with torch.no_grad():
        found = layer.topk(queries, 100).indices
        rows = model.item_embedding.weight.detach()
        exact = (queries @ rows.T).topk(10).indices
        times = median_ms(lambda: layer.topk(queries, 10)), median_ms(lambda: (queries @ rows.T).topk(10))
    hits = [(found[:, :k, None] == exact[:, None, :]).any(1).float().mean() for k in (10, 100)]
    print(f"table in memory: {rows.nbytes:,} bytes dense, {layer.nbytes:,} compressed ({layer.spec.layout})")
    print(f"64 queries, 10 best of {args.num_items:,}: {times[0]:.0f} ms, dense product {times[1]:.0f} ms")
    print(
        f"of the dense table's 10 best, {float(hits[0]):.0%} are among 10 found and {float(hits[1]):.0%} among 100"
    )


if __name__ == "__main__":
    main()
