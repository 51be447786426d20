"""Train tables of few parameters from scratch, beside full tables and their PQ and RQ: quality at equal parameters.

    python tests/benchmarks/sketches.py gmf-movielens --file ml-100k.inter
    python tests/benchmarks/sketches.py gmf-synthetic [--file s2k.npz]
    python tests/benchmarks/sketches.py dlrm-synthetic [--file s2k.npz]
    python tests/benchmarks/sketches.py dlrm-frappe --file frappe.validation.libfm --test-file frappe.test.libfm
    python tests/benchmarks/sketches.py sasrec --file Beauty.txt --ppd 128 --seeds 0

The experiment of "Clustering the Sketch" (arXiv:2210.05974) with GMF, the product of a user's and an item's row, and
with other models. "ppd" is parameters for each dimension of a table: codebook parameters / embedding_dim. Every
method has the same number of codebook parameters; bytes are float32 codebooks and packed pointers of all tables.
The figure is the best epoch's metric on held-out data for every method alike; PQ and RQ compress the tables of the
full model's best epoch and are not trained on. A table with no more rows than ppd stays full for every method.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress import ClusterOptions, ClusterSchedule, CompressedEmbedding, CQREmbedding, sketch_table
from cqr_compress.clustering.cluster import clusterable_layers
from cqr_compress.tasks.metrics import auc, ranking_metrics

Batch = tuple[Tensor, ...]
MakeTable = Callable[[int, int, int], nn.Module]


@dataclass(frozen=True)
class Task:
    """A model and its data; the metric is better when larger. `held_out` is what `evaluate` looks at, of clicks."""

    build: Callable[[MakeTable], nn.Module]
    train: Batch
    losses: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], float]
    batch_size: int
    epochs: int
    ppd: tuple[int, ...]
    metric: str
    held_out: Batch = ()

    def batches(self, size: int, shuffled: bool) -> Iterator[Batch]:
        count = len(self.train[0])
        order = torch.randperm(count) if shuffled else torch.arange(count)
        for part in order.split(size):
            yield tuple(t[part] for t in self.train)


# models


class GMF(nn.Module):
    """The product of the rows of a user and an item."""

    def __init__(self, make: MakeTable, num_users: int, num_items: int, dim: int = 32) -> None:
        super().__init__()
        self.user, self.item = make(num_users, dim, 0), make(num_items, dim, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.user(ids[:, 0]) * self.item(ids[:, 1])).sum(1)


class DLRM(nn.Module):
    """Products of all pairs of rows, and the rows, through a perceptron (Naumov et al., arXiv:1906.00091)."""

    def __init__(self, make: MakeTable, sizes: list[int], fields: int, dim: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList([make(size, dim, i) for i, size in enumerate(sizes)])
        self.upper = torch.triu_indices(fields, fields, 1)
        width = fields * dim + self.upper.shape[1]
        self.top = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor) -> Tensor:
        if len(self.tables) == 1:
            rows = self.tables[0](ids)
        else:
            rows = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        products = (rows @ rows.transpose(1, 2))[:, self.upper[0], self.upper[1]]
        return self.top(torch.cat([rows.flatten(1), products], 1))[:, 0]


class SASRec(nn.Module):
    """Self-attention over the last items of a user (Kang & McAuley, arXiv:1808.09781); item 0 is padding."""

    def __init__(self, make: MakeTable, num_items: int, dim: int = 64, length: int = 20) -> None:
        super().__init__()
        self.item, self.position = make(num_items, dim, 0), nn.Embedding(length, dim)
        nn.init.normal_(self.position.weight, std=dim**-0.5)
        layer = nn.TransformerEncoderLayer(dim, 2, dim, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1), persistent=False)
        self.dropout = nn.Dropout(0.2)
        self.length = length

    def forward(self, sequences: Tensor) -> Tensor:
        rows = self.item(sequences) * 8.0 + self.position.weight
        return self.encoder(self.dropout(rows), mask=self.mask, is_causal=True)


# data


def gmf_task(train: Batch, valid: Batch, sizes: list[int], batch_size: int, epochs: int, ppd: tuple[int, ...], dlrm: bool) -> Task:  # fmt: skip
    def build(make: MakeTable) -> nn.Module:
        return DLRM(make, sizes, len(sizes)) if dlrm else GMF(make, sizes[0], sizes[1])

    return Task(build, train, logistic, lambda model: auc(predict(model, valid[0]), valid[1]), batch_size, epochs, ppd, "AUC", valid)  # fmt: skip


def logistic(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def predict(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(part) for part in ids.split(16384)])


def movielens(path: Path) -> Task:
    """MovieLens-100k: ratings of 4 and 5 are positive, 3 is dropped, the last two of each user are held out."""
    values = np.genfromtxt(path, skip_header=1)
    values = values[values[:, 2] != 3]
    user, item, rating, when = values[:, 0], values[:, 1], values[:, 2], values[:, 3]
    order = np.lexsort((when, user))
    ids = torch.from_numpy(np.stack([user, item], 1)[order].astype(np.int64) - 1)
    label = torch.from_numpy((rating[order] >= 4).astype(np.float32))
    last = torch.ones(len(ids), dtype=torch.bool)
    last[:-2] = ids[2:, 0] != ids[:-2, 0]
    sizes = [int(n) + 1 for n in ids.max(0).values]
    return gmf_task((ids[~last], label[~last]), (ids[last], label[last]), sizes, 256, 30, (16, 64, 256), False)


def synthetic(path: Path | None, dlrm: bool) -> Task:
    """Ratings from planted 8-dimensional factors, read from a file or drawn."""
    arrays = dict(np.load(path)) if path else draw_ratings()

    def part(name: str) -> Batch:
        ids = np.stack([arrays[f"{name}_user"], arrays[f"{name}_item"]], 1).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(arrays[f"{name}_label"].astype(np.float32))

    return gmf_task(part("train"), part("valid"), [2000, 2000], 4096, 20, (256, 512), dlrm)


def draw_ratings(size: int = 2000, seen: int = 500, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw `seen` training and 2 held-out items for each user, without replacement, from softmax(u.v / sqrt 8)."""
    rng = np.random.default_rng(seed)
    user, item = rng.normal(size=(2, size, 8))
    logits = user @ item.T
    keys = logits / 8**0.5 + rng.gumbel(size=logits.shape)  # the largest are a draw without replacement
    chosen = np.argpartition(-keys, seen + 2, axis=1)[:, : seen + 2]
    chosen = rng.permuted(chosen, axis=1)
    label = rng.random(chosen.shape) < 1 / (1 + np.exp(-np.take_along_axis(logits, chosen, 1)))
    who = np.broadcast_to(np.arange(size)[:, None], chosen.shape)
    arrays = {}
    for name, columns in (("train", slice(0, seen)), ("valid", slice(seen, None))):
        for key, values in (("user", who), ("item", chosen), ("label", label)):
            arrays[f"{name}_{key}"] = values[:, columns].reshape(-1)
    return arrays


