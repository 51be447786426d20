"""Retrieval with faiss: the codes of a compressed item table as a faiss index, without encoding anything again.

    python examples/retrieval_faiss.py [--num-items 50000] [--dim 64] [--ratio 16] [--folder retrieval]

A recommender is trained, compressed and perhaps fine-tuned; its items are then searched where faiss is in
production already. `cqr.to_faiss(layer)` makes an index of the codes that the model itself reads, so that the
search and the model agree, also after fine-tuning. Items are drawn around cluster centers here. Shown are the
bytes of the index file and how many of the 10 best of the dense table it finds, beside `layer.topk` and an
index that faiss trains itself at the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import nn

import cqr_compress as cqr


def draw_items(num_items: int, dim: int) -> torch.Tensor:
    """Rows (N, D) around 1,000 centers, with unequal variances."""
    scale = torch.logspace(0.3, -1, dim)
    centers = torch.randn(1000, dim) * scale
    return centers[torch.randint(1000, (num_items,))] + 0.7 * torch.randn(num_items, dim) * scale


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the best ids (n, k) that are among those found (n, k)."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Search a compressed table with faiss.")
    parser.add_argument("--num-items", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--folder", type=Path, default=Path("retrieval"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows = draw_items(args.num_items, args.dim)
    queries = rows[torch.randint(len(rows), (200,))] + 0.3 * torch.randn(200, args.dim)
    exact = (queries @ rows.T).topk(10).indices.numpy()

    model = nn.ModuleDict({"item_embedding": nn.Embedding.from_pretrained(rows)})
    (layer,) = cqr.compress_(model, method="pq", ratio=args.ratio)
    index = cqr.to_faiss(model["item_embedding"])
    file = args.folder / "items.faiss"
    faiss.write_index(index, str(file))
    _, found = faiss.read_index(str(file)).search(queries.numpy(), 10)
    print(f"{args.num_items:,} x {args.dim}: {rows.nbytes:,} bytes dense, {file.stat().st_size:,} in {file}")
    print(f"{layer.spec.method} {layer.spec.layout}: {recall(found, exact):.1%} of the 10 best are found")

    best = model["item_embedding"].topk(queries, 10).indices.numpy()
    print(f"layer.topk finds the same: {recall(best, exact):.1%}, {recall(best, found):.1%} of them in common")

    shape = f"PQ{layer.spec.num_columns}x{layer.spec.n_bits}"
    own = faiss.index_factory(args.dim, shape, faiss.METRIC_INNER_PRODUCT)
    own.train(rows.numpy())
    own.add(rows.numpy())
    print(f"an index that faiss trains at these bytes: {recall(own.search(queries.numpy(), 10)[1], exact):.1%}")


if __name__ == "__main__":
    main()
