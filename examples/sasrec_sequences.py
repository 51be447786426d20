"""SASRec on sequences of items: train, compress, fine-tune and evaluate.

    python examples/sasrec_sequences.py Beauty.txt [--folder sasrec] [--ratio 16]

The file has one line for each user: `user item item ...` in the order of time, ids from 1. Of each user the last
item is for the test, the one before chooses among weights, and the others are trained on; ranks are among all
items that the user has not had. The model is that of Kang & McAuley (arXiv:1808.09781) with the parameter names of
https://github.com/pmixer/SASRec.pytorch, so that `--task sasrec` knows it.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.tasks.metrics import ranking_metrics


class Pointwise(nn.Module):
    """Two convolutions of width 1."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.conv1(x.transpose(1, 2))).relu()
        return self.dropout(self.conv2(hidden)).transpose(1, 2)


class SASRec(nn.Module):
    """Self-attention over the last items of a user; item 0 is padding."""

    def __init__(self, num_items: int, dim: int, length: int, blocks: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(num_items, dim, padding_idx=0)
        self.pos_emb = nn.Embedding(length + 1, dim, padding_idx=0)
        for table in (self.item_emb, self.pos_emb):
            nn.init.uniform_(table.weight, -(dim**-0.5), dim**-0.5)
            table.weight.data[0] = 0
        self.dropout = nn.Dropout(dropout)
        self.attention_layernorms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-8) for _ in range(blocks)])
        self.attention_layers = nn.ModuleList(
            [nn.MultiheadAttention(dim, 1, dropout, batch_first=True) for _ in range(blocks)]
        )
        self.forward_layernorms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-8) for _ in range(blocks)])
        self.forward_layers = nn.ModuleList([Pointwise(dim, dropout) for _ in range(blocks)])
        self.last_layernorm = nn.LayerNorm(dim, eps=1e-8)

    def forward(self, items: Tensor) -> Tensor:
        """Hidden states (B, T, dim) of items (B, T), padded on the left."""
        T = items.shape[1]
        positions = torch.arange(1, T + 1) * (items != 0)
        x = self.dropout(self.item_emb(items) * self.item_emb.embedding_dim**0.5 + self.pos_emb(positions))
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        for i, attention in enumerate(self.attention_layers):
            query = self.attention_layernorms[i](x)
            x = x + attention(query, query, query, attn_mask=later, need_weights=False)[0]
            x = x + self.forward_layers[i](self.forward_layernorms[i](x))
        return self.last_layernorm(x)


def read(path: Path) -> list[list[int]]:
    """The items of each user with at least three of them."""
    lines = [[int(word) for word in line.split()[1:]] for line in path.read_text().splitlines()]
    return [items for items in lines if len(items) >= 3]


def padded(sequences: list[list[int]], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(items[-length:])) + items[-length:] for items in sequences])


@torch.no_grad()
def ndcg(model: SASRec, users: list[list[int]], length: int) -> float:
    """NDCG@10 of the last item but one of each user; items with the same score count half in its rank."""
    model.eval()
    ranks = []
    for start in range(0, len(users), 512):
        part = users[start : start + 512]
        scores = model(padded([items[:-2] for items in part], length))[:, -1] @ model.item_emb.weight.T
        scores[:, 0] = -torch.inf
        wanted = scores.gather(1, torch.tensor([[items[-2]] for items in part]))
        broken = scores.isnan().any(1)
        for row, items in enumerate(part):
            scores[row, items[:-1]] = -torch.inf
        rank = (scores > wanted).sum(1) + (scores == wanted).sum(1) / 2
        ranks.append(rank.where(~broken, torch.nan))
    return ranking_metrics(torch.cat(ranks))["ndcg@10"]


def train(model: SASRec, users: list[list[int]], length: int, epochs: int, weight_decay: float) -> None:
    """Train with a softmax over all items, and leave the model as it was when NDCG@10 was best."""
    known = [items[:-2] for items in users if len(items) > 3]
    inputs, wanted = (
        padded([items[:-1] for items in known], length),
        padded([items[1:] for items in known], length),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=weight_decay)
    best, kept = -1.0, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(inputs)).split(256):
            hidden, real = model(inputs[batch]), wanted[batch] > 0
            loss = F.cross_entropy(hidden[real] @ model.item_emb.weight.T, wanted[batch][real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = ndcg(model, users, length)
        print(f"  epoch {epoch + 1}: NDCG@10 {found:.4f}", flush=True)
        if found > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def cqr_compress(*arguments: object) -> None:
    """Run the command line."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ cqr-compress {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "cqr_compress", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train SASRec on sequences, compress it and fine-tune it.")
    parser.add_argument("sequences", type=Path, help="lines of `user item item ...`")
    parser.add_argument("--folder", type=Path, default=Path("sasrec"))
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--length", type=int, default=20, help="items that are looked at")
    parser.add_argument("--epochs", type=int, default=30)
    help_text = "L2 in Adam; the best of 0, 1e-6, 1e-5, 1e-4 and 1e-3 on Amazon Beauty by default"
    parser.add_argument("--weight-decay", type=float, default=1e-4, help=help_text)
    parser.add_argument("--min-rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    users = read(args.sequences)
    num_items = max(max(items) for items in users) + 1
    model = SASRec(num_items, args.dim, args.length)
    print(f"training on the items of {len(users):,} users, {num_items - 1:,} different ones", flush=True)
    train(model, users, args.length, args.epochs, args.weight_decay)
    names = ("ckpt.pt", "small.safetensors", "tuned.safetensors")
    ckpt, small, tuned = (args.folder / name for name in names)
    torch.save(model.state_dict(), ckpt)
    cqr_compress("convert", ckpt, "-o", small, "--ratio", args.ratio, "--min-rows", args.min_rows, "--force")
    data = ["--task", "sasrec", "--set", "norm_first=true", "--train-file", args.sequences, "--batch-size", 256]
    softmax = [
        "--trainable",
        "all",
        "--distill",
        "outputs",
        "--option",
        "distill_weight=10",
        "--learning-rate",
        1e-3,
    ]
    rest = ["--set", "dropout=0", "--codes", "frozen", "--epochs", 4, "--force"]
    cqr_compress("finetune", small, "-o", tuned, "--original", ckpt, *data, *softmax, *rest)
    cqr_compress("evaluate", small, tuned, "--original", ckpt, *data)


if __name__ == "__main__":
    main()
