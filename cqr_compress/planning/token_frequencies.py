"""Frequencies of tokens, estimated from the tokenizer that lies beside a language model's weights.

Vocabularies are ordered by frequency (WordPiece, Unigram) or by merges (BPE), of which the first are the most
frequent. Counts follow the law of Zipf and Mandelbrot, 1 / (rank + 10). Rows are weighted by their square roots,
as frequent tokens are by the subsampling of word2vec (Mikolov et al. 2013, arXiv:1310.4546, section 2.3),
because rare tokens tell texts apart. Of a model that is nothing but its table, by fourth roots: no layers add up
the errors of frequent tokens, and a rare token has no more than its row (measured with two encoders). Without
weights, the special tokens and the head of the vocabulary, which occur in every text, would be compressed as
rare tokens; and they are outliers in many tables, with several times the error of the others.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.json_file import read_json, require_file
from cqr_compress.errors import CheckpointError, CqrCompressWarning
from cqr_compress.table.defaults import CPU_FLOAT

_FILES = ("tokenizer.json", "vocab.txt")
_OFFSET = 10.0
_CHARACTER_RANK = 50.0
"""Rank of tokens of one character, such as punctuation, which precede the others in no order of their own."""
_MAX_VOCAB_BYTES = 64 * 2**20
_MAX_PADDING, _PADDING_SHARE, _MIN_PADDING = 1024, 0.05, 8
"""Most rows that a table has beyond its vocabulary: of a small one, few, for positions have tables as well."""
_UNUSED = re.compile(r"[\[<]\|?(unused|reserved|extra_id|pad|dummy|placeholder).*[\]>]", re.IGNORECASE)
_SPECIAL = re.compile(r"\[[A-Z]+\]|<[^>]+>")
_log = logging.getLogger(__name__)


def token_frequencies(checkpoint: Path, num_rows: Mapping[str, int], has_layers: bool = True) -> dict[str, Tensor]:
    """Estimate the square roots of the frequencies of tokens, for tables with one row for each token.

    Args:
        checkpoint: file or folder of the weights, in the same folder as `tokenizer.json` or `vocab.txt`.
        num_rows: N of each table.
        has_layers: whether the model has layers that read the tables; fourth roots are estimated if it has none.

    Returns:
        (N,) float32, positive, by table; empty without a tokenizer.

    Warns:
        CqrCompressWarning: a tokenizer that cannot be read, and is ignored.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        tokens, special = _read(path)
    except CheckpointError as e:
        warnings.warn(f"{path.name!r} is ignored: {e}", CqrCompressWarning, stacklevel=2)
        return {}
    found, padding = {}, min(_MAX_PADDING, max(_MIN_PADDING, int(len(tokens) * _PADDING_SHARE)))
    for name, N in num_rows.items():
        if any(tokens) and 0 <= N - len(tokens) <= padding:
            roots = _frequencies(tokens, special, N)
            found[name] = roots if has_layers else roots.sqrt()
            _log.info("%s: rows are weighted by frequencies of tokens, estimated from %s", name, path.name)
    return found


def _read(path: Path) -> tuple[list[str], set[int]]:
    """Read the tokens in the order of their ids, and the ids of special tokens.

    Raises:
        CheckpointError: a file of another form.
    """
    if path.suffix == ".txt":
        if require_file(path).st_size > _MAX_VOCAB_BYTES:
            raise CheckpointError(f"it has more than {_MAX_VOCAB_BYTES >> 20} MiB")
        try:
            tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # tokens may be U+2028
        except (OSError, ValueError) as e:
            raise CheckpointError(str(e)) from e
        return tokens, {i for i, token in enumerate(tokens) if _SPECIAL.fullmatch(token)}
    content = read_json(path)
    try:
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        by_id: dict[int, str] = {}
        if isinstance(vocabulary, dict):
            by_id = {_checked_id(i): str(token) for token, i in vocabulary.items()}
        elif not isinstance(vocabulary, list):
            raise TypeError(f"the vocabulary is a {type(vocabulary).__name__}")
        else:
            by_id = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
        by_id |= {_checked_id(token["id"]): str(token["content"]) for token in added}
        special = {int(token["id"]) for token in added if token.get("special")}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise CheckpointError(f"it is no tokenizer of the tokenizers library ({type(e).__name__}: {e})") from e
    tokens = [""] * (max(by_id, default=-1) + 1)
    for i, token in by_id.items():
        tokens[i] = token
    return tokens, special


def _checked_id(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**24:
        raise ValueError(f"{value!r} is no id of a token")
    return value


def _frequencies(tokens: list[str], special: set[int], num_rows: int) -> Tensor:
    """Estimate the square roots of the tokens' frequencies: (num_rows,) float32."""
    ranks, rank = [], 0.0
    for i, token in enumerate(tokens):
        if token == "" or _UNUSED.fullmatch(token):
            ranks.append(float("inf"))
        elif i in special:
            ranks.append(0.0)
        elif len(token.removeprefix("##").lstrip("\u2581\u0120")) <= 1 or re.fullmatch(r"<0x..>", token):
            ranks.append(_CHARACTER_RANK)
        else:
            ranks.append(rank)
            rank += 1
    ranks += [float("inf")] * (num_rows - len(tokens))
    rarest = 1 / (rank + _OFFSET)
    return (1 / (torch.tensor(ranks, **CPU_FLOAT) + _OFFSET)).clamp_min(rarest / 10).sqrt()
