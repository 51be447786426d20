"""A sentence encoder: make its folder 3.6 times smaller as a whole, and compare sentence vectors.

    pip install 'cqr-compress[models]'
    python examples/sentence_encoder.py FOLDER [--output small] [--ratio 16] [--rest-dtype float16]

FOLDER is a Hugging Face folder of a BERT-like encoder with mean pooling (model.safetensors, config.json and a
tokenizer), such as sentence-transformers/all-MiniLM-L6-v2. The word embeddings are half of the bytes of such an
encoder: they are compressed, all other weights are stored in half precision, and the result is a folder again.
With `import cqr_compress`, `AutoModel.from_pretrained`, `pipeline` and `SentenceTransformer` load it as any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import cqr_compress as cqr

SENTENCES = (
    "The parcel arrived two days late and the box was damaged.",
    "My order came late, and the package was broken.",
    "A violinist played in the empty station.",
    "Prices of copper fell after the mine opened again.",
    "How do I change the oil of a motorcycle?",
    "What is the best way to replace motorcycle oil?",
)


@torch.no_grad()
def encode(model: Any, tokenizer: Any) -> Tensor:
    """Sentence vectors of length 1: the mean of the last hidden states over tokens."""
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a sentence encoder.")
    parser.add_argument("folder", type=Path, help="a Hugging Face folder")
    parser.add_argument("--output", type=Path, default=Path("small"), help="the folder to write")
    parser.add_argument("--ratio", type=float, default=16.0, help="of the word embeddings")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--rest-dtype", default="float16", help="of all other weights in the file")
    args = parser.parse_args()
    folder = cqr.convert_folder(
        args.folder, args.output, method=args.method, ratio=args.ratio, rest_dtype=args.rest_dtype, force=True
    )
    (report,) = folder.reports
    dense, small = (AutoModel.from_pretrained(path).eval() for path in (args.folder, args.output))
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    before, after = encode(dense, tokenizer), encode(small, tokenizer)
    print(f"{report.tables[0].name}: {report.tables[0].bytes_before:,} -> {report.tables[0].bytes_after:,} bytes")
    ratio = report.file_bytes_before / report.file_bytes_after
    print(f"whole file: {report.file_bytes_before:,} -> {report.file_bytes_after:,} bytes, {ratio:.2f}x")
    print("cosine of each sentence with its vector before:", " ".join(f"{c:.3f}" for c in (before * after).sum(1)))
    for name, vectors in (("before", before), ("after", after)):
        similar = vectors @ vectors.T
        print(
            f"{name}: late parcels {similar[0, 1]:.3f}, motorcycle oil {similar[4, 5]:.3f}, "
            f"copper {similar[0, 3]:.3f}"
        )


if __name__ == "__main__":
    main()
