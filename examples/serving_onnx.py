"""Serving with ONNX: lookups and top-k retrieval from a compressed table in onnxruntime, without torch.

    pip install 'cqr-compress[onnx]'
    python examples/serving_onnx.py small.safetensors [--table emb.weight] [--topk 10] [--folder onnx]

`small.safetensors` is any file that `cqr-compress convert` wrote. Two graphs are made, as `cqr-compress export
small.safetensors -o rows.onnx [--topk 10]` makes them: ids in, rows out, and queries in, the best ids out. Both
hold the codes and codebooks, not the dense table, and are compared here with the decoded table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

import cqr_compress as cqr


def session(file: Path) -> onnxruntime.InferenceSession:
    """An ONNX model, ready to run on the CPU."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a compressed table with onnxruntime.")
    parser.add_argument("file", type=Path, help="a compressed file")
    parser.add_argument("--table", help="name of the table; the largest by default")
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("onnx"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tables = {table.name: table for table in cqr.inspect(args.file).tables}
    name = args.table or max(tables, key=lambda each: tables[each].bytes_before)
    lookup, retrieval = args.folder / "rows.onnx", args.folder / "topk.onnx"
    cqr.export_onnx(args.file, lookup, table=name, force=True)
    cqr.export_onnx(args.file, retrieval, table=name, topk=args.topk, force=True)
    print(f"{name}: {tables[name].bytes_before:,} bytes dense")
    for file in (lookup, retrieval):
        print(f"{file}: {file.stat().st_size:,} bytes")

    dense = cqr.load_dense_state_dict(args.file)[name].float().numpy()
    num_rows, dim = dense.shape
    rng = np.random.default_rng(0)
    ids = rng.integers(num_rows, size=1000)
    run = session(lookup)
    (rows,) = run.run(None, {run.get_inputs()[0].name: ids})
    print(f"largest difference of 1,000 rows: {np.abs(rows - dense[ids]).max():.1e}")

    queries = dense[rng.integers(num_rows, size=64)] + 0.1 * rng.normal(size=(64, dim)).astype(np.float32)
    run = session(retrieval)
    scores, found = run.run(None, {run.get_inputs()[0].name: queries.astype(np.float32)})
    exact = np.sort(queries @ dense.T, axis=1)[:, : -args.topk - 1 : -1]
    print(f"largest difference of the {args.topk} best scores of 64 queries: {np.abs(scores - exact).max():.1e}")
    print(f"ids of the first query: {found[0].tolist()}")


if __name__ == "__main__":
    main()
