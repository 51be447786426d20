"""The built-in tasks for pairs of users and items: gmf and two-tower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.tasks.click_task import HOLD_OUT, ModelBuilder, click_task, read_labels
from cqr_compress.tasks.data.files import DataOptions, Examples, parse_settings
from cqr_compress.tasks.data.readers import Column, heading, read_blocks
from cqr_compress.tasks.shapes import Shapes, add_linears, add_module, at, find_table, refuse_rest


@dataclass(frozen=True)
class PairSettings:
    """Settings of gmf and two-tower.

    Attributes:
        user, item, label: columns, by name or by index from 0; if None, those with these words in the heading,
            else the first three.
        threshold: labels of at least this value are positive; if None, labels are 0 and 1.
        skip: examples with this label are skipped.
        first_id: id of the tables' first row in the files.
        user_table, item_table: names of the tables; if None, found by the words "user" and "item".
        hold_out: share of the training files to evaluate on, if there is no other file.
        metric: "auc" or "bce".
        normalize: two-tower: whether the towers' outputs are normalized to length 1.
        scale: two-tower: factor of the inner product.
    """

    user: str | None = None
    item: str | None = None
    label: str | None = None
    threshold: float | None = None
    skip: float | None = None
    first_id: int = 0
    user_table: str | None = None
    item_table: str | None = None
    hold_out: float = HOLD_OUT
    metric: str = "auc"
    normalize: bool = False
    scale: float = 1.0


def gmf_task(shapes: Shapes, options: DataOptions) -> Task:
    """Create the task of generalized matrix factorization, on clicks or thresholded ratings."""
    settings = parse_settings(PairSettings, options.settings, "gmf")
    build = ModelBuilder(Factorization, (shapes, settings.user_table, settings.item_table))
    return _pair_task("gmf", shapes, options, settings, build)


def two_tower_task(shapes: Shapes, options: DataOptions) -> Task:
    """Create the task of two towers over users and items, on clicks or thresholded ratings."""
    settings = parse_settings(PairSettings, options.settings, "two-tower")
    arguments = (shapes, settings.user_table, settings.item_table, settings.normalize, settings.scale)
    return _pair_task("two-tower", shapes, options, settings, ModelBuilder(TwoTower, arguments))


def _pair_task(
    name: str, shapes: Shapes, options: DataOptions, settings: PairSettings, build: ModelBuilder
) -> Task:
    tables = [
        find_table(shapes, word, named)
        for word, named in (("user", settings.user_table), ("item", settings.item_table))
    ]

    def read(path: Path) -> Iterator[Examples]:
        for block in read_blocks(path, _pair_columns(path, settings)):
            users, items = (
                block.ids(i, shapes[table][0], table, settings.first_id) for i, table in enumerate(tables)
            )
            raw = block.numbers(2)
            kept = torch.ones_like(raw, dtype=torch.bool) if settings.skip is None else raw != settings.skip
            label = read_labels(block, raw, kept, settings.threshold)
            yield users[kept], items[kept], label[kept]

    def logits(model: nn.Module, batch: Examples) -> Tensor:
        logits: Tensor = model(batch[0], batch[1])
        return logits

    return click_task(name, options, settings.hold_out, settings.metric, build, read, logits)


def _pair_columns(path: Path, settings: PairSettings) -> list[Column]:
    names = heading(path)
    found: list[Column] = []
    words = (("user", settings.user), ("item", settings.item), ("label", settings.label))
    for position, (word, asked) in enumerate(words):
        if asked is not None:
            found.append(int(asked) if asked.isdecimal() else asked)
            continue
        others = ("label", "rating", "click") if word == "label" else (word,)
        named = [name for name in names if any(other in name.lower() for other in others)]
        found.append(named[0] if named else position)
    if len({type(column) for column in found}) > 1:
        raise TaskError(f"columns of {str(path)!r} ({', '.join(names)}): set user, item and label")
    return found


class Factorization(nn.Module):
    """Generalized matrix factorization (He et al. 2017, doi:10.1145/3038912.3052569).

    The elementwise product of a user's and an item's row, summed, or weighted by a linear layer of the file.
    """

    def __init__(self, shapes: Shapes, user_table: str | None, item_table: str | None) -> None:
        """Build the model; tables that are not named are found by "user" and "item" in their names."""
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
            raise TaskError(
                f"users have {width} dimensions, but items {shapes[f'{self._item}.weight'][1]}: gmf requires the "
                "same number"
            )
        self._out = add_linears(self, shapes, [n for n, s in shapes.items() if s == (1, width)])
        refuse_rest(self, shapes, "gmf")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Logits of users (B,) and items (B,): (B,)."""
        product = at(self, self._user)(user) * at(self, self._item)(item)
        return cast(Tensor, at(self, self._out[0])(product)[:, 0] if self._out else product.sum(1))


class TwoTower(nn.Module):
    """An MLP over a user's row and one over an item's; the logit is the inner product of their outputs."""

    def __init__(
        self, shapes: Shapes, user_table: str | None, item_table: str | None, normalize: bool, scale: float
    ) -> None:
        """Build the model; towers, with ReLU activations, are found by "user" and "item" in their names."""
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
    """Sort linear layers by the numbers in their names, starting with `dim` inputs.

    Raises:
        TaskError: names that differ by more than numbers, or consecutive layers whose widths do not match.
    """
    parts = {name: re.split(r"(\d+)", name) for name in names}
    if len({tuple(split[::2]) for split in parts.values()}) > 1:
        raise TaskError(
            f"task two-tower cannot order {', '.join(names)}, because they differ by more than numbers. "
            "Write a task file: `cqr-compress finetune --init-task my_task.py`."
        )
    ordered = sorted(names, key=lambda name: [int(number) for number in parts[name][1::2]])
    for name in ordered:
        out, width = shapes[name]
        if width != dim:
            raise TaskError(f"{name!r} has {width} inputs, but the layer before it has {dim} outputs")
        dim = out
    return ordered
