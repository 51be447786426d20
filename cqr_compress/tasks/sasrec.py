"""The built-in task for next-item prediction: sasrec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress import distributed
from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.tasks.data.files import DataOptions, ExampleFiles, Examples, parse_settings
from cqr_compress.tasks.data.readers import opened_text
from cqr_compress.tasks.metrics import gathered, target_ranks, user_metrics
from cqr_compress.tasks.shapes import Shapes, refuse_rest

_BLOCK_USERS = 16_384
_RANKED_USERS = 256
_CANDIDATES = 16_384
_LOGITS = 2**25


@dataclass(frozen=True)
class SasrecSettings:
    """Settings of sasrec.

    Attributes:
        num_heads: number of attention heads, which the state_dict does not determine.
        dropout: dropout probability in training.
        norm_first: whether blocks normalize before attention, which the state_dict does not determine.
        loss: "ce", cross-entropy of a softmax over all items, or over those of the batch and 16,384 sampled items
            if there are more; or "bce" with one random negative for each item, as in the paper.
        metric: "ndcg@10" or "hr@10" on the second-to-last item of each user; "test_..." on the last one.
    """

    num_heads: int = 1
    dropout: float = 0.2
    norm_first: bool = False
    loss: str = "ce"
    metric: str = "ndcg@10"


def sasrec_task(shapes: Shapes, options: DataOptions) -> Task:
    """Create the task of next-item prediction: lines of `user item item ...` in order of time, ids from 1.

    The items of a user may also be in several consecutive lines, such as one `user item` for each item.
    The last item of each user is for testing, the second-to-last for validation, the others for training. Ranks
    are among all items that are not in the user's history.
    """
    settings = parse_settings(SasrecSettings, options.settings, "sasrec")
    if settings.loss not in ("bce", "ce"):
        raise TaskError(f"setting loss of task sasrec is {settings.loss!r}: give bce or ce")
    if settings.metric.removeprefix("test_") not in ("ndcg@10", "hr@10"):
        raise TaskError(f"setting metric of task sasrec is {settings.metric!r}: give ndcg@10 or hr@10")
    if options.held_out:
        raise TaskError("task sasrec evaluates on the last items of the training file: omit --eval-file")

    def build() -> SASRec:
        return SASRec(shapes, settings.num_heads, settings.dropout, settings.norm_first)

    model = build()
    num_items, length = model.item_emb.num_embeddings, model.max_length
    del model

    def read(path: Path) -> Iterator[Examples]:
        for users in _users(path, num_items):
            known = [items[:-2] for items in users if len(items) > 3]
            if known:
                yield (
                    _padded([items[:-1] for items in known], length),
                    _padded([items[1:] for items in known], length),
                )

    files = ExampleFiles(DataOptions(options.train, options.train, options.batch_size), read, 0.5)

    def choices(model: SASRec, batch: Examples) -> tuple[Tensor, Tensor]:
        """Compute scores of candidates at positions of a batch, (n, V), and the indices of targets, (n,)."""
        items, wanted = batch
        at = wanted.flatten().nonzero().flatten()
        limit = _LOGITS // min(num_items, _CANDIDATES)
        if len(at) > limit:
            at = at[torch.randperm(len(at), device="cpu")[:limit].to(at.device)]
        label = wanted.flatten()[at]
        candidates = torch.arange(1, num_items, device=label.device)  # 0 is padding
        if num_items > _CANDIDATES:
            drawn = torch.randint(1, num_items, (_CANDIDATES,), device="cpu").to(label.device)
            candidates = torch.unique(torch.cat([label, drawn]))
        hidden, table = model(items).flatten(0, 1)[at], model.item_emb
        scores = (
            table.scores(hidden, candidates) if isinstance(table, TableLayer) else hidden @ table(candidates).T
        )
        return scores, torch.searchsorted(candidates, label)

    def logits(model: SASRec, batch: Examples) -> Tensor:
        return choices(model, batch)[0]

    def loss(model: SASRec, batch: Examples) -> Tensor:
        if settings.loss == "ce":
            scores, label = choices(model, batch)
            return F.cross_entropy(scores, label, reduction="none")
        items, wanted = batch
        hidden, real = model(items), wanted > 0
        other = torch.randint(1, num_items, wanted.shape, device="cpu").to(wanted.device)
        again = ((other[:, :, None] == wanted[:, None]).any(2) & real).nonzero(as_tuple=True)
        other[again] = torch.randint(1, num_items, (len(again[0]),), device="cpu").to(wanted.device)
        up, down = ((hidden * model.item_emb(ids)).sum(2)[real] for ids in (wanted, other))
        return F.softplus(-up) + F.softplus(down)

    def evaluate(model: SASRec) -> Mapping[str, Tensor]:
        device = next(model.parameters()).device
        ranks: dict[str, list[Tensor]] = {"": [], "test_": []}
        for path in options.train:
            for index, users in enumerate(_users(path, num_items)):
                if index % distributed.world_size() != distributed.rank():
                    continue
                users = [items for items in users if len(items) >= 3]
                for start in range(0, len(users), _RANKED_USERS):
                    part = users[start : start + _RANKED_USERS]
                    for name, end in (("", 2), ("test_", 1)):
                        histories = [items[: len(items) - end] for items in part]
                        wanted = torch.tensor([items[len(items) - end] for items in part], device=device)
                        ranks[name].append(_ranks(model, histories, wanted, length))
        metrics: dict[str, Tensor] = {}
        for name, found in ranks.items():
            joined = gathered(found)
            if not len(joined):
                raise TaskError(
                    "no user has three items to evaluate on. Lines have to be `user item item ...`, or `user "
                    "item` with consecutive lines for each user"
                )
            metrics |= {f"{name}{figure}": value for figure, value in user_metrics(joined).items()}
        return metrics

    return Task(
        name="sasrec", model=build, train_batches=files.train_batches, loss=loss, logits=logits, evaluate=evaluate,  # type: ignore[arg-type]
        metric=settings.metric, identity=options.identity,
    )  # fmt: skip


def _ranks(model: SASRec, histories: list[list[int]], wanted: Tensor, length: int) -> Tensor:
    """Compute the ranks of the target items, (B,), among all items without those of the history."""
    hidden = model(_padded(histories, length).to(wanted.device))[:, -1]
    scores = hidden @ model.item_emb.weight.T
    hidden_items = torch.zeros_like(scores, dtype=torch.bool)
    hidden_items[:, 0] = True  # padding
    users = torch.tensor([i for i, items in enumerate(histories) for _ in items], device=wanted.device)
    hidden_items[users, torch.tensor([item for items in histories for item in items], device=wanted.device)] = True
    return target_ranks(scores, wanted, hidden_items)


def _users(path: Path, num_items: int) -> Iterator[list[list[int]]]:
    """Stream the items of users, in blocks of users; consecutive lines of one user are joined.

    Raises:
        TaskError: a line with an id that is invalid, or outside the table.
    """
    block: list[list[int]] = []
    user = None
    with opened_text(path) as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            if not words:
                continue
            try:
                items = [int(word) for word in words[1:]]
            except ValueError as e:
                raise TaskError(
                    f"{str(path)!r}, line {number}: {line.strip()[:60]!r} is not `user item ...`"
                ) from e
            outside = [item for item in items if not 1 <= item < num_items]
            if outside:
                raise TaskError(
                    f"{str(path)!r}, line {number}: item {outside[0]} is outside 'item_emb.weight', whose ids "
                    f"are 1 to {num_items - 1}"
                )
            if words[0] == user:
                block[-1] += items
                continue
            user = words[0]
            if len(block) == _BLOCK_USERS:
                yield block
                block = []
            block.append(items)
    if block:
        yield block


def _padded(sequences: list[list[int]], length: int) -> Tensor:
    """Return the last items of each sequence, left-padded with zeros: (B, length) int64."""
    out = np.zeros((len(sequences), length), np.int64)
    for row, items in enumerate(sequences):
        last = items[-length:]
        if last:
            out[row, length - len(last) :] = last
    return torch.from_numpy(out)


class SASRec(nn.Module):
    """Self-attention over a user's last items (Kang & McAuley, arXiv:1808.09781); item 0 is padding.

    Parameters have the names of the widely used PyTorch implementation, https://github.com/pmixer/SASRec.pytorch,
    whose blocks have pre- or post-normalization.
    """

    def __init__(self, shapes: Shapes, num_heads: int, dropout: float, norm_first: bool) -> None:
        """Build the model from the shapes of a state_dict.

        Raises:
            TaskError: shapes that are not those of a SASRec model, or an invalid number of heads.
        """
        super().__init__()
        try:
            D = shapes["item_emb.weight"][1]
            (items, _), (positions, _) = shapes["item_emb.weight"], shapes["pos_emb.weight"]
            self.item_emb = nn.Embedding(items, D, padding_idx=0)
            self.pos_emb = nn.Embedding(positions, D, padding_idx=0)
        except KeyError as e:
            raise TaskError(f"task sasrec requires {e}, but the file has {', '.join(shapes)}") from e
        if D % num_heads:
            raise TaskError(f"num_heads is {num_heads}: give a divisor of {D} dimensions")
        blocks = len(
            [name for name in shapes if name.startswith("attention_layers.") and "in_proj_weight" in name]
        )
        self.attention_layernorms = nn.ModuleList([nn.LayerNorm(D, eps=1e-8) for _ in range(blocks)])
        self.attention_layers = nn.ModuleList(
            [nn.MultiheadAttention(D, num_heads, dropout, batch_first=True) for _ in range(blocks)]
        )
        self.forward_layernorms = nn.ModuleList([nn.LayerNorm(D, eps=1e-8) for _ in range(blocks)])
        self.forward_layers = nn.ModuleList([_Pointwise(D, dropout) for _ in range(blocks)])
        self.last_layernorm = nn.LayerNorm(D, eps=1e-8)
        self.emb_dropout = nn.Dropout(dropout)
        self._norm_first = norm_first
        refuse_rest(self, shapes, "sasrec")

    @property
    def max_length(self) -> int:
        """Maximum length of a sequence."""
        return self.pos_emb.num_embeddings - 1

    def forward(self, items: Tensor) -> Tensor:
        """Compute hidden states (B, T, D) of sequences (B, T), left-padded with 0."""
        T = items.shape[1]
        positions = torch.arange(1, T + 1, device=items.device) * (items != 0)
        x = self.emb_dropout(self.item_emb(items) * self.item_emb.embedding_dim**0.5 + self.pos_emb(positions))
        later = torch.ones(T, T, dtype=torch.bool, device=items.device).triu(1)
        layers = (self.attention_layernorms, self.attention_layers, self.forward_layernorms, self.forward_layers)
        for norm, attention, forward_norm, pointwise in zip(*layers, strict=True):
            query = norm(x) if self._norm_first else x
            seen = x + attention(query, query, query, attn_mask=later, need_weights=False)[0]
            x = seen if self._norm_first else norm(seen)
            x = x + pointwise(forward_norm(x)) if self._norm_first else forward_norm(x + pointwise(x))
        return cast(Tensor, self.last_layernorm(x))


class _Pointwise(nn.Module):
    """The pointwise feed-forward network, as convolutions of width 1."""

    def __init__(self, D: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 1)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.conv1(x.transpose(1, 2)))
        return cast(Tensor, self.dropout2(self.conv2(F.relu(x))).transpose(1, 2))
