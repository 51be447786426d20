"""Word vectors: make a text file of them 16 times smaller, and keep their neighbours.

    python examples/word_vectors.py glove.6B.100d.txt [--folder word_vectors] [--ratio 16] [--words king coffee]

The file has lines of a word and its numbers, separated by spaces, as GloVe, word2vec and fastText write them (a
first line with two numbers is skipped). Words that stand first are the frequent ones: with --zipf, squared errors
are weighted by 1 / (line + 2), about the frequency of the word. The compressed file has the vectors as
`vectors.codes` and so on; words are in words.txt, a line each. Shown are the nearest words by cosine, before and
after.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import cqr_compress as cqr


def read(path: Path) -> tuple[list[str], Tensor]:
    """Words and their vectors (N, D) of a text file."""
    words: list[str] = []
    rows: list[Tensor] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            word, *numbers = line.rstrip().split(" ")
            if number == 1 and len(numbers) == 1:
                continue  # fastText and word2vec: how many, and how wide
            try:
                rows.append(torch.tensor([float(value) for value in numbers]))
            except ValueError as e:
                raise SystemExit(f"{path}, line {number}: not a word and numbers") from e
            if len(rows[-1]) != len(rows[0]):
                raise SystemExit(
                    f"{path}, line {number}: {len(rows[-1])} numbers, and {len(rows[0])} in the first"
                )
            words.append(word)
    return words, torch.stack(rows)


def neighbours(rows: Tensor, row: int, k: int) -> list[int]:
    """Ids of the k nearest other rows by cosine."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    nearest = (unit @ unit[row]).topk(k + 1).indices.tolist()
    return [i for i in nearest if i != row][:k]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress word vectors.")
    parser.add_argument("vectors", type=Path, help="lines of a word and its numbers")
    parser.add_argument("--folder", type=Path, default=Path("word_vectors"))
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--zipf", action="store_true", help="weight frequent words")
    parser.add_argument("--words", nargs="*", default=[], help="whose neighbours are shown")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    words, rows = read(args.vectors)
    (args.folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    dense, small = args.folder / "vectors.safetensors", args.folder / "small.safetensors"
    save_file({"vectors": rows}, dense)
    report = cqr.convert(
        dense, small, method=args.method, ratio=args.ratio, force=True,
        frequencies={"vectors": 1 / (torch.arange(len(rows)) + 2.0)} if args.zipf else (),
    )  # fmt: skip
    table = report.tables[0]
    print(f"{len(words):,} words, {rows.shape[1]} dimensions: {table.method} {table.layout}")
    print(f"{dense.stat().st_size:,} bytes as float32, {report.file_bytes_after:,} compressed")
    print(f"relative MSE {table.relative_mse:.4f}, mean cosine {table.mean_cosine:.4f}")
    decoded = cqr.load_dense_state_dict(small)["vectors"]
    ids = [words.index(word) for word in args.words if word in words] or torch.randperm(len(words))[:5].tolist()
    for i in ids:
        before, after = neighbours(rows, i, 5), neighbours(decoded, i, 5)
        print(f"{words[i]}: {' '.join(words[j] for j in before)}  ->  {' '.join(words[j] for j in after)}")
    sampled = torch.randperm(len(words))[:200].tolist()
    shared = [len({*neighbours(rows, i, 10)} & {*neighbours(decoded, i, 10)}) for i in sampled]
    print(f"of the 10 nearest of {len(sampled)} words, {sum(shared) / len(shared):.1f} stay")


if __name__ == "__main__":
    main()
