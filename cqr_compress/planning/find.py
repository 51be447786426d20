"""Find the embedding tables of a checkpoint, each with a reason and a confidence."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry, read_blocks
from cqr_compress.errors import SpecError, TableNotFoundError, TableRefusedError
from cqr_compress.planning.name_patterns import (
    FOREIGN,
    LISTED,
    NOT_TABLES,
    REFUSED,
    TABLES,
    TIED_PAIRS,
    UNKNOWN,
    Pattern,
    stripped,
)
from cqr_compress.planning.neighbours import Neighbours
from cqr_compress.planning.rules import Rule
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.base_spec import FLOAT_DTYPES, dtype_name
from cqr_compress.table.blocks import BLOCK_BYTES

THRESHOLD = 0.5
"""Smallest confidence at which a tensor is selected as an embedding table."""
GENERIC = 0.9
"""Largest confidence from a name that a layer which is no lookup may also have: shapes can contradict it."""
_TENSORFLOW = "/.ATTRIBUTES/VARIABLE_VALUE"
"""End of the names of variables in checkpoints of TensorFlow 2."""
MIN_UNNAMED_ROWS = 1024
"""Fewest rows at which the shape alone can make a tensor a table."""


@dataclass(frozen=True)
class Candidate:
    """One 2-D floating-point tensor, with the confidence that it is an embedding table.

    Attributes:
        name: its name in the checkpoint.
        shape: (rows, columns).
        dtype: name of the dtype, such as "float32".
        nbytes: bytes of the tensor.
        confidence: confidence that it is an embedding table, 0 to 1.
        reason: explanation of the confidence.
        selected: whether `convert` compresses it.
        named: whether it was named explicitly, and is compressed however few rows it has.
        aliases: other names of the same tensor.
        rule: the rule that sets its options, or None.
        field_starts: first rows of the fields of a fused table; empty for a single field.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    nbytes: int
    confidence: float
    reason: str
    selected: bool
    named: bool = False
    aliases: tuple[str, ...] = ()
    rule: Rule | None = None
    field_starts: tuple[int, ...] = ()

    def options(self, options: ConvertOptions) -> ConvertOptions:
        """Return the options of this table, from those of the conversion."""
        return options if self.rule is None else self.rule.options(options)


def find_tables(
    checkpoint: Checkpoint, tables: Sequence[str] = (), exclude: Sequence[str] = (), rules: Sequence[Rule] = ()
) -> list[Candidate]:
    """Classify every 2-D floating-point tensor of a checkpoint.

    Args:
        checkpoint: from `with_table_names`.
        tables: globs (or "re:" and a regular expression) of names to select instead of the found ones.
        exclude: the same, for names not to select.
        rules: options of tables. Each holds for the selected tables that its pattern matches; where it matches
            none of these, it selects the tensors that it matches.

    Returns:
        One candidate for each tensor, in file order.

    Raises:
        TableNotFoundError: a pattern matches no 2-D tensor.
        SpecError: a rule is of excluded tables only.
        TableRefusedError: an explicitly named table is already compressed by another technique.
    """
    candidates = _classified(checkpoint)
    names = {name: c for c in candidates for name in (c.name, *c.aliases)}
    wanted = {names[n].name for n in _matching(tables, list(names), checkpoint)}
    unwanted = {names[n].name for n in _matching(exclude, list(names), checkpoint)}
    chosen = []
    for candidate in candidates:
        name = candidate.name
        if name in wanted and (refusal := _refusal(name)):
            raise TableRefusedError(f"{name!r} of {str(checkpoint.path)!r} cannot be compressed: {refusal}")
        if name in unwanted:
            candidate = replace(candidate, selected=False, reason=f"excluded; {candidate.reason}")
        elif tables:
            reason = "named by --tables" if name in wanted else f"not among --tables; {candidate.reason}"
            candidate = replace(candidate, selected=name in wanted, named=name in wanted, reason=reason)
        chosen.append(candidate)
    by_name = {candidate.name: candidate for candidate in chosen}
    for rule in rules:
        found = {names[n].name for n in _matching([rule.pattern], list(names), checkpoint)}
        hits = found - unwanted
        if not hits:
            raise SpecError(f"rule {rule.text!r} is of tables that are excluded, such as {min(found)!r}")
        for name in [n for n in hits if by_name[n].selected or by_name[n].rule] or hits:
            if by_name[name].rule is None:
                by_name[name] = _ruled(by_name[name], rule, checkpoint)
    return list(by_name.values())