def frappe(train: Path, test: Path) -> Task:
    """App usage: 10 fields with one fused table of ids; labels -1 and 1."""

    def read(path: Path) -> Batch:
        lines = [line.split() for line in path.read_text().splitlines()]
        ids = torch.tensor([[int(x.split(":")[0]) for x in line[1:]] for line in lines])
        return ids, torch.tensor([float(line[0]) > 0 for line in lines]).float()

    (ids, label), (test_ids, test_label) = read(train), read(test)
    size, fields = int(max(ids.max(), test_ids.max())) + 1, ids.shape[1]
    return Task(
        lambda make: DLRM(make, [size], fields), (ids, label), logistic,
        lambda model: auc(predict(model, test_ids), test_label), 256, 20, (128,), "AUC", (test_ids, test_label),
    )  # fmt: skip


def read_sequences(path: Path) -> list[list[int]]:
    """The items of each user, from lines of `user item item ...`."""
    return [[int(x) for x in line.split()[1:]] for line in path.read_text().splitlines()]


def padded(items: list[int], length: int) -> list[int]:
    """The last `length` items, zeros before them."""
    return [0] * (length - len(items[-length:])) + items[-length:]


@torch.no_grad()
def rank_last(model: nn.Module, lines: list[list[int]], length: int) -> tuple[float, float]:
    """Rank the last item of each line among all that are not before it: NDCG@10 and HR@10, equal scores counted half."""
    model.eval()
    history, last = (
        torch.tensor(x) for x in zip(*((padded(line[:-1], length), line[-1]) for line in lines), strict=True)
    )
    ranks = []
    rows = model.item.weight
    table = rows.detach() if type(rows) is nn.Parameter else model.item.decode()
    for a in range(0, len(lines), 512):
        scores = model(history[a : a + 512])[:, -1] @ table.T
        scores[:, 0] = -torch.inf
        mine = scores.gather(1, last[a : a + 512, None])
        broken = scores.isnan().any(1)
        for i, line in enumerate(lines[a : a + 512]):
            scores[i, line] = -torch.inf
        rank = (scores > mine).sum(1) + (scores == mine).sum(1) / 2
        ranks.append(rank.where(~broken, torch.nan))
    model.train()
    found = ranking_metrics(torch.cat(ranks))
    return found["ndcg@10"], found["hr@10"]


