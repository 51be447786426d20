"""Train a small recommender, compress its embedding tables 32x, and give the lost accuracy back by fine-tuning.

    python examples/quickstart.py [--folder quickstart] [--ratio 32]

The clicks are generated: users and items belong to planted groups, items are as popular as Zipf's law says, and
a click is likely where the groups fit. The model is generalized matrix factorization (He et al. 2017,
doi:10.1145/3038912.3052569): an embedding table for users, one for items, and a weight for each dimension of
their product. Nothing is downloaded. With matplotlib (pip install 'cqr-compress[plot]') it draws what it did.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
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


def generate(num_users: int, num_items: int, num_events: int, seed: int) -> Clicks:
    """Draw clicks from planted groups with Zipf-distributed items."""
    generator = torch.Generator().manual_seed(seed)
    dim, groups = 8, 60
    taste = torch.randn(groups, dim, generator=generator)
    appeal = torch.randn(groups, dim, generator=generator)
    user_taste = taste[torch.randint(groups, (num_users,), generator=generator)]
    user_taste = user_taste + 0.5 * torch.randn(num_users, dim, generator=generator)
    item_appeal = appeal[torch.randint(groups, (num_items,), generator=generator)]
    item_appeal = item_appeal + 0.5 * torch.randn(num_items, dim, generator=generator)
    popularity = 1.0 / torch.arange(1, num_items + 1).float() ** 0.8
    item = torch.multinomial(popularity, num_events, replacement=True, generator=generator)
    user = torch.randint(num_users, (num_events,), generator=generator)
    chance = torch.sigmoid((user_taste[user] * item_appeal[item]).sum(1) / dim**0.5 * 2)
    return Clicks(user, item, torch.bernoulli(chance, generator=generator))


def train(model: GMF, clicks: Clicks, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(clicks), generator=generator).split(2048):
            part = clicks.take(batch)
            loss = nn.functional.binary_cross_entropy_with_logits(model(part.user, part.item), part.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"  epoch {epoch + 1}: training loss {total / len(clicks):.4f}", flush=True)


@torch.no_grad()
def auc(model: nn.Module, clicks: Clicks) -> float:
    """Chance that a click scores above a non-click; equal scores count half."""
    return metrics.auc(model(clicks.user, clicks.item), clicks.label)


def cqr_compress(*arguments: object) -> None:
    """Run the command line."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ cqr-compress {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "cqr_compress", *words], check=True)


def draw(report: cqr.TuningReport, path: Path) -> None:
    """Held-out AUC over the steps of fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for stage, marker, label in (
        ("as given", "s", "converted"), ("refit", "^", "re-quantized"), ("trained", "o", "trained")
    ):  # fmt: skip
        points = [(e.step, e.metrics["test_auc"]) for e in report.history if e.stage == stage]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=label)
    if report.dense is not None:
        axes.axhline(report.dense["test_auc"], color="black", lw=1, label="dense")
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("AUC on test clicks")
    axes.set_title("What compression cost, and what fine-tuning gave back")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small recommender, compress it and fine-tune it.")
    parser.add_argument("--folder", type=Path, default=Path("quickstart"))
    parser.add_argument("--ratio", type=float, default=32.0)
    parser.add_argument("--num-users", type=int, default=20_000)
    parser.add_argument("--num-items", type=int, default=10_000)
    parser.add_argument("--num-events", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    ckpt, small, tuned = (args.folder / name for name in ("ckpt.pt", "small.safetensors", "tuned.safetensors"))

    # a model of yours
    torch.manual_seed(args.seed)
    clicks = generate(args.num_users, args.num_items, args.num_events, args.seed)
    tenth = len(clicks) // 10
    ends = (slice(tenth // 2), slice(tenth // 2, tenth), slice(tenth, None))
    test, valid, training = (clicks.take(part) for part in ends)
    model = GMF(args.num_users, args.num_items, dim=32)
    print(f"training on {len(training):,} generated clicks", flush=True)
    train(model, training, args.epochs, args.seed)
    torch.save(model.state_dict(), ckpt)

    # its tables, compressed
    cqr_compress("convert", ckpt, "-o", small, "--ratio", args.ratio, "--force")

    # fine-tuned: the model, its data, its loss, and a metric on clicks that training does not see
    task = cqr.Task(
        name="quickstart",
        model=lambda: GMF(args.num_users, args.num_items, dim=32),
        train_batches=lambda epoch: (training.take(part) for part in torch.randperm(len(training)).split(2048)),
        loss=lambda model, batch: nn.functional.binary_cross_entropy_with_logits(
            model(batch.user, batch.item), batch.label, reduction="none"
        ),
        evaluate=lambda model: {"auc": auc(model, valid), "test_auc": auc(model, test)},
        metric="auc",
    )
    print("\nfine-tuning", flush=True)
    logging.basicConfig(stream=sys.stdout, format="  %(message)s")
    logging.getLogger("cqr_compress").setLevel(logging.INFO)
    report = cqr.finetune(small, tuned, task, original=ckpt, epochs=2, eval_every=200, seed=args.seed, force=True)
    cqr_compress("inspect", tuned)

    # and back in your model
    cqr.load_compressed(model, tuned)  # the embedding layers are compressed from here on
    assert report.dense is not None
    print(f"\nAUC on {len(test):,} test clicks: {report.dense['test_auc']:.4f} dense, ", end="")
    print(f"{report.before['test_auc']:.4f} converted, {auc(model, test):.4f} fine-tuned")
    sizes = f"{ckpt.stat().st_size:,} bytes before, {tuned.stat().st_size:,} after"
    print(f"{sizes}; {time.monotonic() - began:.0f} s in all")
    try:
        draw(report, args.folder / "quickstart.png")
        print(f"wrote {args.folder / 'quickstart.png'}")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
