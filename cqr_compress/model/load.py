"""Load a compressed file into a model, whose embedding layers then run on the compressed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.base import Checkpoint, read_blocks
from cqr_compress.checkpoint.compressed_file import CompressedFile, is_compressed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import SwapError
from cqr_compress.model.skip import log_skipped, names_to_skip
from cqr_compress.model.swap import (
    Swap,
    TensorSlot,
    apply_swap,
    compressed_slots,
    embedding_slots,
    find_slot,
    names_inside_tables,
    plan_swaps,
    refuse_wrapper,
    slots_of,
)
from cqr_compress.planning.find import with_table_names
from cqr_compress.table.blocks import BLOCK_BYTES
from cqr_compress.table.table import CompressedTable

_WRAPPERS = ("module.", "_orig_mod.")
_LISTED = 10


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_compressed`.

    Attributes:
        tables: names of the tensors that are decoded from tables, tied ones included.
        missing: names of the model's tensors that the file does not have.
        unexpected: names of the file's tensors that the model does not have.
        skipped: names of the file's tensors that the model computes itself or ignores: its non-persistent buffers,
            such as `position_ids`, and names in a `_keys_to_ignore_on_load_unexpected` of transformers.
    """

    tables: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def load_compressed(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
    prefix: str | None = None,
    verify: bool = True,
) -> LoadReport:
    """Load a compressed file into a model in place: the model then runs on the compressed tables.

    Embedding layers become compressed layers (see `swap_embeddings_`), all other tensors are loaded as by
    `load_state_dict`. All checks precede the first change. Create the optimizer after this call.

    Layers tied to a table read the rows of the layer that holds it: replacing that layer leaves them with the old
    table. Wrap the model in DistributedDataParallel or FSDP after this call; codes are buffers, so pass
    `broadcast_buffers=False` to DistributedDataParallel, which otherwise broadcasts them at each step.

    Args:
        model: a model of the checkpoint's architecture; with a model on the meta device, dense tables are never
            allocated (see `init_empty_weights`).
        path: a file, index or folder that `convert` wrote.
        device: device to move the model to; if None, tensors stay on their device (the CPU for the meta device).
        strict: raise an error unless the file and the model have the same tensors, apart from those that the
            model computes itself (see `LoadReport.skipped`).
        prefix: prefix to remove from the file's names; if None, the prefixes "module." and "_orig_mod." of
            wrappers are removed.
        verify: whether to compare all tensors with the checksums in the file first.

    Returns:
        Names of the loaded tables, and of missing, unexpected and skipped tensors.

    Raises:
        FormatError: not a compressed file, or a damaged one.
        SwapError: the file does not match the model; all problems are listed, and the model is unchanged.
    """
    model = _unwrapped(model)
    with open_checkpoint(path) as checkpoint:
        opened = CompressedFile.from_checkpoint(checkpoint)
        if verify:
            opened.verify()
        plan = _plan(model, opened, strict, prefix)
        fill = device or ("cpu" if any(slot.tensor.is_meta for _, slot in slots_of(model)) else None)
        for slot in plan.separated:
            old = slot.tensor
            slot.module._parameters[slot.attribute] = nn.Parameter(torch.empty_like(old), old.requires_grad)
        for swap in plan.swaps:
            apply_swap(swap, fill)
        _load_dense(model, opened, plan.dense, fill)
    if device is not None:
        model.to(device)
    tables = tuple(slot.name for swap in plan.swaps for slot in swap.slots)
    log_skipped(plan.skipped)
    return LoadReport(tables, tuple(plan.missing), tuple(plan.unexpected), tuple(plan.skipped))


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load any checkpoint into a model: a compressed file with `load_compressed`, others as by load_state_dict.

    Optimizer state and tensors outside the model's state_dict are skipped, and prefixes of wrappers are removed
    from names.

    Raises:
        SwapError: names or shapes do not match the model.
    """
    with open_checkpoint(path) as opened:
        if not is_compressed(opened):
            _fill(_unwrapped(model), with_table_names(opened))
            return
    load_compressed(model, path)


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a dense checkpoint as by load_state_dict, large tensors block by block."""
    slots = _slots(model)
    entries = {name: checkpoint.entries[source] for name, source in _names(checkpoint, slots).items()}
    skipped = names_to_skip(model, {name: entry.shape for name, entry in entries.items() if name not in slots})
    entries = {name: entry for name, entry in entries.items() if name not in skipped}
    large = {
        name: entry
        for name, entry in entries.items()
        if name in slots and entry.nbytes > BLOCK_BYTES and tuple(slots[name].tensor.shape) == tuple(entry.shape)
    }
    small = {name: entry.stored.read() for name, entry in entries.items() if name not in large}
    try:
        found = nn.Module.load_state_dict(model, small, strict=False)
    except RuntimeError as e:
        raise SwapError(f"{str(checkpoint.path)!r} does not match the model: {e}") from e
    problems = _list("the model does not have these tensors of the file", found.unexpected_keys)
    filled = {slots[name].key for name in entries if name in slots}  # tied names need not be in the file
    missing = [name for name in found.missing_keys if name not in slots or slots[name].key not in filled]
    problems += _list("the file does not have these tensors of the model", missing)
    if problems:
        raise SwapError("\n  ".join([f"{str(checkpoint.path)!r} does not match the model:", *problems]))
    for name, entry in large.items():
        for start, block in read_blocks(entry, BLOCK_BYTES):
            slots[name].tensor[start : start + len(block)] = block
    log_skipped(skipped)


