"""Time and peak memory of `topk` beside decoding the table and multiplying.

    python tests/benchmarks/topk.py [--rows 1000000] [--dim 64] [--queries 64] [--k 10]

Each side runs in processes of its own, in turn. Peak memory is what the process takes above one that holds the
table and does nothing. Both sides must find the same rows; where two scores are equal to rounding, either will do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from lookup import random_table, specs

from cqr_compress import CompressedEmbedding

SIDES = ("topk", "decode, then multiply", "nothing")


def peak_kib() -> int:
    """Peak resident memory of this process alone (getrusage counts what it was forked from)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(side: str, layout: str, rows: int, dim: int, queries: int, k: int) -> dict[str, object]:
    """Run one side in this process."""
    torch.manual_seed(0)
    layer = CompressedEmbedding(random_table(specs(rows, dim)[layout]))
    h = torch.randn(queries, dim)
    before = peak_kib()
    times, found = [], None
    with torch.no_grad():
        for _ in range(5 if side != "nothing" else 0):
            start = time.perf_counter()
            found = layer.topk(h, k) if side == "topk" else (h @ layer.decode().T).topk(k)
            times.append(time.perf_counter() - start)
    peak = peak_kib() - before
    return {
        "seconds": statistics.median(times) if times else 0.0,
        "peak_mib": peak / 1024,
        "values": found[0].tolist() if found else [],
        "indices": found[1].tolist() if found else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time topk beside decoding the table and multiplying.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", help="layouts to time; all by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.rows, args.dim, args.queries, args.k)
    if args.child:
        print(json.dumps(measure(*args.child, *sizes)))
        return
    command = [sys.executable, __file__]
    for name, size in zip(("--rows", "--dim", "--queries", "--k"), sizes, strict=True):
        command += [name, str(size)]
    print(f"{args.rows} x {args.dim}, {args.queries} queries, k = {args.k}")
    for layout in args.layouts or specs(args.rows, args.dim):
        results: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                done = subprocess.run(
                    [*command, "--child", side, layout], capture_output=True, text=True, check=True
                )
                results[side].append(json.loads(done.stdout))
        ours, theirs = (results[side][0] for side in SIDES[:2])
        a, b = torch.tensor(ours["values"]), torch.tensor(theirs["values"])
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4), "the two sides find other scores"
        same = (torch.tensor(ours["indices"]) == torch.tensor(theirs["indices"])).float().mean()
        pairs = zip(results["topk"], results[SIDES[1]], strict=True)
        ratio = statistics.median(x["seconds"] / y["seconds"] for x, y in pairs)
        seconds = {s: statistics.median(r["seconds"] for r in results[s]) for s in SIDES}
        peak = {s: statistics.median(r["peak_mib"] for r in results[s]) for s in SIDES}
        print(
            f"{layout:8} topk {seconds['topk'] * 1e3:6.0f} ms, {peak['topk'] - peak['nothing']:5.0f} MiB; "
            f"decode, then multiply {seconds[SIDES[1]] * 1e3:6.0f} ms, {peak[SIDES[1]] - peak['nothing']:5.0f} MiB; "
            f"time ratio {ratio:.2f}; same ids {float(same):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
