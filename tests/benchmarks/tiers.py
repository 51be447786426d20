"""Error of trellis-coded tables at equal bytes with 1 to 4 tiers: weighted by frequency, and not.

    python tests/benchmarks/tiers.py Beauty-epochs-150.pt --table item_embeddings.weight --sequences Beauty.txt
    python tests/benchmarks/tiers.py wordllama.safetensors --table embedding.weight --bits-per-dim 1 2

Counts are those of the items in a file of sequences (a line for each user: `user item item ...`), or 1 / (id + 2.7) of
tokens in the order of their frequency (Zipf-Mandelbrot). Without weights, tiers follow the norms of the rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_tasks import read_sequences
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint


def item_counts(path: Path, num_rows: int) -> Tensor:
    return torch.bincount(torch.tensor([i for line in read_sequences(path) for i in line]), minlength=num_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--table", required=True)
    parser.add_argument("--sequences", type=Path)
    parser.add_argument("--bits-per-dim", type=float, nargs="+", default=[1.0, 2.0])
    args = parser.parse_args()
    with open_checkpoint(args.checkpoint) as checkpoint:
        rows = checkpoint.entries[args.table].stored.read().float()
    if args.sequences is None:
        counts = 1e6 / (torch.arange(len(rows)) + 2.7)
    else:
        counts = item_counts(args.sequences, len(rows))
    print(
        f"{'bits':>5} {'weights':8} tiers {'weighted MSE':>12} {'MSE':>8} {'recall@10':>9} {'bytes':>9}  layout, rows"
    )
    for bits in args.bits_per_dim:
        for weighted in (True, False):
            for tiers in range(1, 5):
                model = nn.ModuleDict({"item": nn.Embedding.from_pretrained(rows.clone())})
                done = cqr.compress_(
                    model, method="trellis", bits_per_dim=bits, max_tiers=tiers, tables=["item.weight"],
                    frequencies={"item.weight": counts} if weighted else {},
                )[0]  # fmt: skip
                error = (model["item"].weight[:] - rows).square().sum(1)
                share = float((error * counts).sum() / (rows.square().sum(1) * counts).sum())
                assert done.quality is not None and done.spec is not None
                print(
                    f"{bits:5g} {'counts' if weighted else 'none':8} {tiers:5} {share:12.4f} "
                    f"{done.quality.relative_mse:8.4f} {done.quality.recall_at_10:9.3f} {done.spec.nbytes:9,}  "
                    f"{done.spec.layout}, {getattr(done.spec, 'tier_rows', ())}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
