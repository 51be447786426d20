"""The tasks of `sketches.py` and `finetune.py`: models, their data in three parts, losses and metrics.

GMF on MovieLens-100k and on drawn ratings, DLRM on Frappe and on the same drawn ratings, SASRec on sequences, and the
DLRM of `examples/dlrm_criteo.py` on clicks that it draws. Training sees the training part, everything is chosen on the
validation part, and figures are of the test part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.tasks.metrics import auc, ranking_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"

Batch = tuple[Tensor, ...]
Figures = dict[str, float]
MakeTable = Callable[[int, int, int], nn.Module]


def full_table(size: int, dim: int, seed: int) -> nn.Module:
    layer = nn.Embedding(size, dim)
    nn.init.uniform_(layer.weight, -(dim**-0.5), dim**-0.5)
    return layer


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        build: makes the model, of a function that makes a table of its rows, dimensions and number.
        train: the examples to train on.
        losses: of each example of a batch.
        metrics: `metric` on the validation part, and the same on the test part as "test_...".
        metric: that chooses.
        batch_size: of training.
        epochs: of training, at most.
        tables: names of the tables that are compressed.
        ppd: parameters for each dimension of a table, in `sketches.py`.
        mode: "max" or "min".
        learning_rate: of the dense model, and of those from scratch.
        full_table: makes a table of the dense model, with the values that it starts from.
        step_size: of clusterings; shorter where an example meets the steps of many rows at once.
        logits: that are distilled, or None.
        everything: more options where everything is fine-tuned.
    """

    build: Callable[[MakeTable], nn.Module]
    train: Batch
    losses: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[nn.Module], Figures]
    metric: str
    batch_size: int
    epochs: int
    tables: tuple[str, ...]
    ppd: tuple[int, ...] = ()
    mode: str = "max"
    learning_rate: float = 1e-3
    full_table: MakeTable = full_table
    step_size: float = 0.3
    logits: Callable[[nn.Module, Batch], Tensor] | None = None
    everything: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, size: int, shuffled: bool) -> Iterator[Batch]:
        count = len(self.train[0])
        order = torch.randperm(count) if shuffled else torch.arange(count)
        for part in order.split(size):
            yield tuple(t[part] for t in self.train)

    def score(self, figures: Figures) -> float:
        """The metric on the validation part, larger is better; NaN is worse than any number."""
        value = figures[self.metric] if self.mode == "max" else -figures[self.metric]
        return value if value == value else float("-inf")


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


def logistic(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def predict(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(part) for part in ids.split(16384)])


def click_metrics(valid: Batch, test: Batch) -> Callable[[nn.Module], Figures]:
    def metrics(model: nn.Module) -> Figures:
        parts = {"auc": valid, "test_auc": test}
        return {name: auc(predict(model, ids), label) for name, (ids, label) in parts.items()}

    return metrics