def _ruled(candidate: Candidate, rule: Rule, checkpoint: Checkpoint) -> Candidate:
    """Apply a rule to the candidate that it names."""
    if rule.keeps:
        return replace(candidate, selected=False, rule=rule, reason=f"kept dense by rule {rule.text!r}")
    if refusal := _refusal(candidate.name):
        name, where = candidate.name, str(checkpoint.path)
        raise TableRefusedError(f"{name!r} of {where!r} cannot be compressed: {refusal}")
    return replace(candidate, selected=True, named=True, rule=rule)


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tables another tool has quantized.

    Quantized linear layers are accepted: their tensors are copied bit for bit.

    Raises:
        TableRefusedError: a table is quantized; the message lists the tensors and the tool.
    """
    found = []
    has_table = any(candidate.selected for candidate in _classified(checkpoint))
    for name in checkpoint.entries:
        for pattern in FOREIGN:
            match = pattern.regex.search(stripped(name))
            if match is None:
                continue
            stem = match["stem"]
            if not stem or not has_table or any(p.regex.search(stem) for p in TABLES):
                found.append(f"{name!r} ({pattern.reason})")
            break
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise TableRefusedError(
            f"{str(checkpoint.path)!r} is already quantized by another tool: {', '.join(found[:3])}{more}. "
            "Convert the checkpoint that it was made of."
        )


def with_table_names(checkpoint: Checkpoint, compare: bool = True) -> Checkpoint:
    """List each shared tensor under its name with the highest confidence, and tie tables that are saved twice.

    Args:
        checkpoint: as opened.
        compare: also read pairs such as `lm_head.weight` and `embed_tokens.weight`, and tie them if equal.

    Returns:
        The checkpoint with updated `entries` and `aliases`.
    """
    best = {name: _best_name([name, *checkpoint.aliases_of(name)]) for name in checkpoint.entries}
    entries = {
        best[name]: entry if best[name] == name else TensorEntry(best[name], entry.stored)
        for name, entry in checkpoint.entries.items()
    }
    aliases = {name: best[to] for name, to in checkpoint.aliases.items() if name not in entries}
    aliases |= {name: other for name, other in best.items() if other != name}
    tied: dict[str, str] = {}
    for head_pattern, table_pattern in TIED_PAIRS if compare else ():
        left = [entry for name, entry in entries.items() if name not in tied and len(entry.shape) == 2]
        heads = [entry for entry in left if re.search(head_pattern, entry.name)]
        tables = [entry for entry in left if re.search(table_pattern, entry.name)]
        found = dict(_equal_pairs(heads, tables, (_layout, _first_rows, _digest)))
        tied = {head: found.get(table, table) for head, table in tied.items()} | {
            head.name: found[head.name] for head in heads if head.name in found
        }
    return replace(
        checkpoint,
        entries={name: entry for name, entry in entries.items() if name not in tied},
        aliases={name: tied.get(to, to) for name, to in aliases.items()} | tied,
    )


def _best_name(names: list[str]) -> str:
    return max(names, key=lambda name: _by_name(name)[0])


def _equal_pairs(
    heads: list[TensorEntry],
    tables: list[TensorEntry],
    keys: Sequence[Callable[[TensorEntry], Hashable]],
) -> Iterator[tuple[str, str]]:
    """Name the heads that are equal to a table by all keys, each with the first such table.

    A key is computed once for each tensor, and only if a tensor of the other kind is equal by the keys before it.
    """
    if not keys:
        yield from ((head.name, tables[0].name) for head in heads)
        return
    groups: dict[Hashable, tuple[list[TensorEntry], list[TensorEntry]]] = {}
    for kind, entries in enumerate((heads, tables)):
        for entry in entries:
            groups.setdefault(keys[0](entry), ([], []))[kind].append(entry)
    for some_heads, some_tables in groups.values():
        if some_heads and some_tables:
            yield from _equal_pairs(some_heads, some_tables, keys[1:])


def _layout(entry: TensorEntry) -> Hashable:
    return entry.shape, entry.dtype


def _first_rows(entry: TensorEntry) -> bytes:
    """Return the first rows, of about 4 KiB: enough to tell trained tables apart."""
    rows = 4096 // max(1, entry.nbytes // max(1, entry.shape[0])) + 1
    return _bytes_of(entry.stored.read_rows(0, min(rows, entry.shape[0]))).tobytes()


def _digest(entry: TensorEntry) -> bytes:
    """Hash all values by SHA-256, so that equal digests are equal values."""
    digest = hashlib.sha256()
    for _, block in read_blocks(entry, BLOCK_BYTES):
        digest.update(_bytes_of(block))
    return digest.digest()


def _bytes_of(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data


def _matrices(checkpoint: Checkpoint) -> list[TensorEntry]:
    return [
        entry
        for entry in checkpoint.entries.values()
        if len(entry.shape) == 2 and entry.dtype in FLOAT_DTYPES.values() and 0 not in entry.shape
    ]


def _classified(checkpoint: Checkpoint) -> list[Candidate]:
    matrices = _matrices(checkpoint)
    neighbours = Neighbours.of(checkpoint.entries.values())
    judged = {entry.name: _judge(entry, neighbours) for entry in matrices}
    table_shapes = {entry.shape for entry in matrices if judged[entry.name][0] >= THRESHOLD}
    candidates = []
    for entry in matrices:
        confidence, reason = judged[entry.name]
        if reason == "":
            confidence, reason = _by_shape(entry, neighbours, table_shapes)
        rows, columns = entry.shape
        candidates.append(
            Candidate(
                name=entry.name,
                shape=(rows, columns),
                dtype=dtype_name(entry.dtype),
                nbytes=entry.nbytes,
                confidence=confidence,
                reason=reason,
                selected=confidence >= THRESHOLD,
                aliases=tuple(checkpoint.aliases_of(entry.name)),
            )
        )
    return candidates


def _judge(entry: TensorEntry, neighbours: Neighbours) -> tuple[float, str]:
    """Confidence and reason from the name and what contradicts it; no reason if the name says nothing."""
    confidence, reason = _by_name(_as_in_torch(entry.name, neighbours))
    if refusal := _refusal(entry.name):
        return 0.0, refusal
    if entry.shape[1] == 1:
        return 0.0, "1 column: a linear term for each id, with nothing to compress"
    if average := neighbours.running_average(entry):
        return min(confidence, 0.05), f"a codebook, or its running average: it has {average!r}"
    if other := neighbours.in_same_layer(entry):
        what = "a linear layer or norm" if other.endswith("bias") else "no plain embedding layer"
        return min(confidence, 0.05), f"{what}: it has {other!r}"
    if THRESHOLD <= confidence <= GENERIC and neighbours.is_width(entry):
        return 0.3, f"{reason}, but {entry.shape[0]} is the input size of another layer: a projection"
    return confidence, reason


def _by_shape(
    entry: TensorEntry, neighbours: Neighbours, table_shapes: Collection[tuple[int, ...]]
) -> tuple[float, str]:
    """Confidence and reason for a tensor whose name says nothing.

    A linear layer without bias is stored as an embedding layer is. But it is seldom so tall, its rows are the
    inputs of the next layer, it repeats in the numbered layers of a model, and an output head has the shape of the
    table of its ids.
    """
    rows, columns = entry.shape
    tall = rows >= MIN_UNNAMED_ROWS and rows >= 4 * columns
    if (
        not tall
        or neighbours.is_width(entry)
        or entry.shape in table_shapes
        or LISTED.search(stripped(entry.name))
    ):
        return UNKNOWN.confidence, "neither its name nor its shape is that of an embedding table"
    if not entry.name.endswith(".weight"):
        return 0.4, "has the shape of a table, but is the weight of no layer; pass --tables to select it"
    return 0.6, "has the shape of a table: many rows, which are the inputs of no other layer"


def _as_in_torch(name: str, neighbours: Neighbours) -> str:
    """Return the name that torch would give the weight of a layer of TensorFlow, Flax or Keras."""
    if name.endswith(_TENSORFLOW):
        return f"{name.removesuffix(_TENSORFLOW).replace('/', '.')}.weight"
    path, _, attribute = name.rpartition(".")
    if not neighbours.has_kernels or attribute not in ("embedding", "embeddings"):
        return name
    return f"{path}.weight" if _by_name(f"{path}.weight")[1] else f"{name}.weight"


def _by_name(name: str) -> tuple[float, str]:
    short = stripped(name)
    for pattern in NOT_TABLES:
        if pattern.regex.search(short):
            return 0.02, pattern.reason
    pattern = _table_pattern(short)
    if pattern is not UNKNOWN and not pattern.parameter and name.rpartition(".")[2] != "weight":
        return 0.2, f"{pattern.reason}, but the weight of no layer: it may be read otherwise than by ids"
    return pattern.confidence, pattern.reason


def _table_pattern(short: str) -> Pattern:
    return next((pattern for pattern in TABLES if pattern.regex.search(short)), UNKNOWN)


def _refusal(name: str) -> str | None:
    return next((p.reason for p in REFUSED if p.regex.search(stripped(name))), None)


def _matching(patterns: Sequence[str], names: list[str], checkpoint: Checkpoint) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                regex = re.compile(pattern[3:])
            except re.error as e:
                raise TableNotFoundError(f"{pattern!r} is not a regular expression: {e}") from e
            hits = {name for name in names if regex.search(name)}
        else:
            hits = {n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern) or _stem_match(n, pattern)}
        if not hits:
            raise TableNotFoundError(_no_match(pattern, names, checkpoint))
        matched |= hits
    return matched


def _stem_match(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def _no_match(pattern: str, names: list[str], checkpoint: Checkpoint) -> str:
    where = str(checkpoint.path)
    if not names:
        return f"{pattern!r} matches no tensor: {where!r} has no 2-D floating-point tensor"
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.2) or sorted(names)[:5]
    return f"{pattern!r} matches no 2-D floating-point tensor of {where!r}. Nearest: {', '.join(near)}"
