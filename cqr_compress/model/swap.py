"""Replace the weights of a live model's layers by compressed tables, and restore dense weights.

A layer is modified in place: the object keeps its hooks, its attributes and all references to it, and gets a class
that decodes rows from codes. Tied layers remain one object, and a subclass of nn.Embedding keeps its own
`forward`, whose `super().forward(ids)` reads the compressed table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cqr_compress.errors import SwapError
from cqr_compress.model.surgery import (
    DENSE_LAYERS,
    attach_table,
    detach_table,
    drop_tensor,
    hidden_name,
    table_attributes,
    to_compressed_class,
    to_dense_class,
)
from cqr_compress.nn.embedding import CompressedEmbedding
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.table import CompressedTable


@dataclass(frozen=True)
class TensorSlot:
    """The location of a tensor in a model.

    Attributes:
        path: dotted path of the module, "" for the model itself.
        module: the module.
        attribute: name of the tensor in the module.
    """

    path: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """The tensor's name in the state_dict."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        return cast(Tensor, getattr(self.module, self.attribute))

    @property
    def key(self) -> int:
        """Identity of the tensor or compressed table: equal for tied slots only."""
        layer = table_attributes(self.module).get(self.attribute)
        return id(self.tensor) if layer is None else id(layer.owner)

    @property
    def is_layer(self) -> bool:
        """Whether the tensor is the weight of an embedding layer, not a bare parameter."""
        return self.attribute == "weight" and isinstance(self.module, tuple(dense for dense, _ in DENSE_LAYERS))


@dataclass(frozen=True)
class Swap:
    """A table and the slots that will read it: the first slot holds the table, the others are tied to it."""

    table: CompressedTable
    slots: tuple[TensorSlot, ...]


def swap_embeddings_(model: nn.Module, tables: Mapping[str, CompressedTable]) -> list[str]:
    """Replace the weights of embedding layers by compressed tables, in place.

    nn.Embedding becomes `CompressedEmbedding`, nn.EmbeddingBag `CompressedEmbeddingBag`; a subclass of one of them
    keeps its own methods. A bare parameter of any other module is replaced by a compressed layer, and reading the
    attribute decodes it. Other slots of the same parameter (a tied output head) read the same table. Layers keep
    the device, the dtype and requires_grad of their weight. An existing optimizer refers to the old weights:
    create it after this call.

    Args:
        model: modified in place.
        tables: tables by the name of the tensor in the model's state_dict, such as "item_emb.weight". Their
            tensors are moved to the weight's device, without a copy if they are already there.

    Returns:
        Names of all tensors that are decoded from tables, tied ones included.

    Raises:
        SwapError: layers that are missing, have another shape, or cannot be swapped; all are listed, and the model
            is unchanged.
    """
    refuse_wrapper(model)
    swaps, problems = plan_swaps(model, tables)
    if problems:
        layers = ", ".join(slot.name for slot in embedding_slots(model)) or "none"
        listed = "\n  ".join(problems)
        raise SwapError(
            f"cannot swap compressed tables into the model:\n  {listed}\nIts embedding layers: {layers}."
        )
    for swap in swaps:
        apply_swap(swap)
    return [slot.name for swap in swaps for slot in swap.slots]


def refuse_wrapper(model: nn.Module) -> None:
    """Refuse a wrapper that keeps references to parameters and would continue to train the old ones.

    Raises:
        SwapError: the model is such a wrapper.
    """
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise SwapError(
            f"{type(model).__name__} keeps references to its parameters: load or compress before wrapping a model"
        )


def plan_swaps(
    model: nn.Module, tables: Mapping[str, CompressedTable], apart: Collection[str] = ()
) -> tuple[list[Swap], list[str]]:
    """Find and check the slots of every table, without changing the model.

    Args:
        model: model to search.
        tables: tables by the name of the tensor in the state_dict.
        apart: names of slots that will not read a table although the model ties them to it.

    Returns:
        The swaps, and a line for each problem.
    """
    problems: list[str] = []
    swaps: list[Swap] = []
    taken: dict[int, str] = {}
    for name, table in tables.items():
        slot = find_slot(model, name)
        if slot is None:
            problems.append(f"{name!r}: the model has no such tensor")
            continue
        if slot.key in taken:
            problems.append(f"{name!r}: the model ties it to another table, {taken[slot.key]!r}")
            continue
        taken[slot.key] = name
        slots = tuple(each for each in _all_slots(model, slot) if each.name not in apart)
        problems += [problem for each in slots if (problem := _problem(each, table))]
        swaps.append(Swap(table, slots))
    return swaps, problems


