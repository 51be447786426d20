"""The experiment of "Clustering the Sketch": DLRM on Criteo clicks, test loss against embedding parameters.

    python examples/dlrm_criteo.py [--folder criteo]
    python examples/dlrm_criteo.py --data train.txt --folder kaggle --device cuda --epochs 10 --max-table 20000000

The first line takes minutes on a CPU: it draws data in the shape of Criteo's, ids from Zipf's law over planted
clusters. The second runs on the file of Criteo's Kaggle challenge (TSV: a label, 13 numbers, 26 categories).

The model is DLRM (Naumov et al., arXiv:1906.00091) with the parameter names of its code. Tables of few parameters
are trained from scratch with every method of the paper (arXiv:2210.05974), the largest tables alone, all with the
same number of codewords: the hashing trick, hash embeddings, compositional embeddings, deep hash embeddings (Kang
et al., arXiv:2010.10784), CQR as in the paper, and CQR as this package does it. PQ compresses the tables of the
full model, and is then fine-tuned. Results are kept in `results.json` and are not computed again, and
`test_bce.png` shows them (pip install 'cqr-compress[plot]').
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress.tasks.metrics import click_metrics

NUM_DENSE, NUM_IDS = 13, 26
CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Different values of each category in Criteo's Kaggle data."""
METHODS = ("full", "hash", "hash_embeddings", "ce", "dhe", "cqr-paper", "cqr", "pq")
NAMES = {
    "full": "full tables", "hash": "hashing trick", "hash_embeddings": "hash embeddings",
    "ce": "compositional (CE)", "dhe": "deep hash (DHE)", "cqr-paper": "CQR, as in the paper", "cqr": "CQR, ours",
    "pq": "PQ of the full tables", "pq-tuned": "PQ, fine-tuned",
}  # fmt: skip
NOT_KEPT = ("folder", "methods", "codewords", "device")
"""Arguments that may differ between runs that share their results."""
MakeTable = Callable[[int, int, int], nn.Module]


# data


def generate(path: Path, num_events: int, max_table: int, seed: int) -> None:
    """Write a file in the form of Criteo's: ids follow Zipf's law, and clusters of ids decide about clicks."""
    rng = np.random.default_rng(seed)
    sizes = [min(size, max_table) for size in CARDINALITIES]
    clusters, dim = 12, 4
    logits = np.full(num_events, -1.6)
    ids = np.empty((num_events, NUM_IDS), np.int64)
    total = np.zeros((num_events, dim))
    squares = np.zeros(num_events)
    for field, size in enumerate(sizes):
        popularity = 1 / np.arange(1, size + 1) ** 1.05
        ids[:, field] = rng.choice(size, num_events, p=popularity / popularity.sum())
        centers = rng.normal(size=(clusters, dim)) * 0.18
        row = centers[rng.integers(clusters, size=size)] + 0.04 * rng.normal(size=(size, dim))
        bias = rng.normal(size=clusters) * 0.18
        total += row[ids[:, field]]
        squares += (row[ids[:, field]] ** 2).sum(1)
        logits += bias[rng.integers(clusters, size=size)][ids[:, field]]
    logits += ((total**2).sum(1) - squares) / 2  # the products of all pairs of rows
    dense = np.floor(rng.lognormal(1.0, 1.4, size=(num_events, NUM_DENSE))).astype(np.int64)
    logits += (np.log1p(dense) - 1.2) @ (rng.normal(size=NUM_DENSE) * 0.12)
    label = rng.random(num_events) < 1 / (1 + np.exp(-logits))
    empty = rng.random((num_events, NUM_DENSE)) < 0.1
    names = (ids * 2654435761 + np.arange(NUM_IDS) * 40503) % 2**32  # one-to-one: the factor is odd
    with path.open("w") as file:
        for i in range(num_events):
            numbers = ["" if empty[i, j] else str(dense[i, j]) for j in range(NUM_DENSE)]
            file.write("\t".join([str(int(label[i])), *numbers, *(f"{name:08x}" for name in names[i])]) + "\n")


@dataclass(frozen=True)
class Clicks:
    """Events.

    Attributes:
        dense: (B, 13) float32.
        ids: (B, 26) int32, rows of the tables.
        label: (B,) float32, whether there was a click.
    """

    dense: Tensor
    ids: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, which: Tensor | slice, device: torch.device | str = "cpu") -> Clicks:
        return Clicks(*(part[which].to(device) for part in (self.dense, self.ids, self.label)))


