"""The part of a model that fine-tuning changes: trained in float32, judged as the file will hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.errors import TableNotFoundError
from cqr_compress.model.load import model_tensors
from cqr_compress.model.surgery import drop_tensor, table_attributes
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.spec import AnySpec, CodebookSpec, spec_from_json
from cqr_compress.table.table import CompressedTable

_TRAINED = ("codebooks", "row_scale", "row_offset")
Snapshot = dict[str, Any]


@dataclass
class TunedModel:
    """A model that a compressed file was loaded into, ready to be trained.

    Attributes:
        model: its codebooks are float32.
        tables: layers by the names of their tables in the file.
        everything: whether parameters outside of tables are trained too.
        dense_dtypes: dtype in the file of the tensors outside of tables that can change.
    """

    model: nn.Module
    tables: dict[str, TableLayer]
    everything: bool
    dense_dtypes: dict[Tensor, torch.dtype]

    @classmethod
    def from_model(cls, model: nn.Module, opened: CompressedFile, everything: bool) -> TunedModel:
        """Widen what is trained to float32, and freeze the rest.

        Raises:
            TableNotFoundError: there is no table to train.
        """
        slots = model_tensors(model, opened)
        tables: dict[str, TableLayer] = {}
        for name in opened.specs:
            layer = table_attributes(slots[name].module).get(slots[name].attribute) if name in slots else None
            if layer is not None:
                tables[name] = layer.owner
        if not tables:
            raise TableNotFoundError(f"{type(model).__name__} holds no table of {str(opened.checkpoint.path)!r}")
        dense: dict[Tensor, torch.dtype] = {}
        if everything:
            model.float()
            for name, slot in slots.items():
                if name in opened.dense_entries and slot.tensor.is_floating_point():
                    dense[slot.tensor] = opened.dense_entries[name].dtype
        else:
            model.requires_grad_(False)
        for layer in tables.values():
            _widen(layer)
        return cls(model, tables, everything, dense)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: codebooks and row scales; rotations and kept rows stay."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def file_dtypes(self) -> dict[Tensor, torch.dtype]:
        """Dtype in the file of each floating-point tensor that can change."""
        dtypes = dict(self.dense_dtypes)
        for layer in self.tables.values():
            shapes, tensors = layer.spec.tensor_shapes(), layer.table_tensors()
            dtypes |= {t: shapes[short].dtype for short, t in tensors.items() if t.is_floating_point()}
        return dtypes

    def install(self, name: str, spec: AnySpec, tensors: Mapping[str, Tensor]) -> None:
        """Let a layer hold another table; an optimizer has to be made anew.

        Args:
            name: of the table.
            spec: of the new one.
            tensors: of the new one, in the dtypes of the spec or wider.
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
        """Put the model into train mode; running statistics rest where only codebooks are trained."""
        self.model.train()
        if not self.everything:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()

    @contextmanager
    @torch.no_grad()
    def as_written(self) -> Iterator[None]:
        """Round values to the dtypes of the file for a while."""
        held: dict[Tensor, Tensor] = {}
        for tensor, dtype in self.file_dtypes.items():
            if dtype != tensor.dtype:
                held[tensor] = tensor.detach().clone()
                tensor.data.copy_(tensor.data.to(dtype))
        try:
            yield
        finally:
            for tensor, value in held.items():
                tensor.data.copy_(value)

    def snapshot(self) -> Snapshot:
        """Copy everything that can change."""
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
        """Put a copy back; if its tables have other layouts, an optimizer has to be made anew."""
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
            elif now is not None:  # a buffer that a forward put into the slot of another one
                path, _, attribute = name.rpartition(".")
                self.model.get_submodule(path)._buffers[attribute] = value.to(now.device, copy=True)

    def _others(self) -> dict[str, Tensor]:
        """What a file holds outside of tables and can change: parameters, and buffers that a forward may fill."""
        inside = {id(t) for layer in self.tables.values() for t in layer.table_tensors().values()}
        return {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
            and id(tensor) not in inside
            and (self.everything or not isinstance(tensor, nn.Parameter))
        }


def _widen(layer: TableLayer) -> None:
    """Hold floating-point tensors in float32, and train those that are codebooks or row scales."""
    for short, tensor in layer.table_tensors().items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.float() if tensor.dtype != torch.float64 else tensor.data
            tensor.requires_grad_(short in _TRAINED)


def _without_seed(spec: AnySpec) -> AnySpec:
    return replace(spec, seed=0) if isinstance(spec, CodebookSpec) else spec
