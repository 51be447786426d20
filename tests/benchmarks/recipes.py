"""What a person has, the command, and what comes out: each recipe of the README on real inputs.

    python tests/benchmarks/recipes.py --encoder FOLDER --vectors TABLE.safetensors [--tokenizer FILE] [--lightning]

FOLDER is a sentence encoder such as all-MiniLM-L6-v2, TABLE.safetensors a static token embedding such as WordLlama's,
which is written as word vectors in six formats; with `--tokenizer tokenizer.json` it is a folder of sentence-transformers
too. Each row runs `cqr-compress` as a user does, in a process of its own,
and opens the result as the README says: sentence encoders through `AutoModel.from_pretrained`, word vectors through
`load_vectors`, a checkpoint of DLRM with the state of Adam, and one of Lightning, through `load_compressed`. Quality of encoders and word
vectors is Spearman's correlation of the cosines of pairs before and after.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sentence_vectors import SENTENCES, rank_correlation
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

import cqr_compress as cqr


def convert(*arguments: object) -> float:
    """Run `cqr-compress convert`; seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "cqr_compress", "convert", *map(str, arguments), "--force"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - began


def show(what: str, command: str, before: int, after: int, quality: str, seconds: float) -> None:
    ratio = f"{before / after:.2f}x"
    print(f"| {what} | `{command}` | {before:,} | {after:,} ({ratio}) | {quality} | {seconds:.0f} s |", flush=True)


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# sentence encoders


@torch.no_grad()
def sentence_vectors(folder: Path) -> Tensor:
    """Mean-pooled, normalized vectors of the sentences: (100, D)."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def encoders(folder: Path, ratio: float, scratch: Path) -> None:
    wanted = sentence_vectors(folder)
    shards = scratch / "shards"
    AutoModel.from_pretrained(folder).save_pretrained(shards, max_shard_size="20MB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(shards)
    for what, source, options in (
        ("a sentence encoder's folder", folder, []),
        ("the same, as a whole", folder, ["--rest-dtype", "float16"]),
        ("the same in shards of 20 MB", shards, ["--shard-size", "20MB"]),
    ):
        small = scratch / "small"
        seconds = convert(source, "-o", f"{small}/", "--ratio", ratio, *options)
        found = sentence_vectors(small)
        quality = (
            f"mean cosine {float((found * wanted).sum(1).mean()):.3f}, "
            f"rank correlation {rank_correlation(wanted, found):.3f}"
        )
        command = " ".join(["convert FOLDER -o small/ --ratio", f"{ratio:g}", *options])
        show(what, command, weights_bytes(source), weights_bytes(small), quality, seconds)


def static_encoder(table: Path, tokenizer: Path, ratio: float, scratch: Path) -> None:
    """A StaticEmbedding of sentence-transformers: the mean of the tokens' rows."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    (rows,) = (tensor.float().numpy() for tensor in load_file(table).values())
    source, small = scratch / "static", scratch / "static-small"
    made = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=rows)
    SentenceTransformer(modules=[made], device="cpu").save(str(source))
    seconds = convert(source, "-o", f"{small}/", "--ratio", ratio)
    wanted, found = (
        nn.functional.normalize(
            SentenceTransformer(str(each), device="cpu").encode(SENTENCES, convert_to_tensor=True)
        )
        for each in (source, small)
    )
    quality = (
        f"mean cosine {float((found * wanted).sum(1).mean()):.3f}, "
        f"rank correlation {rank_correlation(wanted, found):.3f}"
    )
    command = f"convert FOLDER -o small/ --ratio {ratio:g}"
    show("a folder of StaticEmbedding", command, weights_bytes(source), weights_bytes(small), quality, seconds)


# word vectors


def writers(words: list[str], rows: np.ndarray) -> dict[str, Callable[[Path], None]]:
    """Functions that write word vectors in a format, by the name of a file."""
    N, D = rows.shape

    def text(path: Path, head: bool) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{N} {D}\n" if head else "")
            for word, row in zip(words, rows, strict=True):
                file.write(f"{word} {' '.join(f'{x:.5f}' for x in row)}\n")

    def binary(path: Path) -> None:
        with path.open("wb") as file:
            file.write(f"{N} {D}\n".encode())
            for word, row in zip(words, rows, strict=True):
                file.write(word.encode() + b" " + row.tobytes() + b"\n")

    def keyed(path: Path) -> None:
        from gensim.models import KeyedVectors

        vectors = KeyedVectors(D)
        vectors.add_vectors(words, rows)
        vectors.save(str(path), separately=[])

    return {
        "word2vec.txt": lambda path: text(path, head=True), "glove.txt": lambda path: text(path, head=False),
        "word2vec.bin": binary, "vectors.npy": lambda path: np.save(path, rows),
        "vectors.npz": lambda path: np.savez(path, vectors=rows, words=np.array(words)), "gensim.kv": keyed,
    }  # fmt: skip


