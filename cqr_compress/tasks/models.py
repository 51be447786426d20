"""The architectures of the built-in tasks, with the parameter names of the checkpoints that they are for."""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.errors import TaskError
from cqr_compress.tasks.shapes import Shapes, add_linears, add_module, at, find_table, refuse_rest


class Factorization(nn.Module):
    """Generalized matrix factorization (He et al. 2017, doi:10.1145/3038912.3052569).

    The product of a user's and an item's row, summed or weighted by a linear layer where the file has one.
    """

    def __init__(self, shapes: Shapes, user_table: str | None, item_table: str | None) -> None:
        """Find the tables by "user" and "item" in their names, or as they are named."""
        super().__init__()
        self._user, self._item = (
            find_table(shapes, word, named).removesuffix(".weight")
            for word, named in (("user", user_table), ("item", item_table))
        )
        for path in (self._user, self._item):
            num_rows, dim = shapes[f"{path}.weight"]
            add_module(self, path, nn.Embedding(num_rows, dim))
        width = shapes[f"{self._user}.weight"][1]
        if width != shapes[f"{self._item}.weight"][1]:
            raise TaskError(f"users have {width} dimensions and items {shapes[f'{self._item}.weight'][1]}")
        self._out = add_linears(self, shapes, [n for n, s in shapes.items() if s == (1, width)])
        refuse_rest(self, shapes, "gmf")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits of users (B,) and items (B,): (B,)."""
        product = at(self, self._user)(user) * at(self, self._item)(item)
        return cast(Tensor, at(self, self._out[0])(product)[:, 0] if self._out else product.sum(1))


class TwoTower(nn.Module):
    """A perceptron over a user's row and one over an item's; the logit is the product of what they give."""

    def __init__(
        self, shapes: Shapes, user_table: str | None, item_table: str | None, normalize: bool, scale: float
    ) -> None:
        """Find tables and towers by "user" and "item" in their names; ReLU stands between a tower's layers."""
        super().__init__()
        self._sides = []
        for word, named in (("user", user_table), ("item", item_table)):
            table = find_table(shapes, word, named)
            num_rows, dim = shapes[table]
            add_module(self, table.removesuffix(".weight"), nn.Embedding(num_rows, dim))
            tower = [n for n, s in shapes.items() if word in n.lower() and len(s) == 2 and n != table]
            tower = _in_sequence(tower, dim, shapes)
            self._sides.append((table.removesuffix(".weight"), add_linears(self, shapes, tower)))
        self._normalize, self._scale = normalize, scale
        refuse_rest(self, shapes, "two-tower")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits of users (B,) and items (B,): (B,)."""
        sides = []
        for ids, (table, tower) in zip((user, item), self._sides, strict=True):
            rows = at(self, table)(ids)
            for i, path in enumerate(tower):
                rows = at(self, path)(F.relu(rows) if i else rows)
            sides.append(F.normalize(rows, dim=1) if self._normalize else rows)
        return cast(Tensor, (sides[0] * sides[1]).sum(1) * self._scale)


def _in_sequence(names: list[str], dim: int, shapes: Shapes) -> list[str]:
    """Linear layers in the order of the numbers in their names, from `dim` values on.

    Raises:
        TaskError: names that differ by more than numbers, or widths that do not follow one another.
    """
    parts = {name: re.split(r"(\d+)", name) for name in names}
    if len({tuple(split[::2]) for split in parts.values()}) > 1:
        raise TaskError(
            f"task two-tower cannot tell the order of {', '.join(names)}, as they differ by more than numbers. "
            "Write a task file: `cqr-compress finetune --init-task my_task.py`."
        )
    ordered = sorted(names, key=lambda name: [int(number) for number in parts[name][1::2]])
    for name in ordered:
        out, width = shapes[name]
        if width != dim:
            raise TaskError(f"{name!r} takes {width} values, and what comes before it gives {dim}")
        dim = out
    return ordered


class DLRM(nn.Module):
    """The deep learning recommendation model (Naumov et al., arXiv:1906.00091), with the names of its code.

    Dense features go through the bottom perceptron, `bot_l`; its output and the rows of the tables `emb_l` are
    multiplied in pairs, and the top perceptron, `top_l`, takes that output and the products. Which pairs there are
    is read from the width of the first top layer. Without a bottom perceptron there are rows and their products
    alone, and one table may serve several fields.
    """

    def __init__(self, shapes: Shapes, num_fields: int | None = None) -> None:
        """Build what a state_dict's shapes describe.

        Args:
            shapes: `emb_l.*.weight`, `top_l.*`, and perhaps `bot_l.*`.
            num_fields: fields of a single table; the number of tables if None.
        """
        super().__init__()
        tables = sorted(
            (name for name in shapes if name.startswith("emb_l.")), key=lambda name: int(name.split(".")[1])
        )
        top = _in_order(shapes, "top_l.")
        if not tables or not top:
            raise TaskError(
                f"task dlrm wants emb_l.0.weight and top_l.0.weight, and the file has {', '.join(shapes)}"
            )
        for name in tables:
            num_rows, dim = shapes[name]
            add_module(self, name.removesuffix(".weight"), nn.EmbeddingBag(num_rows, dim, mode="sum"))
        self._tables = [name.removesuffix(".weight") for name in tables]
        self.num_fields = num_fields if num_fields is not None and len(tables) == 1 else len(tables)
        self._bottom = add_linears(self, shapes, _in_order(shapes, "bot_l."))
        self._top = add_linears(self, shapes, top)
        self.num_dense = shapes[f"{self._bottom[0]}.weight"][1] if self._bottom else 0
        D, width = shapes[tables[0]][1], shapes[top[0]][1]
        n = self.num_fields + bool(self._bottom)
        kept = D if self._bottom else n * D
        pairs = {kept + n * (n - 1) // 2: -1, kept + n * (n + 1) // 2: 0, n * D: None}
        if width not in pairs:
            raise TaskError(
                f"top_l takes {width} values: with {n} vectors of {D} dimensions that is neither their pairs nor "
                "their concatenation"
            )
        self._diagonal = pairs[width]
        refuse_rest(self, shapes, "dlrm")

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Logits of dense features (B, num_dense) and ids (B, num_fields): (B,)."""
        if len(self._tables) == 1 and self.num_fields > 1:
            rows = at(self, self._tables[0])(ids.reshape(-1, 1)).view(*ids.shape, -1)
        else:
            rows = torch.stack(
                [at(self, path)(ids[:, i : i + 1]) for i, path in enumerate(self._tables)], dim=1
            )  # (B, fields, D)
        kept = rows.flatten(1)
        if self._bottom:
            x = dense
            for path in self._bottom:
                x = F.relu(at(self, path)(x))
            rows = torch.cat([x[:, None], rows], dim=1)
            kept = x
        if self._diagonal is None:
            x = rows.flatten(1)
        else:
            n = rows.shape[1]
            i, j = torch.tril_indices(n, n, self._diagonal, device=rows.device)
            x = torch.cat([kept, (rows @ rows.transpose(1, 2))[:, i, j]], dim=1)
        for k, path in enumerate(self._top):
            x = at(self, path)(F.relu(x) if k else x)
        return x[:, 0]