def find_slot(model: nn.Module, name: str) -> TensorSlot | None:
    """Find a parameter, buffer or compressed weight by its name in the state_dict."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if attribute in module._parameters or attribute in module._buffers:
        return TensorSlot(path, module, attribute) if isinstance(getattr(module, attribute), Tensor) else None
    if attribute in table_attributes(module):
        return TensorSlot(path, module, attribute)
    return None


def embedding_slots(model: nn.Module) -> Iterator[TensorSlot]:
    """Iterate over the weights of all embedding layers, dense and compressed; each layer once."""
    for path, module in model.named_modules():
        slot = TensorSlot(path, module, "weight")
        if slot.is_layer:
            yield slot


def apply_swap(swap: Swap, device: torch.device | str | None = None) -> None:
    """Apply one checked swap; the table is moved to `device`, or to the device of the weight if None."""
    first, *others = swap.slots
    old = first.tensor
    device, dtype, requires_grad = device or old.device, old.dtype, old.requires_grad
    holder = _holder(first)
    if holder is None:
        holder = CompressedEmbedding(swap.table, device=device, dtype=dtype).requires_grad_(requires_grad)
        attach_table(first.module, first.attribute, holder)
        first.module.add_module(hidden_name(first.attribute), holder)
    else:
        holder.hold_table(swap.table, device, dtype, requires_grad)
    for slot in others:
        if slot.is_layer:
            to_compressed_class(slot.module).tie_to(holder)
        else:
            attach_table(slot.module, slot.attribute, holder)


def decompress_(model: nn.Module) -> list[str]:
    """Replace all compressed layers of a model by dense ones, in place.

    Layers get back their original classes, and weights decoded on their device in their dtype; tied layers share
    one Parameter.

    Returns:
        Names of the dense weights.
    """
    found = [(slot, table_attributes(slot.module)[slot.attribute]) for slot in compressed_slots(model)]
    weights: dict[int, nn.Parameter] = {}
    for _, layer in found:
        owner = layer.owner
        if id(owner) not in weights:
            trains = any(t.requires_grad for t in owner.table_tensors().values())
            with torch.no_grad():
                weights[id(owner)] = nn.Parameter(owner.decode(), trains)
    new = [(slot, weights[id(layer.owner)]) for slot, layer in found]
    for slot, weight in sorted(new, key=lambda pair: pair[0].attribute == "weight"):  # the class is restored last
        if isinstance(slot.module, TableLayer) and slot.attribute == "weight":
            to_dense_class(slot.module)
        else:
            detach_table(slot.module, slot.attribute)
        others = dict(slot.module._parameters)
        slot.module._parameters.clear()
        slot.module._parameters.update({slot.attribute: weight, **others})
    return [slot.name for slot, _ in found]


def slots_of(model: nn.Module) -> Iterator[tuple[str, TensorSlot]]:
    """Iterate over the parameters and buffers of a model, without those of tables, by all their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        computed_from = (
            {*module._names, "_like", "_values"}
            if isinstance(module, TableLayer) and module.owner is module
            else ()
        )
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and attribute not in computed_from:
                slot = TensorSlot(path, module, attribute)
                yield slot.name, slot


def _all_slots(model: nn.Module, found: TensorSlot) -> tuple[TensorSlot, ...]:
    """Find all slots of one tensor, embedding layers first, because they can hold a table."""
    if isinstance(found.module, TableLayer) or found.attribute in table_attributes(found.module):
        return (found,)
    target = found.tensor
    slots: dict[tuple[int, str], TensorSlot] = {}
    for _, each in slots_of(model):
        if each.tensor is target:
            slots.setdefault((id(each.module), each.attribute), each)
    return tuple(sorted(slots.values(), key=lambda slot: (not slot.is_layer, slot.name != found.name)))


def _problem(slot: TensorSlot, table: CompressedTable) -> str | None:
    spec, tensor = table.spec, slot.tensor
    if tuple(tensor.shape) != (spec.num_embeddings, spec.embedding_dim):
        have = " x ".join(str(n) for n in tensor.shape)
        return f"{slot.name!r}: the table is {spec.num_embeddings} x {spec.embedding_dim}, the tensor is {have}"
    cls = type(slot.module)
    if slot.is_layer and not isinstance(slot.module, TableLayer):
        dense = next(dense for dense, _ in DENSE_LAYERS if isinstance(slot.module, dense))
        between = cls.__mro__[: cls.__mro__.index(dense)]
        if any("weight" in vars(c) for c in between):
            return f"{slot.name!r}: {cls.__name__} defines its own `weight`, which cannot be replaced by a table"
        if type(cls) is not type:
            return f"{slot.name!r}: {cls.__name__} has the metaclass {type(cls).__name__}, so it has no subclass"
    hidden = hidden_name(slot.attribute)
    if not slot.is_layer and slot.attribute not in table_attributes(slot.module) and hasattr(slot.module, hidden):
        return f"{slot.name!r}: {cls.__name__} already has an attribute {hidden!r}"
    return None


def _holder(slot: TensorSlot) -> TableLayer | None:
    """Return the layer at a slot, with its tensors removed for another table; None for a bare parameter."""
    module, attribute = slot.module, slot.attribute
    layer = table_attributes(module).get(attribute)
    if layer is not None:
        layer = layer.owner
        for short in layer.spec.tensor_shapes():
            drop_tensor(layer, short)
        return layer
    return to_compressed_class(module) if slot.is_layer else None


def compressed_slots(model: nn.Module, every_path: bool = False) -> Iterator[TensorSlot]:
    """Iterate over all computed tensors of a model, without the layers that bare parameters are decoded from.

    Args:
        model: model to search.
        every_path: yield a module once for each of its paths.
    """
    hidden = {
        id(layer)
        for module in model.modules()
        for name, layer in table_attributes(module).items()
        if module._modules.get(hidden_name(name)) is layer
    }
    for path, module in model.named_modules(remove_duplicate=not every_path):
        if id(module) not in hidden:
            for attribute in table_attributes(module):
                yield TensorSlot(path, module, attribute)


def names_inside_tables(model: nn.Module) -> set[str]:
    """Return the names in the state_dict of the tensors of compressed layers."""
    return {
        f"{path}.{short}" if path else short
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TableLayer)
        for short in (*module.spec.tensor_shapes(), "hash_seed")
    }
