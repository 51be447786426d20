"""Nearest rows of sampled ids before and after compression, by names of the ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import TensorEntry
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.commands.export_vectors import is_word_vectors
from cqr_compress.commands.labels import Labels, read_labels
from cqr_compress.errors import ShapeError, TableNotFoundError
from cqr_compress.planning.find import with_table_names
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.progress import Progress, shown
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.vectors.word_vectors import TABLE, load_vectors

_MAX_BASE = 50_000
_FREQUENT = 0.1
"""Share of the ids, most frequent first, that queries are chosen from where frequencies are known."""
_WORD = re.compile(r"[^\W\d_]{3}")
_SPECIAL = ("[", "<", "##", "@@")


def nearest_rows(
    original: str | Path,
    compressed: str | Path,
    labels: Labels = (),
    frequencies: Frequencies = (),
    *,
    num_queries: int = 12,
    k: int = 5,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Find the nearest rows, by cosine, of sampled ids in the original and in the compressed file.

    Queries are evenly spaced among ids with a name of letters; among the most frequent tenth of them where
    frequencies are known, or words are in the order of their frequency. Of more than 50,000 rows, 50,000 are
    compared: the most frequent ones, or evenly spaced ones.

    Args:
        original: the dense checkpoint that was converted.
        compressed: the compressed file.
        labels: files with names of ids, see `read_labels`; files of word vectors have their own.
        frequencies: counts of the ids, see `read_frequencies`.
        num_queries: number of ids of each table.
        k: number of neighbours.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Returns:
        For each table with names: "table", "base" (number of rows compared), "num_rows", and "queries", each with
        "id", "label", "before" and "after": [id, label, cosine] of the nearest rows, best first.

    Raises:
        CqrCompressError: files that cannot be read, or do not match.
    """
    has_words = is_word_vectors(compressed)
    with shown(progress) as progress, open_checkpoint(compressed) as opened, open_checkpoint(original) as dense:
        file = CompressedFile.from_checkpoint(opened)
        num_rows = {name: spec.num_embeddings for name, spec in file.specs.items()}
        names = read_labels(labels, num_rows)
        if has_words and TABLE not in names:
            names[TABLE] = dict(enumerate(load_vectors(opened.path).words))
        counts = read_frequencies(frequencies, num_rows) if names else {}
        entries = with_table_names(dense).entries if names else {}
        found = []
        for name, of_ids in names.items():
            table, entry = file.table(name), entries.get(name)
            if entry is None:
                raise TableNotFoundError(f"{str(original)!r} has no {name!r}: give the dense checkpoint")
            if entry.shape != (num_rows[name], table.spec.embedding_dim):
                raise ShapeError(f"{name!r} has another shape in {str(original)!r}: give the dense checkpoint")
            order = counts[name].argsort(descending=True, stable=True).tolist() if name in counts else None
            by_frequency = order or (sorted(of_ids) if has_words and name == TABLE else None)
            base = _base(of_ids, order)
            progress.start(f"reading {name}", num_rows[name], "rows")
            sides = {"before": _rows(entry, base, progress), "after": table.lookup(base)}
            queries = _queries(of_ids, base, by_frequency, num_queries)
            at = torch.searchsorted(base, torch.tensor(queries, dtype=torch.int64, device="cpu"))
            nearest = {side: _nearest(rows, at, k) for side, rows in sides.items()}
            items = [
                {"id": i, "label": of_ids[i]}
                | {
                    side: [[int(base[j]), of_ids[int(base[j])], round(c, 4)] for j, c in nearest[side][q]]
                    for side in nearest
                }
                for q, i in enumerate(queries)
            ]
            found.append({"table": name, "base": len(base), "num_rows": num_rows[name], "queries": items})
    return found


def _base(names: Mapping[int, str], order: list[int] | None) -> Tensor:
    """Choose the ids whose rows are compared, ascending: int64."""
    ids = sorted(names) if order is None else [i for i in order if i in names]
    if len(ids) > _MAX_BASE:
        if order is None:
            at = torch.linspace(0, len(ids) - 1, _MAX_BASE, dtype=torch.float64, device="cpu").long().tolist()
            ids = [ids[i] for i in at]
        else:
            ids = ids[:_MAX_BASE]
    return torch.tensor(sorted(ids), dtype=torch.int64, device="cpu")


def _queries(names: Mapping[int, str], base: Tensor, by_frequency: list[int] | None, count: int) -> list[int]:
    """Choose ids evenly spaced among those whose names are words, or among all if there are few of them."""
    inside = set(base.tolist())
    ids = [i for i in (by_frequency or sorted(names)) if i in inside and i in names]
    words = [i for i in ids if _WORD.search(names[i]) and not names[i].startswith(_SPECIAL)]
    ids = words if len(words) >= count else ids
    if by_frequency is not None:
        ids = ids[: max(count, int(_FREQUENT * len(ids)))]
    count = min(count, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count)]


def _rows(entry: TensorEntry, ids: Tensor, progress: Progress) -> Tensor:
    """Read rows of a dense table in one pass: (m, D) float32."""
    N, D = entry.shape
    rows = torch.empty(len(ids), D, **CPU_FLOAT)
    for start, stop in row_blocks(N, D):
        a, b = torch.searchsorted(ids, torch.tensor([start, stop], device="cpu")).tolist()
        if b > a:
            rows[a:b] = entry.stored.read_rows(start, stop)[ids[a:b] - start].float()
        progress.advance(stop - start)
    return rows


def _nearest(rows: Tensor, queries: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """Find the k other rows of the largest cosine with each query: indices and cosines, best first.

    Args:
        rows: (m, D) floating point; rows that are zero or not finite are never near.
        queries: (q,) indices of rows.
        k: number of rows.
    """
    rows = torch.nan_to_num(rows.float(), 0.0, 0.0, 0.0)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines = rows[queries] @ rows.T
    cosines[torch.arange(len(queries), device="cpu"), queries] = -2.0
    best = cosines.topk(min(k, len(rows) - 1), dim=1)
    return [
        list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