@dataclass(frozen=True)
class _LoadPlan:
    """A checked plan of a load.

    Attributes:
        swaps: tables and their slots.
        dense: names of the model's tensors, each with the file's tensor (or table to decode) to load into it.
        separated: slots that the model ties to a table, but the file does not.
        missing: tensors of the model that the file does not have.
        unexpected: tensors of the file that the model does not have.
        skipped: tensors of the file that the model computes itself or ignores.
    """

    swaps: list[Swap]
    dense: dict[str, str]
    separated: list[TensorSlot]
    missing: list[str]
    unexpected: list[str]
    skipped: list[str]


def _plan(model: nn.Module, opened: CompressedFile, strict: bool, prefix: str | None) -> _LoadPlan:
    """Assign every tensor of the file to tensors of the model, and check names and shapes.

    Raises:
        SwapError: the file does not match the model; all problems are listed.
    """
    slots = _slots(model)
    sources = _renamed(_sources(opened), slots, prefix)
    tables, dense = _assign(sources, slots, opened)
    held = {slots[name].key for name in tables}
    holders = {id(slots[name].module) for name in tables}
    dense = {
        name: source
        for name, source in dense.items()
        if id(slots[name].module) not in holders or slots[name].key not in held
    }
    separated = [slots[name] for name in dense if slots[name].key in held]
    tied = [name for name, slot in slots.items() if slot.key in held]
    missing = sorted(set(slots) - set(tied) - set(dense))
    not_held = {name: _shape(opened, source) for name, source in sources.items() if name not in slots}
    skipped = names_to_skip(model, not_held)
    unexpected = [name for name in not_held if name not in skipped]
    problems = []
    if strict:
        lost = [name for name in unexpected if sources[name] in opened.specs]
        problems += _list("the model has no layer for these tables of the file", lost)
        problems += _list("the model does not have these tensors of the file", sorted({*unexpected} - {*lost}))
        problems += _list("the file does not have these tensors of the model", missing)
    for name, source in dense.items():
        shape, have = _shape(opened, source), tuple(slots[name].tensor.shape)
        if shape != have:
            problems.append(f"{name!r} is {list(shape)} in the file and {list(have)} in the model")
    filled = {*tied, *dense}
    empty = [name for name, slot in slots_of(model) if slot.tensor.is_meta and name not in filled]
    problems += _list("these tensors on the meta device are not in the file", sorted({*empty} - {*missing}))
    swaps, against = plan_swaps(model, tables, {slot.name for slot in separated})
    problems += against
    if problems:
        listed = "\n  ".join(problems)
        advice = _advice(model, sources, slots) if missing or unexpected else ""
        raise SwapError(f"{opened.name!r} does not match the model:\n  {listed}{advice}")
    return _LoadPlan(swaps, dense, separated, missing, unexpected, skipped)


def model_tensors(model: nn.Module, opened: CompressedFile, prefix: str | None = None) -> dict[str, TensorSlot]:
    """Find the slot of the model for each tensor of a file.

    Args:
        model: model that the file was loaded into.
        opened: the file.
        prefix: as for `load_compressed`.

    Returns:
        Slots by the file's names, without aliases and names that the model does not have.
    """
    slots = _slots(model)
    return {
        source: slots[name]
        for name, source in reversed(_renamed(_sources(opened), slots, prefix).items())
        if name in slots
    }


def checkpoint_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, TensorSlot]:
    """Find the slot of the model for each tensor of a dense checkpoint; names without a slot are left out."""
    slots = _slots(model)
    return {source: slots[name] for name, source in _names(checkpoint, slots).items() if name in slots}


def _names(checkpoint: Checkpoint, slots: Mapping[str, TensorSlot]) -> dict[str, str]:
    """Return the model's names of a dense checkpoint's tensors, each with the name of its entry."""
    aliases = {name: to for name, to in checkpoint.aliases.items() if name not in checkpoint.outside_model}
    names = {name: name for name in checkpoint.entries if name not in checkpoint.outside_model} | aliases
    return _renamed(names, slots, None)


