"""The built-in task for click logs: dlrm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.tasks.click_task import HOLD_OUT, ModelBuilder, click_task, read_labels
from cqr_compress.tasks.data.files import DataOptions, Examples, parse_settings
from cqr_compress.tasks.data.readers import Block, read_blocks, read_libfm
from cqr_compress.tasks.shapes import Shapes, add_linears, add_module, at, refuse_rest


class DLRM(nn.Module):
    """The deep learning recommendation model (Naumov et al., arXiv:1906.00091), with the names of its code.

    The bottom MLP `bot_l` maps dense features to a vector. The top MLP `top_l` receives this vector and the
    pairwise inner products of it and the rows of the tables `emb_l`. The width of the first top layer determines
    whether products of vectors with themselves are included, or the vectors are concatenated instead. Without a
    bottom MLP it receives the rows and their products. One table may be shared by several fields.
    """

    def __init__(self, shapes: Shapes, num_fields: int | None = None) -> None:
        """Build the model from the shapes of a state_dict.

        Args:
            shapes: `emb_l.*.weight`, `top_l.*`, and optionally `bot_l.*`.
            num_fields: number of fields that share a single table; the number of tables if None.

        Raises:
            TaskError: shapes that are not those of a DLRM.
        """
        super().__init__()
        tables = sorted(
            (name for name in shapes if name.startswith("emb_l.")), key=lambda name: int(name.split(".")[1])
        )
        top = _in_order(shapes, "top_l.")
        if not tables or not top:
            raise TaskError(
                f"task dlrm requires emb_l.0.weight and top_l.0.weight, but the file has {', '.join(shapes)}"
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
                f"top_l has {width} inputs: with {n} vectors of {D} dimensions that matches neither their "
                "pairwise products nor their concatenation"
            )
        self._diagonal = pairs[width]
        refuse_rest(self, shapes, "dlrm")

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Compute logits (B,) from dense features (B, num_dense) and ids (B, num_fields)."""
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


_NUM_CRITEO_DENSE, _NUM_CRITEO_IDS = 13, 26


@dataclass(frozen=True)
class DlrmSettings:
    """Settings of dlrm.

    Attributes:
        ids: "hex" for Criteo's hexadecimal categories, modulo the number of rows of each table (as with
            `--max-ind-range` of the DLRM code); "int" for ids.
        hold_out: share of the training files to evaluate on, if there is no other file.
        metric: "bce" or "auc".
    """

    ids: str = "hex"
    hold_out: float = HOLD_OUT
    metric: str = "bce"


def dlrm_task(shapes: Shapes, options: DataOptions) -> Task:
    """Create the task of DLRM on click logs: TSV of Criteo (label, dense features, categories), or libfm."""
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
            f"{str(options.train[0])!r} has {num_fields} ids per line and no dense features, but the model has "
            f"{len(tables)} tables and {num_dense} dense features"
        )
    if libfm and len(tables) == 1:
        sizes, tables = sizes * num_fields, tables * num_fields

    def read(path: Path) -> Iterator[Examples]:
        blocks = read_libfm(path) if libfm else read_blocks(path, range(1 + num_dense + num_fields))
        for block in blocks:
            raw = block.numbers(0)
            label = read_labels(block, raw, torch.ones_like(raw, dtype=torch.bool), None)
            values = [block.numbers(1 + i) for i in range(num_dense)] or [label]
            first = 1 + num_dense
            if settings.ids == "hex" and not libfm:
                ids = [_hexadecimal(block, first + i) % size for i, size in enumerate(sizes)]
            else:
                ids = [block.ids(first + i, sizes[i], tables[i]) for i in range(num_fields)]
            # as in the DLRM code: missing and negative values are 0
            dense = torch.stack(values, 1).nan_to_num(0.0).clamp_min(0).log1p()
            yield dense, torch.stack(ids, 1), label

    def logits(model: nn.Module, batch: Examples) -> Tensor:
        logits: Tensor = model(batch[0], batch[1])
        return logits

    build = ModelBuilder(DLRM, (shapes, num_fields))
    return click_task("dlrm", options, settings.hold_out, settings.metric, build, read, logits)


def _hexadecimal(block: Block, column: int) -> Tensor:
    """Parse a column of hexadecimal numbers of up to 15 digits; empty cells are 0."""
    values = block.columns[column].astype("S")
    width = max(1, values.dtype.itemsize)
    digits = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).reshape(len(values), width)
    found = _DIGITS[digits]
    bad = ((found == 255) | (width > 15)).any(1).nonzero()[0]
    if len(bad):
        raise TaskError(
            f"{block.where(int(bad[0]))}: {block.columns[column][bad[0]]!s} is not a hexadecimal number. For ids "
            "set ids=int"
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