def sasrec(path: Path, length: int = 20, held_out: int = 1) -> Task:
    """The last item of each user is the test, ranked among all items: NDCG@10; one positive, one negative each."""
    lines = read_sequences(path)
    num_items = max(max(line) for line in lines) + 1
    lines = [line[: len(line) - held_out + 1] for line in lines]
    inputs = torch.tensor([padded(line[:-2], length) for line in lines])
    wanted = torch.tensor([padded(line[1:-1], length) for line in lines])

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(batch[0])
        real = (batch[1] > 0).float()
        other = torch.randint(1, num_items, batch[1].shape)
        up = (hidden * model.item(batch[1])).sum(2)
        down = (hidden * model.item(other)).sum(2)
        return ((F.softplus(-up) + F.softplus(down)) * real).sum(1)

    return Task(
        lambda make: SASRec(make, num_items), (inputs, wanted), losses,
        lambda model: rank_last(model, lines, length)[0], 256, 60, (512,), "NDCG@10",
    )  # fmt: skip


# methods


def full(size: int, dim: int, seed: int) -> nn.Module:
    layer = nn.Embedding(size, dim)
    nn.init.uniform_(layer.weight, -(dim**-0.5), dim**-0.5)
    return layer


def maker(method: str, ppd: int, seed: int) -> MakeTable:
    """How a method makes a table; each table has hashes of its own."""

    def make(size: int, dim: int, index: int) -> nn.Module:
        own = 1000 * seed + index
        if method in ("full", "pq", "rq") or size <= ppd:
            return full(size, dim, own)
        if method == "cqr":
            return CQREmbedding(size, dim, codebook_size=ppd, seed=own)
        if method == "cqr-paper":
            return CQREmbedding(size, dim, codebook_size=ppd // 2, preset="paper", seed=own)
        halves = {"qr", "hash_embeddings", "qr_hybrid"}
        return CompressedEmbedding(
            sketch_table(method, size, dim, ppd // 2 if method in halves else ppd, seed=own)
        )

    return make


def schedule_of(method: str, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, options: ClusterOptions | None) -> ClusterSchedule:  # fmt: skip
    steps = -(-len(task.train[0]) // task.batch_size)
    if method == "cqr-paper":  # after each of the first 6 of 10 epochs
        return ClusterSchedule.every_epoch(model, steps, task.epochs, codes_until=0.6, optimizer=optimizer)

    def losses() -> Iterator[Tensor]:
        for batch in task.batches(4 * task.batch_size, shuffled=False):
            yield task.losses(model, batch)

    return ClusterSchedule.every_epoch(
        model, steps, task.epochs, optimizer=optimizer, losses=losses, options=options
    )  # fmt: skip


def train(task: Task, method: str, ppd: int, seed: int, options: ClusterOptions | None, verbose: bool) -> tuple[float, nn.Module]:  # fmt: skip
    """Train from scratch; the best epoch's metric, and the model as it was then."""
    torch.manual_seed(seed)
    model = task.build(maker(method, ppd, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = None
    if method in ("cqr", "cqr-paper") and clusterable_layers(model):
        schedule = schedule_of(method, model, task, optimizer, options)
    best, kept = 0.0, model
    for epoch in range(task.epochs):
        model.train()
        batches = list(task.batches(task.batch_size, shuffled=True))
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            task.losses(model, batch).mean().backward()
            optimizer.step()
            if i + 1 == len(batches):  # before the clustering that ends the epoch
                score = task.evaluate(model)
                if score > best:
                    best, kept = score, copy.deepcopy(model)
            if schedule is not None:
                schedule.step()
        if verbose:
            print(f"    epoch {epoch + 1}: {score:.4f}", flush=True)
    return best, kept


def compressed(task: Task, model: nn.Module, method: str, ppd: int) -> tuple[float, nn.Module]:
    """Quantize the tables of a trained full model."""
    levels = 1 if method == "pq" else 4
    bits = (ppd // levels).bit_length() - 1
    request = cqr.ConvertOptions(
        method=method, n_bits=bits, codebook_dtype="float32", min_rows=ppd + 1,
        num_columns=8 if method == "pq" else None, num_levels=None if method == "pq" else levels,
    )  # fmt: skip
    model = copy.deepcopy(model)
    cqr.compress_(model, request)
    return task.evaluate(model), model


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes of all tables."""
    parameters = size = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and "position" not in name:
            own = layer.num_parameters if isinstance(layer, CompressedEmbedding) else layer.weight.numel()
            parameters += own
            size += layer.nbytes if isinstance(layer, CompressedEmbedding) else own * 4
    return parameters, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "task", choices=["gmf-movielens", "gmf-synthetic", "dlrm-synthetic", "dlrm-frappe", "sasrec"]
    )
    parser.add_argument("--file", type=Path)
    parser.add_argument("--test-file", type=Path)
    parser.add_argument("--ppd", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--methods", nargs="+", default=[
        "full", "hash", "qr", "qr_concat", "hash_embeddings", "ce", "cqr-paper", "cqr", "pq", "rq"
    ])  # fmt: skip
    parser.add_argument("--step-size", type=float, default=ClusterOptions.step_size)
    parser.add_argument("--prior-weight", type=float, default=ClusterOptions.prior_weight)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    task = {
        "gmf-movielens": lambda: movielens(args.file),
        "gmf-synthetic": lambda: synthetic(args.file, False),
        "dlrm-synthetic": lambda: synthetic(args.file, True),
        "dlrm-frappe": lambda: frappe(args.file, args.test_file),
        "sasrec": lambda: sasrec(args.file),
    }[args.task]()
    if args.epochs:
        task = Task(**{**task.__dict__, "epochs": args.epochs})
    options = ClusterOptions(step_size=args.step_size, prior_weight=args.prior_weight)
    print(f"{args.task}: {task.metric} of the best of {task.epochs} epochs, seeds {args.seeds}")
    print(f"{'ppd':>5} {'method':16} {'parameters':>11} {'bytes':>9} {'mean':>7}  each seed           s")
    trained: dict[int, tuple[float, nn.Module]] = {}
    for ppd in args.ppd or task.ppd:
        for method in args.methods:
            started, scores = time.perf_counter(), []
            try:
                for seed in args.seeds:
                    if method in ("full", "pq", "rq") and seed not in trained:
                        trained[seed] = train(task, "full", 0, seed, None, args.verbose)
                    if method == "full":
                        score, model = trained[seed]
                    elif method in ("pq", "rq"):
                        score, model = compressed(task, trained[seed][1], method, ppd)
                    else:
                        score, model = train(task, method, ppd, seed, options, args.verbose)
                    scores.append(score)
            except cqr.CqrCompressError as e:
                print(f"{ppd:5} {method:16} cannot be: {e}", flush=True)
                continue
            parameters, size = sizes(model)
            each = " ".join(f"{score:.4f}" for score in scores)
            took = (time.perf_counter() - started) / len(scores)
            print(f"{ppd:5} {method:16} {parameters:11,} {size:9,} {statistics.mean(scores):7.4f}  {each:18} {took:5.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