def _sources(opened: CompressedFile) -> dict[str, str]:
    """Return all names of the model's tensors in the file, each with the name of its table or tensor."""
    outside_model = set(opened.header.outside_model)
    own = {name: name for name in (*opened.specs, *opened.dense_entries) if name not in outside_model}
    return own | {alias: target for alias, target in opened.aliases.items() if alias not in outside_model}


def _shape(opened: CompressedFile, source: str) -> tuple[int, ...]:
    """Return the shape of a tensor of the file, or of a table when decoded."""
    spec = opened.specs.get(source)
    return tuple(opened.dense_entries[source].shape) if spec is None else (spec.num_embeddings, spec.embedding_dim)


def _assign(
    sources: Mapping[str, str], slots: Mapping[str, TensorSlot], opened: CompressedFile
) -> tuple[dict[str, CompressedTable], dict[str, str]]:
    """Split the tensors that the model has into tables for its layers and dense tensors.

    A table is assigned to the first of its names that the model has. Each other name is tied to it if the model
    ties them; otherwise it gets its own copy, compressed in an embedding layer and dense elsewhere.
    """
    tables: dict[str, CompressedTable] = {}
    dense: dict[str, str] = {}
    held: set[int] = set()
    given: set[str] = set()
    for name, source in sources.items():
        if name not in slots:
            continue
        slot = slots[name]
        if source not in opened.specs:
            dense[name] = source
        elif slot.key not in held:
            if source in given and not slot.is_layer:
                dense[name] = source
                continue
            tables[name] = opened.table(source)
            given.add(source)
            held.add(slot.key)
    return tables, dense


def _slots(model: nn.Module) -> dict[str, TensorSlot]:
    """Return all slots of the model's state_dict; computed tensors have the names of their dense tensors."""
    inside = names_inside_tables(model)
    names = [name for name in model.state_dict(keep_vars=True) if name not in inside]
    compressed = [slot.name for slot in compressed_slots(model, every_path=True)]
    found = {name: find_slot(model, name) for name in (*compressed, *names)}
    return {name: slot for name, slot in found.items() if slot is not None}


def _renamed(sources: dict[str, str], slots: Mapping[str, TensorSlot], prefix: str | None) -> dict[str, str]:
    """Remove a prefix from the names; without one, the prefixes of wrappers if all names have them."""
    prefixes = _WRAPPERS if prefix is None else (prefix,)
    for each in prefixes:
        begin = [name for name in sources if name.startswith(each)]
        if prefix is not None or (len(begin) == len(sources) and not slots.keys() & sources.keys()):
            sources = {name.removeprefix(each): source for name, source in sources.items()}
    return sources


def _advice(model: nn.Module, sources: Mapping[str, str], slots: Mapping[str, TensorSlot]) -> str:
    """Compose a hint that makes the names match: a prefix, or a list of the model's embedding layers."""
    for name in sources:
        for cut in (i + 1 for i, letter in enumerate(name) if letter == "."):
            if name[cut:] in slots and name not in slots:
                return f"\nThe file's names begin with {name[:cut]!r}: pass prefix={name[:cut]!r}."
    layers = ", ".join(slot.name for slot in embedding_slots(model)) or "none"
    return f"\nThe model's embedding layers: {layers}. strict=False loads the tensors that match."


def _list(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{what}: {', '.join(repr(name) for name in names[:_LISTED])}{more}"]


def _load_dense(
    model: nn.Module, opened: CompressedFile, dense: Mapping[str, str], device: torch.device | str | None
) -> None:
    """Load all dense tensors; those on the meta device are allocated one by one, and tied tensors stay tied."""
    on_meta = {name: slot for name, slot in slots_of(model) if slot.tensor.is_meta}
    held = {source: _read(opened, source) for name, source in dense.items() if name not in on_meta}
    in_place = {name: held[dense[name]] for name in dense if name not in on_meta}
    nn.Module.load_state_dict(model, in_place, strict=False)  # a subclass may override load_state_dict
    filled: dict[int, Tensor] = {}
    for name, slot in on_meta.items():
        old, key = slot.tensor, slot.key
        if name in dense and key not in filled:
            value = _read(opened, dense[name]).to(device=device, dtype=old.dtype)
            filled[key] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for slot in on_meta.values():
        if slot.key in filled:
            module, attribute = slot.module, slot.attribute
            where: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
            where[attribute] = filled[slot.key]


def _read(opened: CompressedFile, source: str) -> Tensor:
    """Read a tensor into memory, or decode a table that is assigned to a dense tensor."""
    if source in opened.specs:
        return opened.table(source).decode()
    return opened.dense_entries[source].stored.read()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside a wrapper of torch.compile; refuse wrappers that keep references to parameters."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return cast(nn.Module, model._orig_mod)
    refuse_wrapper(model)
    return model
