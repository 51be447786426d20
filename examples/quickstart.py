"""Train a small recommender, compress its embedding tables 8x, 16x and 32x, and give lost accuracy back.

    python examples/quickstart.py [--folder quickstart] [--ratios 8 16 32]

The clicks are generated: tastes of users and items are normally distributed, items are as popular as Zipf's law
says, and a click is likely where tastes fit and where the item is good. The model is generalized matrix
factorization (He et al. 2017, doi:10.1145/3038912.3052569): an embedding table for users, one for items, and a
weight for each dimension of their product. The default weight decay was the best of 0, 1e-6 and 1e-5 on validation
clicks, and the epoch is chosen on them, so that compression is compared with a good dense model. Nothing is
downloaded. With matplotlib (pip install 'cqr-compress[plot]') it draws AUC over bytes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.tasks import metrics


class GMF(nn.Module):
    """Score a user and an item by the weighted product of their embeddings."""

    def __init__(self, num_users: int, num_items: int, dim: int) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(num_users, dim)
        self.item_embedding = nn.Embedding(num_items, dim)
        self.out = nn.Linear(dim, 1)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits of a click: (B,) ids and (B,) ids to (B,)."""
        product = self.user_embedding(user) * self.item_embedding(item)
        return self.out(product)[:, 0]


@dataclass
class Clicks:
    """Events: who saw what, and whether they clicked."""

    user: Tensor
    item: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.user)

    def take(self, which: Tensor | slice) -> Clicks:
        return Clicks(self.user[which], self.item[which], self.label[which])


@dataclass
class Point:
    """A file: its bytes, and the AUC on test clicks."""

    size: int
    auc: float


def generate(num_users: int, num_items: int, num_events: int, seed: int) -> Clicks:
    """Draw clicks from normally distributed tastes, with Zipf-distributed items."""
    generator = torch.Generator().manual_seed(seed)
    dim = 8
    taste = torch.randn(num_users, dim, generator=generator)
    appeal = torch.randn(num_items, dim, generator=generator)
    quality = torch.randn(num_items, generator=generator)
    popularity = 1.0 / torch.arange(1, num_items + 1).float() ** 0.8
    item = torch.multinomial(popularity, num_events, replacement=True, generator=generator)
    user = torch.randint(num_users, (num_events,), generator=generator)
    logit = 2 * (taste[user] * appeal[item]).sum(1) / dim**0.5 + quality[item]
    return Clicks(user, item, torch.bernoulli(torch.sigmoid(logit), generator=generator))


def batches(clicks: Clicks) -> Iterator[Clicks]:
    return (clicks.take(part) for part in torch.randperm(len(clicks)).split(1024))


def losses(model: nn.Module, clicks: Clicks) -> Tensor:
    """The loss of each event, (B,)."""
    return nn.functional.binary_cross_entropy_with_logits(
        model(clicks.user, clicks.item), clicks.label, reduction="none"
    )


def train(model: GMF, training: Clicks, valid: Clicks, epochs: int, weight_decay: float) -> None:
    """Train, and leave the model as it was after the epoch that is best on `valid`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=weight_decay)
    best, weights = 0.0, {}
    for epoch in range(epochs):
        for batch in batches(training):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
        found = auc(model, valid)
        print(f"  epoch {epoch + 1}: AUC on validation clicks {found:.4f}", flush=True)
        if found > best:
            best, weights = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)


@torch.no_grad()
def auc(model: nn.Module, clicks: Clicks) -> float:
    """Chance that a click scores above a non-click; equal scores count half."""
    return metrics.auc(model(clicks.user, clicks.item), clicks.label)


def cqr_compress(*arguments: object) -> None:
    """Run the command line."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ cqr-compress {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "cqr_compress", *words], check=True)


def size_of(path: Path) -> int:
    return path.stat().st_size


def draw(dense: Point, converted: list[Point], tuned: list[Point], path: Path) -> None:
    """AUC over bytes: the dense model, and at each ratio what compression costs and fine-tuning gives back."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(dense.auc, color="black", lw=0.8, ls=":")
    axes.plot(dense.size, dense.auc, "D", color="black", label="dense")
    for points, style, label in ((converted, "s--", "converted"), (tuned, "o-", "fine-tuned")):
        axes.plot([p.size for p in points], [p.auc for p in points], style, label=label)
    for point in tuned:
        ratio = f"{dense.size / point.size:.0f}x"
        axes.annotate(ratio, (point.size, point.auc), (0, 8), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:,.0f} KiB")
    axes.margins(y=0.15)
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("AUC on test clicks")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small recommender, compress it and fine-tune it.")
    parser.add_argument("--folder", type=Path, default=Path("quickstart"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32])
    parser.add_argument("--num-users", type=int, default=5_000)
    parser.add_argument("--num-items", type=int, default=2_500)
    parser.add_argument("--num-events", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)

    # a model of yours
    torch.manual_seed(args.seed)
    clicks = generate(args.num_users, args.num_items, args.num_events, args.seed)
    tenth = len(clicks) // 10
    ends = (slice(tenth // 2), slice(tenth // 2, tenth), slice(tenth, None))
    test, valid, training = (clicks.take(part) for part in ends)
    model = GMF(args.num_users, args.num_items, dim=32)
    print(f"training on {len(training):,} generated clicks", flush=True)
    train(model, training, valid, args.epochs, args.weight_decay)
    ckpt = args.folder / "ckpt.pt"
    torch.save(model.state_dict(), ckpt)

    # what fine-tuning needs: the model, its data, its loss, and a metric on clicks that training does not see
    task = cqr.Task(
        name="quickstart",
        model=lambda: GMF(args.num_users, args.num_items, dim=32),
        train_batches=lambda epoch: batches(training),
        loss=losses,
        evaluate=lambda model: {"auc": auc(model, valid), "test_auc": auc(model, test)},
        metric="auc",
    )
    logging.basicConfig(stream=sys.stdout, format="  %(message)s")
    logging.getLogger("cqr_compress").setLevel(logging.INFO)

    # its tables, compressed and fine-tuned
    dense, converted, tuned = Point(size_of(ckpt), auc(model, test)), [], []
    for ratio in args.ratios:
        small, better = (args.folder / f"{name}-{ratio:g}x.safetensors" for name in ("small", "tuned"))
        cqr_compress("convert", ckpt, "-o", small, "--ratio", ratio, "--force")
        print("\nfine-tuning", flush=True)
        report = cqr.finetune(small, better, task, original=ckpt, epochs=2, seed=args.seed, force=True)
        converted.append(Point(size_of(small), report.before["test_auc"]))
        tuned.append(Point(size_of(better), report.after["test_auc"]))
    cqr_compress("inspect", better)

    # and back in your model
    cqr.load_compressed(model, better)  # the embedding layers are compressed from here on
    assert abs(auc(model, test) - tuned[-1].auc) < 1e-6

    print(f"\n{len(test):,} test clicks     bytes     AUC")
    print(f"{'dense':16} {dense.size:9,}  {dense.auc:.4f}")
    for name, points in (("converted", converted), ("fine-tuned", tuned)):
        for ratio, point in zip(args.ratios, points, strict=True):
            print(f"{name:10} {ratio:4g}x {point.size:9,}  {point.auc:.4f}")
    print(f"{time.monotonic() - began:.0f} s in all")
    try:
        draw(dense, converted, tuned, args.folder / "quickstart.png")
        print(f"wrote {args.folder / 'quickstart.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
