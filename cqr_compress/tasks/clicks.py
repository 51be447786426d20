"""Built-in tasks of labelled examples: gmf, two-tower and dlrm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.errors import TaskError
from cqr_compress.tasks.files import DataOptions, ExampleFiles, Examples, parse_settings
from cqr_compress.tasks.metrics import click_figures, gathered
from cqr_compress.tasks.models import DLRM, Factorization, TwoTower
from cqr_compress.tasks.readers import Block, Column, heading, read_blocks, read_libfm
from cqr_compress.tasks.shapes import Shapes, find_table
from cqr_compress.tuning.task import Task

_HOLD_OUT = 0.1
_NUM_CRITEO_DENSE, _NUM_CRITEO_IDS = 13, 26


@dataclass(frozen=True)
class PairSettings:
    """Settings of gmf and two-tower.

    Attributes:
        user, item, label: columns, by name or by number from 0; where None, those with these words in the heading,
            else the first three.
        threshold: labels from here on are positive; if None, labels are 0 and 1.
        skip: examples with this label are left out.
        first_id: number in the files of the tables' first row.
        user_table, item_table: names of the tables; found by these words if None.
        hold_out: share of the training files to evaluate on, where there is no other file.
        metric: "auc" or "bce".
        normalize: two-tower: whether the towers' outputs have length 1.
        scale: two-tower: what the product is multiplied by.
    """

    user: str | None = None
    item: str | None = None
    label: str | None = None
    threshold: float | None = None
    skip: float | None = None
    first_id: int = 0
    user_table: str | None = None
    item_table: str | None = None
    hold_out: float = _HOLD_OUT
    metric: str = "auc"
    normalize: bool = False
    scale: float = 1.0


def gmf_task(shapes: Shapes, options: DataOptions) -> Task:
    """Generalized matrix factorization of users and items, on clicks or thresholded ratings."""
    settings = parse_settings(PairSettings, options.settings, "gmf")
    build = _Build(Factorization, (shapes, settings.user_table, settings.item_table))
    return _pair_task("gmf", shapes, options, settings, build)


def two_tower_task(shapes: Shapes, options: DataOptions) -> Task:
    """Two towers over users and items, on clicks or thresholded ratings."""
    settings = parse_settings(PairSettings, options.settings, "two-tower")
    arguments = (shapes, settings.user_table, settings.item_table, settings.normalize, settings.scale)
    return _pair_task("two-tower", shapes, options, settings, _Build(TwoTower, arguments))


@dataclass(frozen=True)
class _Build:
    cls: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> nn.Module:
        model: nn.Module = self.cls(*self.arguments)
        return model


def _pair_task(name: str, shapes: Shapes, options: DataOptions, settings: PairSettings, build: _Build) -> Task:
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
            label = _labels(block, raw, kept, settings.threshold)
            yield users[kept], items[kept], label[kept]

    def logits(model: nn.Module, batch: Examples) -> Tensor:
        logits: Tensor = model(batch[0], batch[1])
        return logits

    return _click_task(name, options, settings.hold_out, settings.metric, build, read, logits)


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


def _labels(block: Block, raw: Tensor, kept: Tensor, threshold: float | None) -> Tensor:
    """Labels of 0 and 1; -1 counts as 0."""
    unknown = (raw.isnan() & kept).nonzero()
    if len(unknown):
        raise TaskError(f"{block.where(int(unknown[0]))}: there is no label")
    if threshold is not None:
        return (raw >= threshold).float()
    other = (kept & (raw != 0) & (raw != 1) & (raw != -1)).nonzero()
    if len(other):
        row = int(other[0])
        raise TaskError(
            f"{block.where(row)}: the label is {raw[row]:g}. Labels are 0 and 1 (or -1 and 1); for ratings set "
            "threshold, such as threshold=4"
        )
    return (raw > 0).float()


@dataclass(frozen=True)
class DlrmSettings:
    """Settings of dlrm.

    Attributes:
        ids: "hex" for Criteo's hexadecimal categories, taken modulo each table's rows (as `--max-ind-range` of the
            DLRM code does); "int" for row numbers.
        hold_out: share of the training files to evaluate on, where there is no other file.
        metric: "bce" or "auc".
    """

    ids: str = "hex"
    hold_out: float = _HOLD_OUT
    metric: str = "bce"


def dlrm_task(shapes: Shapes, options: DataOptions) -> Task:
    """DLRM on click logs: the TSV of Criteo Kaggle and Terabyte (label, dense features, categories), or libfm."""
    settings = parse_settings(DlrmSettings, options.settings, "dlrm")
    if settings.ids not in ("hex", "int"):
        raise TaskError(f"setting ids of task dlrm is {settings.ids!r}: give hex or int")
    libfm = all(path.name.removesuffix(".gz").endswith((".libfm", ".libsvm", ".svm")) for path in options.train)
    tables = sorted((n for n in shapes if n.startswith("emb_l.")), key=lambda name: int(name.split(".")[1]))
    sizes = [shapes[name][0] for name in tables]
    bottom = shapes.get("bot_l.0.weight")
    num_dense = bottom[1] if bottom else 0
    num_fields = len(next(read_libfm(options.train[0], 1)).columns) - 1 if libfm else len(tables)
    if libfm and (num_dense or len(tables) not in (1, num_fields)):
        raise TaskError(
            f"{str(options.train[0])!r} has {num_fields} ids in a line and no numbers, and the model has "
            f"{len(tables)} tables and takes {num_dense} numbers"
        )
    if libfm and len(tables) == 1:
        sizes, tables = sizes * num_fields, tables * num_fields

    def read(path: Path) -> Iterator[Examples]:
        blocks = read_libfm(path) if libfm else read_blocks(path, range(1 + num_dense + num_fields))
        for block in blocks:
            raw = block.numbers(0)
            label = _labels(block, raw, torch.ones_like(raw, dtype=torch.bool), None)
            values = [block.numbers(1 + i) for i in range(num_dense)] or [label]
            first = 1 + num_dense
            if settings.ids == "hex" and not libfm:
                ids = [_hexadecimal(block, first + i) % size for i, size in enumerate(sizes)]
            else:
                ids = [block.ids(first + i, sizes[i], tables[i]) for i in range(num_fields)]
            # as in the DLRM code: missing and negative values count as 0
            dense = torch.stack(values, 1).nan_to_num(0.0).clamp_min(0).log1p()
            yield dense, torch.stack(ids, 1), label

    def logits(model: nn.Module, batch: Examples) -> Tensor:
        logits: Tensor = model(batch[0], batch[1])
        return logits

    build = _Build(DLRM, (shapes, num_fields))
    return _click_task("dlrm", options, settings.hold_out, settings.metric, build, read, logits)


def _hexadecimal(block: Block, column: int) -> Tensor:
    """A column of hexadecimal numbers of up to 15 digits; empty cells are 0."""
    values = block.columns[column].astype("S")
    width = max(1, values.dtype.itemsize)
    digits = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).reshape(len(values), width)
    found = _DIGITS[digits]
    bad = ((found == 255) | (width > 15)).any(1).nonzero()[0]
    if len(bad):
        raise TaskError(
            f"{block.where(int(bad[0]))}: {block.columns[column][bad[0]]!s} is not a hexadecimal number. For row "
            "numbers set ids=int"
        )
    total = np.zeros(len(values), np.int64)
    for digit in found.T:
        total = np.where(digit == 254, total, total * 16 + digit)
    return torch.from_numpy(total)


def _digit_values() -> np.ndarray[Any, Any]:
    table = np.full(256, 255, np.uint8)
    table[0] = 254  # numpy fills short strings with NUL
    for value, digit in enumerate("0123456789abcdef"):
        table[[ord(digit), ord(digit.upper())]] = value
    return table


_DIGITS = _digit_values()


def _click_task(
    name: str, options: DataOptions, hold_out: float, metric: str, build: Any, read: Any, logits: Any
) -> Task:
    """A task whose examples end in a label, and whose model gives a logit for each."""
    if not 0 < hold_out <= 0.5:
        raise TaskError(f"setting hold_out of task {name} is {hold_out}: give a share of at most 0.5")
    if metric not in ("auc", "bce"):
        raise TaskError(f"setting metric of task {name} is {metric!r}: give auc or bce")
    files = ExampleFiles(options, read, hold_out)

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(model, batch), batch[-1], reduction="none")

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        device = next(model.parameters()).device
        found: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in files.held_out_batches():
            found.append(logits(model, tuple(part.to(device) for part in batch)))
            labels.append(batch[-1])
        scores = gathered(found)
        if not len(scores):
            raise TaskError("there is no example to evaluate on")
        return click_figures(scores, gathered(labels))

    return Task(
        name=name, model=build, train_batches=files.train_batches, loss=loss, evaluate=evaluate, metric=metric,
        mode="max" if metric == "auc" else "min", identity=options.identity,
    )  # fmt: skip