@dataclass(frozen=True)
class Data:
    """The file, split by time: the last seventh is one half for choosing and one half for the test."""

    train: Clicks
    valid: Clicks
    test: Clicks
    sizes: list[int]


def read(path: Path, max_table: int) -> Data:
    """Read a file once; values that the training part lacks share row 0, as do those above `max_table`."""
    cached = path.with_suffix(".npz")
    if not cached.exists() or cached.stat().st_mtime < path.stat().st_mtime:
        np.savez(cached, **_parse(path))
    arrays = np.load(cached)
    count = len(arrays["label"])
    first, second = count * 6 // 7, count * 13 // 14
    ids, sizes = np.empty((count, NUM_IDS), np.int32), []
    for field in range(NUM_IDS):
        values = arrays["ids"][:, field]
        known, uses = np.unique(values[:first], return_counts=True)
        known = np.sort(known[np.argsort(-uses, kind="stable")][: max_table - 1])
        at = np.searchsorted(known, values).clip(max=len(known) - 1)
        ids[:, field] = np.where(known[at] == values, at + 1, 0)
        sizes.append(len(known) + 1)
    whole = Clicks(*(torch.from_numpy(a) for a in (arrays["dense"], ids, arrays["label"])))
    parts = (slice(first), slice(first, second), slice(second, None))
    return Data(*(whole.take(part) for part in parts), sizes=sizes)


def _parse(path: Path) -> dict[str, np.ndarray]:
    blocks: list[tuple[np.ndarray, ...]] = []
    with path.open() as file:
        while lines := file.readlines(2**26):
            cells = [line.rstrip("\n").split("\t") for line in lines]
            for row in cells:
                if len(row) != 1 + NUM_DENSE + NUM_IDS:
                    raise SystemExit(f"{path}: {len(row)} columns, and not a label, 13 numbers and 26 categories")
            dense = np.array([[float(x or 0) for x in row[1 : 1 + NUM_DENSE]] for row in cells], np.float32)
            ids = np.array([[int(x or "0", 16) for x in row[1 + NUM_DENSE :]] for row in cells], np.uint32)
            label = np.array([row[0] for row in cells]).astype(np.float32)
            blocks.append((np.log1p(dense.clip(min=0)), ids, label))
            print(f"  read {sum(len(block[2]) for block in blocks):,} lines", flush=True)
    dense, ids, label = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return {"dense": dense, "ids": ids, "label": label}


# model