def split_last(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """Hold out the last `count` examples of each user, of examples in the order of users and time."""
    user = batch[0][:, 0]
    last = torch.ones(len(user), dtype=torch.bool)
    last[:-count] = user[count:] != user[:-count]
    return tuple(t[~last] for t in batch), tuple(t[last] for t in batch)


def movielens(path: Path) -> Task:
    """Ratings of 4 and 5 are positive, 3 is dropped; of each user the last two are the test, the two before valid."""
    values = np.genfromtxt(path, skip_header=1)
    values = values[values[:, 2] != 3]
    user, item, rating, when = values[:, 0], values[:, 1], values[:, 2], values[:, 3]
    order = np.lexsort((when, user))
    ids = torch.from_numpy(np.stack([user, item], 1)[order].astype(np.int64) - 1)
    label = torch.from_numpy((rating[order] >= 4).astype(np.float32))
    num_users, num_items = (int(n) + 1 for n in ids.max(0).values)
    rest, test = split_last((ids, label), 2)
    train, valid = split_last(rest, 2)
    return Task(
        lambda make: GMF(make, num_users, num_items), train, logistic, click_metrics(valid, test), "auc", 256, 30,
        ("user.weight", "item.weight"), (16, 64, 256),
    )  # fmt: skip


def synthetic(path: Path | None, dlrm: bool = False) -> Task:
    """Ratings from planted 8-dimensional factors, read from a file or drawn; validation is two of each user's."""
    arrays = dict(np.load(path)) if path else draw_ratings()

    def part(name: str) -> Batch:
        ids = np.stack([arrays[f"{name}_user"], arrays[f"{name}_item"]], 1).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(arrays[f"{name}_label"].astype(np.float32))

    seen = part("train")
    order = seen[0][:, 0].argsort(stable=True)
    train, valid = split_last(tuple(t[order] for t in seen), 2)
    size, names = 2000, ("tables.0.weight", "tables.1.weight") if dlrm else ("user.weight", "item.weight")
    return Task(
        lambda make: DLRM(make, [size, size], 2) if dlrm else GMF(make, size, size), train, logistic,
        click_metrics(valid, part("valid")), "auc", 4096, 30, names, (256, 512),
    )  # fmt: skip


def draw_ratings(size: int = 2000, seen: int = 500, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw `seen` known and 2 test items for each user, without replacement, from softmax(u.v / sqrt 8)."""
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


def frappe(path: Path, test_path: Path) -> Task:
    """App usage: 10 fields with one fused table of ids, labels -1 and 1; a tenth of the first file is for validation."""

    def read(path: Path) -> Batch:
        lines = [line.split() for line in path.read_text().splitlines()]
        ids = torch.tensor([[int(x.split(":")[0]) for x in line[1:]] for line in lines])
        return ids, torch.tensor([float(line[0]) > 0 for line in lines]).float()

    known, test = read(path), read(test_path)
    size, fields = int(max(known[0].max(), test[0].max())) + 1, known[0].shape[1]
    order = torch.randperm(len(known[0]), generator=torch.Generator().manual_seed(0))
    tenth = len(order) // 10
    valid, train = (tuple(t[which] for t in known) for which in (order[:tenth], order[tenth:]))
    return Task(
        lambda make: DLRM(make, [size], fields), train, logistic, click_metrics(valid, test), "auc", 256, 30,
        ("tables.0.weight",), (128,),
    )  # fmt: skip


def read_sequences(path: Path) -> list[list[int]]:
    """The items of each user, from lines of `user item item ...`."""
    return [[int(x) for x in line.split()[1:]] for line in path.read_text().splitlines()]


def padded(items: list[int], length: int) -> list[int]:
    """The last `length` items, zeros before them."""
    return [0] * (length - len(items[-length:])) + items[-length:]


class LastItems:
    """Ranks the last item of each line among all that are not before it: NDCG@10 and HR@10, equal scores counted half."""

    def __init__(self, lines: list[list[int]], length: int) -> None:
        self.history = torch.tensor([padded(line[:-1], length) for line in lines])
        self.last = torch.tensor([line[-1:] for line in lines])
        self.seen = [
            torch.tensor([(i, item) for i, line in enumerate(lines[a : a + 512]) for item in line]).T
            for a in range(0, len(lines), 512)
        ]

    @torch.no_grad()
    def rank(self, model: nn.Module) -> Figures:
        model.eval()
        ranks = []
        rows = model.item.weight
        table = rows.detach() if type(rows) is nn.Parameter else model.item.decode()
        for history, last, seen in zip(self.history.split(512), self.last.split(512), self.seen, strict=True):
            scores = model(history)[:, -1] @ table.T
            scores[:, 0] = -torch.inf
            mine = scores.gather(1, last)
            broken = scores.isnan().any(1)
            scores[seen[0], seen[1]] = -torch.inf
            rank = (scores > mine).sum(1) + (scores == mine).sum(1) / 2
            ranks.append(rank.where(~broken, torch.nan))
        model.train()
        return ranking_metrics(torch.cat(ranks))


def sasrec(path: Path, length: int = 20) -> Task:
    """The last item of each user is the test, the one before for validation; a softmax over all items is the loss."""
    lines = read_sequences(path)
    num_items = max(max(line) for line in lines) + 1
    inputs = torch.tensor([padded(line[:-3], length) for line in lines])
    wanted = torch.tensor([padded(line[1:-2], length) for line in lines])
    valid, test = LastItems([line[:-1] for line in lines], length), LastItems(lines, length)

    def metrics(model: nn.Module) -> Figures:
        found = valid.rank(model)
        found |= {f"test_{name}": value for name, value in test.rank(model).items()}
        return found

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])[batch[1] > 0] @ model.item.weight.T

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(model, batch), batch[1][batch[1] > 0], reduction="none")

    everything = {
        "learning_rate": 1e-3, "epochs": 4, "distill_weight": 10.0, "codes": "train", "eval_every": 44, "patience": 9,
    }  # fmt: skip
    return Task(
        lambda make: SASRec(make, num_items, length=length), (inputs, wanted), losses, metrics, "ndcg@10", 256, 30,
        ("item.weight",), (512,), logits=logits, everything=everything,
    )  # fmt: skip


def criteo(folder: Path) -> Task:
    """See `examples/dlrm_criteo.py`: 300,000 drawn events, 26 tables of up to 20,000 rows."""
    sys.path.insert(0, str(EXAMPLES))
    import dlrm_criteo as example

    file = folder / "train.txt"
    if not file.exists():
        example.generate(file, 300_000, 20_000, 0)
    data = example.read(file, 20_000)

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2], reduction="none")

    def metrics(model: nn.Module) -> Figures:
        valid, test = (example.evaluate(model, part, "cpu") for part in (data.valid, data.test))
        return valid | {f"test_{name}": value for name, value in test.items()}

    return Task(
        lambda make: example.DLRM(data.sizes, make), (data.train.dense, data.train.ids, data.train.label), losses,
        metrics, "bce", 2048, 6, tuple(f"emb_l.{field}.weight" for field, rows in enumerate(data.sizes) if rows >= 900),
        mode="min", learning_rate=2e-3, full_table=example.maker("full", 0, 0), step_size=0.1,
    )  # fmt: skip
