"""MovieLens with GMF: train, compress, fine-tune and evaluate, with the command line and no code of your own.

    python examples/movielens_gmf.py u.data [--folder movielens] [--ratio 32]

The file has lines of user, item, rating and time, separated by tabs: `u.data` of MovieLens-100k, or RecBole's
`.inter` with its heading. Ratings of 4 and 5 are positive and 3 is left out. Of each user the last two ratings are
for the test, the two before choose among weights, and the others are trained on. The model is generalized matrix
factorization (He et al. 2017, doi:10.1145/3038912.3052569).
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GMF(nn.Module):
    """The product of a user's and an item's row."""

    def __init__(self, num_users: int, num_items: int, dim: int = 32) -> None:
        super().__init__()
        self.user_embedding, self.item_embedding = nn.Embedding(num_users, dim), nn.Embedding(num_items, dim)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.uniform_(table.weight, -(dim**-0.5), dim**-0.5)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits of a high rating: (B,)."""
        return (self.user_embedding(user) * self.item_embedding(item)).sum(1)


def split(path: Path, folder: Path) -> dict[str, Tensor]:
    """Read ratings and write train.tsv, valid.tsv and test.tsv; their rows of user, item and label, ids from 0."""
    by_user: dict[int, list[tuple[float, int, float]]] = defaultdict(list)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        cells = line.split("\t")
        if number == 1 and not cells[0].isdecimal():
            continue  # a heading
        try:
            user, item, rating, when = (float(cell) for cell in cells[:4])
        except ValueError as e:
            raise SystemExit(f"{path}, line {number}: not user, item, rating and time separated by tabs") from e
        if rating != 3:
            by_user[int(user)].append((when, int(item), rating))
    parts: dict[str, list[tuple[int, int, float]]] = {"train": [], "valid": [], "test": []}
    for user, events in by_user.items():
        events.sort()
        for name, part in (("train", events[:-4]), ("valid", events[-4:-2]), ("test", events[-2:])):
            parts[name] += [(user - 1, item - 1, float(rating >= 4)) for _, item, rating in part]
    for name, rows in parts.items():
        lines = ["user\titem\tlabel", *(f"{user}\t{item}\t{label:.0f}" for user, item, label in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return {name: torch.tensor(rows) for name, rows in parts.items()}


def losses(model: GMF, rows: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        model(rows[:, 0].long(), rows[:, 1].long()), rows[:, 2], reduction="none"
    )


def train(model: GMF, parts: dict[str, Tensor], epochs: int) -> None:
    """Train, and leave the model as it was when the loss on `valid` was least."""
    # the best weight decay of 0, 1e-6, 1e-5 and 1e-4 on `valid`
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        for batch in torch.randperm(len(parts["train"])).split(256):
            loss = losses(model, parts["train"][batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = losses(model, parts["valid"]).mean().item()
        print(f"  epoch {epoch + 1}: loss on held-out ratings {found:.4f}", flush=True)
        if found < best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def cqr_compress(*arguments: object) -> None:
    """Run the command line."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ cqr-compress {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "cqr_compress", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train GMF on MovieLens, compress it and fine-tune it.")
    parser.add_argument("ratings", type=Path, help="u.data or a .inter file")
    parser.add_argument("--folder", type=Path, default=Path("movielens"))
    parser.add_argument("--ratio", type=float, default=32.0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    parts = split(args.ratings, args.folder)
    num_users, num_items = (int(max(rows[:, i].max() for rows in parts.values())) + 1 for i in (0, 1))
    model = GMF(num_users, num_items)
    print(
        f"training on {len(parts['train']):,} ratings of {num_users:,} users and {num_items:,} items", flush=True
    )
    train(model, parts, args.epochs)
    names = ("ckpt.pt", "small.safetensors", "tuned.safetensors")
    ckpt, small, tuned = (args.folder / name for name in names)
    torch.save(model.state_dict(), ckpt)
    cqr_compress("convert", ckpt, "-o", small, "--ratio", args.ratio, "--min-rows", 500, "--force")
    data = ["--task", "gmf", "--train-file", args.folder / "train.tsv", "--eval-file"]
    cqr_compress(
        "finetune", small, "-o", tuned, "--original", ckpt, *data, args.folder / "valid.tsv", "--batch-size", 256,
        "--force",
    )  # fmt: skip
    cqr_compress("evaluate", small, tuned, "--original", ckpt, *data, args.folder / "test.tsv")


if __name__ == "__main__":
    main()