class DLRM(nn.Module):
    """Rows and a perceptron's view of the numbers, on_matmul in pairs, through a second perceptron."""

    def __init__(self, sizes: list[int], make: MakeTable, dim: int = 16) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList([make(size, dim, field) for field, size in enumerate(sizes)])
        self.bot_l = nn.Sequential(nn.Linear(NUM_DENSE, 64), nn.ReLU(), nn.Linear(64, dim), nn.ReLU())
        n = len(sizes) + 1
        self.pairs = torch.tril_indices(n, n, -1)
        self.top_l = nn.Sequential(
            nn.Linear(dim + self.pairs.shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Logits (B,)."""
        x = self.bot_l(dense)
        rows = torch.stack([x, *(table(ids[:, field]) for field, table in enumerate(self.emb_l))], 1)
        products = (rows @ rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top_l(torch.cat([x, products], 1))[:, 0]


class DeepHash(nn.Module):
    """A row is what a perceptron makes of many hashes of the id (DHE)."""

    def __init__(self, dim: int, num_parameters: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        hashes = max(8, min(1024, int(num_parameters**0.5)))
        width = max(4, round((math.sqrt((hashes + dim) ** 2 + 4 * num_parameters) - hashes - dim) / 2))
        self.prime = 2**31 - 1
        for name in ("factor", "offset"):
            self.register_buffer(name, torch.randint(1, self.prime, (hashes,), generator=generator))
        self.layers = nn.Sequential(
            nn.Linear(hashes, width), nn.Mish(), nn.Linear(width, width), nn.Mish(), nn.Linear(width, dim)
        )

    def forward(self, ids: Tensor) -> Tensor:
        hashed = (ids.long()[:, None] * self.factor + self.offset) % self.prime % 1_000_000
        return self.layers(hashed.float() / 500_000 - 1)


def maker(method: str, codewords: int, seed: int) -> MakeTable:
    """How a method makes a table; one with no more rows than codewords stays full."""

    def make(size: int, dim: int, field: int) -> nn.Module:
        own = 1000 * seed + field
        if method in ("full", "pq") or size <= codewords:
            layer = nn.Embedding(size, dim)
            nn.init.uniform_(layer.weight, -(size**-0.5), size**-0.5)
            return layer
        if method == "dhe":
            return DeepHash(dim, codewords * dim, own)
        if method == "cqr":
            return cqr.CQREmbedding(size, dim, codebook_size=codewords, num_columns=4, seed=own)
        if method == "cqr-paper":
            return cqr.CQREmbedding(size, dim, codebook_size=codewords // 2, preset="paper", seed=own)
        each = codewords // 2 if method == "hash_embeddings" else codewords
        return cqr.CompressedEmbedding(cqr.sketch_table(method, size, dim, each, seed=own))

    return make


def num_parameters(model: DLRM) -> int:
    """Trainable values of all tables."""
    return sum(parameter.numel() for parameter in model.emb_l.parameters())


# training


def losses(model: nn.Module, clicks: Clicks) -> Tensor:
    """The loss of each event, (B,)."""
    return F.binary_cross_entropy_with_logits(model(clicks.dense, clicks.ids), clicks.label, reduction="none")


def shuffled(clicks: Clicks, batch_size: int, device: str) -> Iterator[Clicks]:
    for batch in torch.randperm(len(clicks)).split(batch_size):
        yield clicks.take(batch, device)


@torch.no_grad()
def evaluate(model: nn.Module, clicks: Clicks, device: str) -> dict[str, float]:
    """Mean loss (binary cross entropy, in nats) and AUC, equal scores counted half."""
    model.eval()
    parts = [clicks.take(slice(a, a + 16384), device) for a in range(0, len(clicks), 16384)]
    scores = torch.cat([model(part.dense, part.ids) for part in parts]).double().cpu()
    return click_metrics(scores, clicks.label)


def search(data: Data, method: str, codewords: int, args: argparse.Namespace) -> tuple[dict[str, float], DLRM]:
    """Train with each weight decay, and test the one that is best on the part for choosing."""
    runs = {decay: train(data, method, codewords, decay, args) for decay in args.weight_decay}
    chosen = min(runs, key=lambda decay: runs[decay][0])
    _, model, epoch = runs[chosen]
    return {"weight_decay": chosen, "epoch": epoch, **evaluate(model, data.test, args.device)}, model


def train(
    data: Data, method: str, codewords: int, decay: float, args: argparse.Namespace
) -> tuple[float, DLRM, int]:
    """Train from scratch; the least loss on the part for choosing, with the model and the epoch that had it."""
    torch.manual_seed(args.seed)
    model = DLRM(data.sizes, maker(method, codewords, args.seed)).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, weight_decay=decay)
    schedule = None
    if any(isinstance(table, cqr.CQREmbedding) for table in model.emb_l):
        steps = math.ceil(len(data.train) / args.batch_size)

        def all_losses() -> Iterator[Tensor]:
            for batch in shuffled(data.train, 4 * args.batch_size, args.device):
                yield losses(model, batch)

        gradient_informed = None if method == "cqr-paper" else all_losses
        short = cqr.ClusterOptions(step_size=0.1)  # an example meets the steps of all its 26 rows at once
        schedule = cqr.ClusterSchedule.at_fractions(
            model,
            steps * args.epochs,
            (0.1, 0.2, 0.4, 0.6),
            optimizer=optimizer,
            losses=gradient_informed,
            options=short,
        )
    best = (math.inf, model, 0)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch in shuffled(data.train, args.batch_size, args.device):
            loss = losses(model, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        loss_here = evaluate(model, data.valid, args.device)["bce"]
        if loss_here < best[0]:
            best = (loss_here, copy.deepcopy(model), epoch)
    return best


def task_of(data: Data, args: argparse.Namespace) -> cqr.Task:
    """What fine-tuning needs to know."""

    def metrics(model: nn.Module) -> dict[str, float]:
        test = evaluate(model, data.test, args.device)
        return evaluate(model, data.valid, args.device) | {f"test_{name}": value for name, value in test.items()}

    return cqr.Task(
        name="criteo",
        model=lambda: DLRM(data.sizes, maker("full", 0, args.seed)),
        train_batches=lambda epoch: shuffled(data.train, args.batch_size, "cpu"),
        loss=lambda model, batch: losses(model, batch.take(slice(None), args.device)),
        evaluate=metrics,
        metric="bce",
        mode="min",
    )


def quantized(data: Data, codewords: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """PQ of the trained full model's tables, before and after fine-tuning."""
    small, tuned = (args.folder / f"pq-{codewords}{end}.safetensors" for end in ("", ".tuned"))
    request = cqr.ConvertOptions(method="pq", num_columns=4, n_bits=codewords.bit_length() - 1)
    tables = [f"emb_l.{field}.weight" for field, rows in enumerate(data.sizes) if rows > codewords]
    cqr.convert(args.folder / "full.pt", small, request, tables=tables, force=True)
    report = cqr.finetune(
        small, tuned, task_of(data, args), original=args.folder / "full.pt", device=args.device, force=True
    )
    model = DLRM(data.sizes, maker("full", 0, args.seed))
    cqr.load_compressed(model, small)
    size = {"parameters": num_parameters(model)}
    return {
        name: size | {key: metrics[f"test_{key}"] for key in ("bce", "auc")}
        for name, metrics in (("pq", report.before), ("pq-tuned", report.after))
    }


# the experiment


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Test loss against parameters, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    styles = {"cqr": "o-", "cqr-paper": "o--", "pq-tuned": "s-", "pq": "s--"}
    for method, name in NAMES.items():
        points = sorted((r["parameters"], r["bce"]) for key, r in results.items() if key.split("@")[0] == method)
        if not points:
            continue
        if method == "full":
            axes.axhline(points[0][1], color="black", lw=1, label=f"{name} ({points[0][0]:,} parameters)")
        else:
            axes.plot(*zip(*points, strict=True), styles.get(method, ".:"), label=name)
    axes.set_xscale("log")
    axes.set_xlabel("embedding parameters")
    axes.set_ylabel("test loss (binary cross entropy)")
    axes.set_title("DLRM: test loss against embedding parameters")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")  # points are not covered
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("criteo"))
    parser.add_argument("--data", type=Path, help="Criteo's TSV; generated if it is not given")
    parser.add_argument("--num-events", type=int, default=300_000, help="of generated data")
    parser.add_argument("--max-table", type=int, default=20_000, help="rows of a table, at most")
    parser.add_argument("--codewords", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, default=6, help="at most: the best on the part for choosing counts")
    parser.add_argument(
        "--weight-decay", type=float, nargs="+", default=[0.0, 1e-6, 1e-5, 1e-4], help="L2 in Adam"
    )
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in NOT_KEPT}
    settings_file = args.folder / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        parser.error(f"{args.folder} has results of other settings ({settings_file}): name another --folder")
    settings_file.write_text(json.dumps(settings, indent=1))
    if args.data is None:
        args.data = args.folder / "train.txt"
        if not args.data.exists():
            print(f"drawing {args.num_events:,} events")
            generate(args.data, args.num_events, args.max_table, args.seed)
    data = read(args.data, args.max_table)
    print(f"{len(data.train):,} events to train on, {len(data.test):,} to test; {sum(data.sizes):,} rows")
    kept = args.folder / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    print(f"{'':24} codewords  parameters     BCE     AUC")
    for method in dict.fromkeys(("full", *args.methods)):
        for codewords in args.codewords if method != "full" else [0]:
            key = f"{method}@{codewords}"
            if key not in results:
                began = time.monotonic()
                if method == "pq":
                    found = quantized(data, codewords, args)
                    results |= {f"{name}@{codewords}": result for name, result in found.items()}
                else:
                    metrics, model = search(data, method, codewords, args)
                    results[key] = {"parameters": num_parameters(model), **metrics}
                    if method == "full":
                        torch.save(model.state_dict(), args.folder / "full.pt")
                results[key]["seconds"] = round(time.monotonic() - began, 1)
                kept.write_text(json.dumps(results, indent=1))
            for name in ("pq", "pq-tuned") if method == "pq" else (method,):
                result = results[f"{name}@{codewords}"]
                size = f"{codewords or '':>9} {result['parameters']:>11,}"
                chosen = f"L2 {result['weight_decay']:g}, epoch {result['epoch']}" if "epoch" in result else ""
                print(f"{NAMES[name]:24} {size}  {result['bce']:.4f}  {result['auc']:.4f}  {chosen}", flush=True)
    print(f"wrote {kept}")
    try:
        draw(results, args.folder / "test_bce.png")
        print(f"wrote {args.folder / 'test_bce.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
