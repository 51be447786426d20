"""Compress the tables of a checkpoint by several methods at one ratio: bytes and agreement of rows.

    python tests/benchmarks/methods.py CHECKPOINT [--tables PATTERN] [--ratio 16] [--methods pq rq cqr:hashed ...]

"cqr:hashed", "cqr:stored" and "cqr:none" are cqr with that helper; "cqr" chooses by itself. Bytes are whole tables.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cqr_compress as cqr

METHODS = ["pq", "rq", "prq", "cqr:hashed", "cqr:stored", "cqr:none", "cqr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tables", nargs="+", default=[])
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    print(f"{args.checkpoint.name} at ratio {args.ratio:g}")
    print(
        f"{'table':32} {'method':11} {'layout':24} {'bytes':>10} {'rel. MSE':>9} {'cosine':>7} {'recall':>7} {'s':>4}"
    )
    for name in args.methods:
        method, _, helper = name.partition(":")
        request = cqr.ConvertOptions(method=method, helper=helper or None, ratio=args.ratio, prior="none")
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = cqr.convert(args.checkpoint, Path(folder, "small.safetensors"), request, tables=args.tables)
        took = time.perf_counter() - started
        for table in report.tables:
            print(
                f"{table.name:32} {name:11} {table.layout:24} {table.bytes_after:10,} {table.relative_mse:9.4f} "
                f"{table.mean_cosine:7.4f} {table.recall_at_10:7.4f} {took:4.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
