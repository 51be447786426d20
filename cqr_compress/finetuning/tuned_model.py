"""The trainable part of a model: trained in float32, evaluated with the dtypes of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.errors import TableNotFoundError
from cqr_compress.model.load import model_tensors
from cqr_compress.model.surgery import drop_tensor, table_attributes
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.file_form import rounded
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec, spec_from_json
from cqr_compress.table.table import CompressedTable

_TRAINED = frozenset(
    {"codebooks", "row_scale", "row_offset", "dim_scale", "row_mean", "state_values", "gain_range"}
)
Snapshot = dict[str, Any]


@dataclass
class TunedModel:
    """A model prepared for training, with a compressed file loaded into it.

    Attributes:
        model: the model, with codebooks in float32.
        tables: layers, by the names of their tables in the file.
        trains_all: whether parameters outside tables are trained too.
        dense_dtypes: dtypes in the file of the trainable tensors outside tables.
    """

    model: nn.Module
    tables: dict[str, TableLayer]
    trains_all: bool
    dense_dtypes: dict[Tensor, torch.dtype]
    _given_non_finite: int = field(init=False)

    def __post_init__(self) -> None:
        self._given_non_finite = self._num_non_finite()

    @classmethod
    def from_model(cls, model: nn.Module, opened: CompressedFile, trains_all: bool) -> TunedModel:
        """Convert trainable tensors to float32, and freeze the others.

        Raises:
            TableNotFoundError: the model has no table of the file.
        """
        slots = model_tensors(model, opened)
        tables: dict[str, TableLayer] = {}
        for name in opened.specs:
            layer = table_attributes(slots[name].module).get(slots[name].attribute) if name in slots else None
            if layer is not None:
                tables[name] = layer.owner
        if not tables:
            raise TableNotFoundError(f"{type(model).__name__} has no table of {str(opened.checkpoint.path)!r}")
        dense: dict[Tensor, torch.dtype] = {}
        if trains_all:
            model.float()
            for name, slot in slots.items():
                if name in opened.dense_entries and slot.tensor.is_floating_point():
                    dense[slot.tensor] = opened.dense_entries[name].dtype
        else:
            model.requires_grad_(False)
        for layer in tables.values():
            _widen(layer)
        return cls(model, tables, trains_all, dense)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer: codebooks, row scales and offsets, and all others if `trains_all`."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def is_finite(self) -> bool:
        """Whether no more values are infinite or NaN than in the file that was given."""
        return self._num_non_finite() <= self._given_non_finite

    def _num_non_finite(self) -> int:
        tensors = [t for layer in self.tables.values() for t in layer.table_tensors().values()]
        tensors += self._others().values()
        return sum(int((~t.isfinite()).sum()) for t in tensors if t.is_floating_point())

    def install(self, name: str, spec: AnySpec, tensors: Mapping[str, Tensor]) -> None:
        """Replace the table of a layer; an existing optimizer becomes invalid.

        Args:
            name: name of the table.
            spec: spec of the new table.
            tensors: tensors of the new table, in the dtypes of the spec or wider.
        """
        layer = self.tables[name]
        dtype, device = layer.dtype, layer.device
        for short in layer.spec.tensor_shapes():
            drop_tensor(layer, short)
        shapes = spec.tensor_shapes()
        exact = {short: tensor.to(shapes[short].dtype, copy=True) for short, tensor in tensors.items()}
        layer.hold_table(CompressedTable(spec, exact), device, dtype)
        _widen(layer)

    def train_mode(self) -> None:
        """Set train mode; batch normalization stays in eval mode unless everything is trained."""
        self.model.train()
        if not self.trains_all:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()

    @contextmanager
    @torch.no_grad()
    def as_written(self) -> Iterator[None]:
        """Round values to the dtypes of the file inside the context."""
        written = {tensor: tensor.data.to(dtype) for tensor, dtype in self.dense_dtypes.items()}
        for layer in self.tables.values():
            tensors = {s: t for s, t in layer.table_tensors().items() if t.is_floating_point()}
            written |= {tensors[short]: value for short, value in rounded(layer.spec, tensors).items()}
        held = {tensor: tensor.detach().clone() for tensor in written}
        for tensor, value in written.items():
            tensor.data.copy_(value)
        try:
            yield
        finally:
            for tensor, value in held.items():
                tensor.data.copy_(value)

    def snapshot(self) -> Snapshot:
        """Copy all tensors that training can change."""
        tables = {
            name: {
                "spec": layer.spec.to_json(),
                "tensors": {short: t.detach().clone() for short, t in layer.table_tensors().items()},
            }
            for name, layer in self.tables.items()
        }
        others = {name: tensor.detach().clone() for name, tensor in self._others().items()}
        return {"tables": tables, "others": others}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot; an existing optimizer becomes invalid if the layout of a table differs."""
        for name, kept in snapshot["tables"].items():
            spec, layer = spec_from_json(kept["spec"]), self.tables[name]
            if _without_seed(spec) != _without_seed(layer.spec):
                self.install(name, spec, kept["tensors"])
            if isinstance(spec, CodebookSpec) and spec != layer.spec:
                layer.reseed(spec.seed)
            for short, tensor in layer.table_tensors().items():
                tensor.data.copy_(kept["tensors"][short])
        others = self._others()
        for name, value in snapshot["others"].items():
            now = others.get(name)
            if now is not None and now.shape == value.shape and 0 not in now.stride():
                now.data.copy_(value)
            elif now is not None:  # a buffer that a forward pass replaced by one of another shape
                path, _, attribute = name.rpartition(".")
                self.model.get_submodule(path)._buffers[attribute] = value.to(now.device, copy=True)

    def _others(self) -> dict[str, Tensor]:
        """Return tensors outside tables that can change: buffers, and parameters if everything is trained."""
        inside = {id(t) for layer in self.tables.values() for t in layer.table_tensors().values()}
        return {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
            and id(tensor) not in inside
            and (self.trains_all or not isinstance(tensor, nn.Parameter))
        }


def _widen(layer: TableLayer) -> None:
    """Convert tensors below float64 to float32, and make codebooks, row scales and row offsets trainable."""
    for short, tensor in layer.table_tensors().items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.float() if tensor.dtype != torch.float64 else tensor.data
            trained = _TRAINED | {"rotation"} if isinstance(layer.spec, TrellisSpec) else _TRAINED
            tensor.requires_grad_(short in trained)


def _without_seed(spec: AnySpec) -> AnySpec:
    return replace(spec, seed=0) if isinstance(spec, CodebookSpec) else spec
