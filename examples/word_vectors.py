"""Word vectors: make a file of them 16 times smaller, look words up in it, write it back in its own format.

    python examples/word_vectors.py glove.6B.100d.txt [--folder word_vectors] [--ratio 16] [--words king coffee]

The file is text of word2vec, GloVe or fastText, a .bin of word2vec or fastText, KeyedVectors of gensim, or an
array of numpy (.npy, .npz). Words that stand first are the frequent ones: with --zipf, squared errors are
weighted by 1 / (line + 2), about the frequency of the word. The words travel in the compressed file, which
`cqr.load_vectors` reads with numpy and safetensors alone. Shown are sizes, the share of the 10 nearest words
that stay, and the nearest words by cosine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import cqr_compress as cqr


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress word vectors.")
    parser.add_argument("vectors", type=Path, help="the file of word vectors")
    parser.add_argument("--folder", type=Path, default=Path("word_vectors"))
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--zipf", action="store_true", help="weight frequent words")
    parser.add_argument("--words", nargs="*", default=[], help="whose neighbours are shown")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    small, back = args.folder / "small.safetensors", args.folder / "back.txt"

    num_rows, _ = cqr.inspect(args.vectors).tables[0].shape
    counts = {"vectors": 1 / (torch.arange(num_rows) + 2.0)} if args.zipf else ()
    report = cqr.convert(
        args.vectors, small, method=args.method, ratio=args.ratio, frequencies=counts, min_rows=0, force=True
    )
    table = report.tables[0]
    print(f"{num_rows:,} words, {table.shape[1]} dimensions: {table.method} {table.layout}")
    print(f"{report.file_bytes_before:,} bytes before, {report.file_bytes_after:,} compressed, words and all")
    print(
        f"relative MSE {table.relative_mse:.4f}, mean cosine {table.mean_cosine:.4f}, "
        f"{table.recall_at_10:.0%} of the 10 nearest stay"
    )

    began = time.perf_counter()
    vectors = cqr.load_vectors(small)
    print(f"opened in {1000 * (time.perf_counter() - began):.0f} ms")
    for word in args.words or vectors.words[:5]:
        print(f"{word}: {' '.join(near for near, _ in vectors.most_similar(word, topn=5))}")
    print(f"wrote {back} ({cqr.export(small, back, force=True):,} bytes)")


if __name__ == "__main__":
    main()
