"""Whole-process time and peak memory of `convert` beside the bare faiss calls for the same parameters.

    python tests/benchmarks/convert_vs_faiss.py CHECKPOINT.safetensors --num-columns 64 --n-bits 8 --runs 5

Each run is a process of its own, the two sides in turn. The faiss side reads the table with safetensors, trains a
ProductQuantizer and computes the codes; "fit alone" is the time within it from the first faiss call to the last.
Memory is the peak resident size, and beside it that of an empty `import torch, faiss`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAISS = """
import sys, time, torch, faiss, numpy
from safetensors import safe_open
path, name, M, n_bits, out = sys.argv[1:]
rows = safe_open(path, 'pt').get_tensor(name).float().numpy()
began = time.perf_counter()
pq = faiss.ProductQuantizer(rows.shape[1], int(M), int(n_bits))
pq.train(rows)
codes = pq.compute_codes(rows)
print(time.perf_counter() - began)
numpy.savez(out, codes=codes, centroids=faiss.vector_to_array(pq.centroids).astype('float16'))
"""


def measure(command: list[str]) -> tuple[float, float, float, str]:
    """Run a process: wall seconds, CPU seconds, peak MiB, stdout."""
    began = time.perf_counter()
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_maxrss / 1024, used.ru_utime + used.ru_stime)\n"
        "print(done.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    metrics, output = done.stdout.split("\n", 1)
    peak, cpu = map(float, metrics.split())
    return time.perf_counter() - began, cpu, peak, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--table", default="embeddings.word_embeddings.weight")
    parser.add_argument("--num-columns", type=int, default=64)
    parser.add_argument("--n-bits", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    layout = [str(args.num_columns), str(args.n_bits)]
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            *(
                sys.executable,
                "-m",
                "cqr_compress",
                "convert",
                str(args.checkpoint),
                "-o",
                f"{folder}/small.safetensors",
            ),
            *(
                "--tables",
                args.table,
                "--method",
                "pq",
                "--num-columns",
                layout[0],
                "--n-bits",
                layout[1],
                "--force",
            ),
        ]
        theirs = [sys.executable, "-c", FAISS, str(args.checkpoint), args.table, *layout, f"{folder}/codes.npz"]
        empty = measure([sys.executable, "-c", "import torch, faiss"])
        rows = [(measure(ours), measure(theirs)) for _ in range(args.runs)]
    print(f"pq {layout[0]}x{layout[1]} of {args.table}, {args.runs} runs in turn, medians")
    for label, side in (("convert", 0), ("faiss", 1)):
        wall, cpu, peak = (statistics.median(row[side][i] for row in rows) for i in range(3))
        print(f"{label:8s} {wall:6.2f} s wall  {cpu:6.2f} s CPU  {peak:7.1f} MiB peak")
    print(f"ratio of wall times, pair by pair: {statistics.median(a[0] / b[0] for a, b in rows):.2f}")
    print(f"faiss fit alone {statistics.median(float(b[3]) for _, b in rows):.2f} s")
    print(f"empty import of torch and faiss: {empty[0]:.2f} s, {empty[2]:.1f} MiB")


if __name__ == "__main__":
    main()