def _in_order(shapes: Shapes, prefix: str) -> list[str]:
    names = [n for n, s in shapes.items() if n.startswith(prefix) and n.endswith(".weight") and len(s) == 2]
    return sorted(names, key=lambda name: int(name.split(".")[1]))


class SASRec(nn.Module):
    """Self-attention over a user's last items (Kang & McAuley, arXiv:1808.09781); item 0 is padding.

    Parameters have the names of the widely used PyTorch implementation, https://github.com/pmixer/SASRec.pytorch,
    whose blocks normalize first or last.
    """

    def __init__(self, shapes: Shapes, num_heads: int, dropout: float, norm_first: bool) -> None:
        """Build what a state_dict's shapes describe."""
        super().__init__()
        try:
            D = shapes["item_emb.weight"][1]
            (items, _), (positions, _) = shapes["item_emb.weight"], shapes["pos_emb.weight"]
            self.item_emb = nn.Embedding(items, D, padding_idx=0)
            self.pos_emb = nn.Embedding(positions, D, padding_idx=0)
        except KeyError as e:
            raise TaskError(f"task sasrec wants {e}, and the file has {', '.join(shapes)}") from e
        if D % num_heads:
            raise TaskError(f"{D} dimensions cannot be split among num_heads = {num_heads}")
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
        """Items that are looked at."""
        return self.pos_emb.num_embeddings - 1

    def forward(self, items: Tensor) -> Tensor:
        """Hidden states (B, T, D) of sequences (B, T), padded with 0 on the left."""
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
    """The feed-forward part, as convolutions of width 1."""

    def __init__(self, D: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 1)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.conv1(x.transpose(1, 2)))
        return cast(Tensor, self.dropout2(self.conv2(F.relu(x))).transpose(1, 2))