def word_vectors(table: Path, ratio: float, scratch: Path) -> None:
    (rows,) = (tensor.float().numpy() for tensor in load_file(table).values())
    words = [f"w{i}" for i in range(len(rows))]
    first, second = torch.randint(len(rows), (2, 20_000), generator=torch.Generator().manual_seed(0)).numpy()

    def similarities(vectors: np.ndarray) -> Tensor:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return torch.from_numpy((unit[first] * unit[second]).sum(1)).argsort().argsort().double()

    wanted = similarities(rows)
    for name, write in writers(words, rows).items():
        source, small = scratch / name, scratch / "vectors.safetensors"
        try:
            write(source)
        except ImportError as e:
            print(f"{name}: {e}")
            continue
        seconds = convert(source, "-o", small, "--ratio", ratio)
        found = cqr.load_vectors(small)
        correlation = torch.corrcoef(torch.stack([wanted, similarities(found[found.words])]))[0, 1]
        sizes = source.stat().st_size, small.stat().st_size
        show(f"word vectors, {name}", f"convert {name} --ratio {ratio:g}", *sizes, f"rank correlation {correlation:.3f}", seconds)  # fmt: skip
        source.unlink()


# a recommender


class DLRM(nn.Module):
    """Tables of several sizes and a perceptron."""

    def __init__(self, sizes: tuple[int, ...] = (200_000, 50_000, 5000, 300, 12), dim: int = 32) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList([nn.EmbeddingBag(size, dim, mode="sum") for size in sizes])
        self.top_l = nn.Sequential(nn.Linear(dim * len(sizes), 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.top_l(torch.cat([table(ids[:, i, None]) for i, table in enumerate(self.emb_l)], 1))[:, 0]


class Clicks:
    """Clicks that the ids of all fields decide, of which small ones are frequent."""

    def __init__(self, model: DLRM) -> None:
        torch.manual_seed(0)
        self.tastes = [torch.randn(table.num_embeddings) for table in model.emb_l]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        ids = torch.stack([(torch.rand(count) ** 3 * len(taste)).long() for taste in self.tastes], 1)
        score = sum(taste[ids[:, i]] for i, taste in enumerate(self.tastes))
        return ids, torch.bernoulli(torch.sigmoid(torch.as_tensor(score)))


def test_losses(models: list[nn.Module], clicks: Clicks) -> str:
    ids, label = clicks.draw(100_000)
    with torch.no_grad():
        losses = [float(nn.functional.binary_cross_entropy_with_logits(model(ids), label)) for model in models]
    return f"test loss {losses[0]:.4f}, then {losses[1]:.4f}"


def recommender(ratio: float, scratch: Path) -> None:
    torch.manual_seed(0)
    model = DLRM()
    clicks = Clicks(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        ids, label = clicks.draw(4096)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(ids), label).backward()
        optimizer.step()
    source, small = scratch / "dlrm.pt", scratch / "dlrm.safetensors"
    torch.save({"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    seconds = convert(source, "-o", small, "--ratio", ratio)
    with cqr.init_empty_weights():
        empty = DLRM()
    cqr.load_compressed(empty, small, device="cpu")
    show(
        "DLRM with the state of Adam", f"convert dlrm.pt --ratio {ratio:g}", source.stat().st_size,
        small.stat().st_size, test_losses([model, empty], clicks), seconds,
    )  # fmt: skip


def lightning(ratio: float, scratch: Path) -> None:
    """Lightning's checkpoint of the same model, and a training of CQR layers with its callback."""
    from lightning.pytorch import LightningModule, Trainer

    from cqr_compress.integrations.lightning_callback import ClusterCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = DLRM()

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(ids)
            return found

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    quiet: dict[str, object] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
        "enable_model_summary": False, "max_epochs": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    dense, small_trained = Module(), Module()
    clicks = Clicks(dense.model)
    batches = DataLoader([clicks.draw(4096) for _ in range(100)], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(**quiet)
    trainer.fit(dense, batches)
    source, small = scratch / "lightning.ckpt", scratch / "lightning.safetensors"
    trainer.save_checkpoint(source)
    seconds = convert(source, "-o", small, "--ratio", ratio)
    with cqr.init_empty_weights():
        empty = Module()
    cqr.load_compressed(empty, small, device="cpu")
    sizes = source.stat().st_size, small.stat().st_size
    show("a checkpoint of Lightning", f"convert lightning.ckpt --ratio {ratio:g}", *sizes, test_losses([dense, empty], clicks), seconds)  # fmt: skip
    began = time.perf_counter()
    tables = small_trained.model.emb_l
    for i, table in enumerate(tables):
        if table.num_embeddings > 1000:
            tables[i] = cqr.CQREmbeddingBag(table.num_embeddings, 32, mode="sum")
    Trainer(**quiet, callbacks=[ClusterCallback()]).fit(small_trained, batches)
    cqr.save_compressed(small_trained, small, force=True)
    sizes = source.stat().st_size, small.stat().st_size
    show("a loop of Lightning", "CQREmbeddingBag and ClusterCallback", *sizes, test_losses([dense, small_trained], clicks), time.perf_counter() - began)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--lightning", action="store_true")
    args = parser.parse_args()
    print("| what a person has | command | bytes before | after | quality | time |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        if args.encoder:
            encoders(args.encoder, args.ratio, Path(name))
        if args.vectors:
            word_vectors(args.vectors, args.ratio, Path(name))
        if args.vectors and args.tokenizer:
            static_encoder(args.vectors, args.tokenizer, args.ratio, Path(name))
        recommender(args.ratio, Path(name))
        if args.lightning:
            lightning(args.ratio, Path(name))


if __name__ == "__main__":
    main()
