"""Cosine of sentence vectors before and after compressing an encoder's tables.

    pip install transformers
    python tests/benchmarks/sentence_vectors.py FOLDER --ratio 16 [--texts FILE]

FOLDER holds model.safetensors, config.json and vocab.txt or tokenizer.json of a sentence encoder with mean
pooling, such as all-MiniLM-L6-v2. 100 fixed sentences, or the lines of a file, are encoded with the original weights and with what
`convert` and `export` make of them, through the transformers library. Without config.json, the one tensor is a static
embedding, such as WordLlama's: a sentence is the mean of its tokens' rows.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import cqr_compress as cqr

SUBJECTS = ("The old fisherman", "A young surgeon", "Our neighbour's cat", "The central bank", "This compiler",
            "A flock of starlings", "The museum in Lisbon", "My grandmother", "The defendant", "A neural network")  # fmt: skip
PREDICATES = (
    "repaired the broken engine before sunrise.", "raised interest rates for the third time this year.",
    "slept on the warm roof all afternoon.", "refused to answer any further questions.",
    "crossed the river when the water was low.", "published a detailed report about climate change.",
    "played the violin at the opening ceremony.", "optimizes loops better than anyone expected.",
    "was awarded a prize for medical research.", "lost the key to the garden shed again.",
)  # fmt: skip
SENTENCES = [f"{subject} {predicate}" for subject, predicate in itertools.product(SUBJECTS, PREDICATES)]


@torch.no_grad()
def encode(folder: Path, weights: Path, texts: Sequence[str] = SENTENCES) -> torch.Tensor:
    """Mean-pooled, normalized vectors of n texts: (n, D)."""
    if not (folder / "config.json").exists():
        (rows,) = load_file(weights).values()
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = [torch.tensor(tokens.encode(text, add_special_tokens=False).ids) for text in texts]
        return torch.nn.functional.normalize(torch.stack([rows[each].float().mean(0) for each in ids]), dim=1)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
    missing = model.load_state_dict(load_file(weights), strict=False)
    assert not [name for name in missing.missing_keys if "pooler" not in name and "position_ids" not in name], (
        missing
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def rank_correlation(before: torch.Tensor, after: torch.Tensor) -> float:
    """Spearman's correlation of the cosines of all pairs of vectors (n, D), before and after."""
    pairs = torch.triu_indices(len(before), len(before), 1)
    ranks = torch.stack([(v @ v.T)[pairs[0], pairs[1]].argsort().argsort().double() for v in (before, after)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--methods", nargs="+", default=["pq", "rq", "int4", "auto"])
    parser.add_argument("--prior", choices=("tokenizer", "none"), default="tokenizer")
    parser.add_argument("--texts", type=Path, help="a text on each line")
    args = parser.parse_args()
    texts = SENTENCES if args.texts is None else args.texts.read_text().splitlines()
    source = args.folder / "model.safetensors"
    before = encode(args.folder, source, texts)
    for method in args.methods:
        with tempfile.TemporaryDirectory() as scratch:
            small, dense = Path(scratch) / "small.safetensors", Path(scratch) / "dense.safetensors"
            ratio = None if method.startswith("int") else args.ratio
            request = cqr.ConvertOptions(method=method, ratio=ratio, prior=args.prior)
            report = cqr.convert(source, small, request)
            cqr.export(small, dense)
            after = encode(args.folder, dense, texts)
            cosines = (before * after).sum(1)
        for table in report.tables:
            print(
                f"{method:5s} {table.name} {table.method} {table.layout}: {table.bytes_before} -> {table.bytes_after} "
                f"bytes ({table.ratio_bytes}x), relative MSE {table.relative_mse:.4f}, recall@10 {table.recall_at_10:.3f}"
            )
        print(
            f"{method:5s} whole file {report.file_bytes_before} -> {report.file_bytes_after} bytes; cosine of "
            f"{len(cosines)} sentence vectors: mean {cosines.mean():.4f}, smallest {cosines.min():.4f}, "
            f"rank correlation of the pairs {rank_correlation(before, after):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
