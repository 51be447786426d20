"""The quantization method `cqr_compress` of transformers: `from_pretrained` and `save_pretrained` of folders.

Tables are read from the checkpoint's files by this package, not by the loader of transformers: in the model that
it fills, their weights are empty tensors, as they are under the tables' names in the files. After loading, the
layers get their compressed tables, and so do the output heads that are tied to them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cqr_compress.checkpoint.compressed_file import MARKER, CompressedFile, stored_name
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY, SourceRecord, tables_for_config
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.errors import SwapError
from cqr_compress.model.save import parts_of_model
from cqr_compress.model.surgery import table_attributes
from cqr_compress.model.swap import decompress_, swap_embeddings_
from cqr_compress.table.spec import AnySpec
from cqr_compress.table.table import CompressedTable

_INDEX, _FILE = "model.safetensors.index.json", "model.safetensors"


@register_quantization_config(METADATA_KEY)
class CompressedTablesConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    Attributes:
        quant_method: "cqr_compress".
        tables: the compressed tables, for information: the files describe them.
    """

    def __init__(self, tables: dict[str, Any] | None = None, **others: Any) -> None:
        """Create it from the values in config.json."""
        self.quant_method = METADATA_KEY  # type: ignore[assignment]
        self.tables = tables or {}


@register_quantizer(METADATA_KEY)
class CompressedTablesQuantizer(HfQuantizer):
    """Loads the compressed tables of a folder that `convert` or `save_pretrained` wrote."""

    requires_calibration = True  # tables are compressed by `convert`, not while a model is loaded
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        """Create the quantizer of one `from_pretrained`."""
        super().__init__(quantization_config, **kwargs)
        self._tables: dict[str, CompressedTable] = {}
        self._specs: dict[str, AnySpec] = {}
        self._weights = Path()
        self._shapes: dict[str, torch.Size] = {}
        self._source: SourceRecord | None = None

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return whether `save_pretrained` can write the model: as safetensors files."""
        return safe_serialization is not False

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Do nothing: version 4 imports accelerate for layers that other methods replace."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        self._weights = _weights_of(model, checkpoint_files)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        with open_checkpoint(self._weights) as checkpoint:
            opened = CompressedFile.from_checkpoint(checkpoint)
            opened.verify()
            self._source = opened.header.source
            tables = {name: opened.table(name) for name in opened.specs}
        for name, table in tables.items():
            found = _name_in_model(model, name, table)
            self._tables[found], self._specs[found] = table, table.spec
            module, attribute = _owner(model, found)
            dense = module._parameters[attribute]
            assert dense is not None
            # version 4 draws random values for tied heads, and warns of those that are not tied
            _replace(model, dense, _empty("meta", dense.dtype))
        stored = [stored_name(name, short) for name, table in tables.items() for short in table.spec.file_shapes()]
        ignored = [rf"(^|\.){re.escape('.'.join(each.split('.')[-2:]))}$" for each in stored]
        known = model._keys_to_ignore_on_load_unexpected or ()
        kind = list if transformers.__version__.startswith("4.") else set
        model._keys_to_ignore_on_load_unexpected = kind((*known, *ignored))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for name, table in self._tables.items():
            module, attribute = _owner(model, name)
            filled = module._parameters[attribute]
            assert filled is not None
            shape = (table.spec.num_embeddings, table.spec.embedding_dim)
            # a weight of the right shape, device and dtype that takes no memory
            device = "cpu" if filled.is_meta else filled.device
            weight = nn.Parameter(torch.empty(1, dtype=dtype, device=device).expand(shape))
            _replace(model, filled, weight)
        self._restore_biases(model)
        swap_embeddings_(model, self._tables)
        for name in self._tables:
            table_attributes(_owner(model, name)[0])[_owner(model, name)[1]].to(
                dtype
            )  # model.dtype is the first of all
        self._tables = {}
        return model

    def _restore_biases(self, model: Any) -> None:
        """Load biases of tied output heads again, which were cut to the number of rows of an empty weight."""
        cut = {n: p for n, p in model.named_parameters() if n in self._shapes and p.shape != self._shapes[n]}
        if not cut:
            return
        prefix = f"{model.base_model_prefix}."
        with open_checkpoint(self._weights) as checkpoint:
            for name, parameter in cut.items():
                in_file = next(
                    (n for n in (name, prefix + name, name.removeprefix(prefix)) if n in checkpoint.entries), None
                )
                whole = torch.zeros(self._shapes[name], dtype=parameter.dtype, device=parameter.device)
                if in_file is not None:
                    whole.copy_(checkpoint.entries[in_file].stored.read())
                parameter.data = whole

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of the model's file, and the metadata that describes its tables."""
        header, parts = parts_of_model(model, self._specs)
        written: dict[str, list[Tensor]] = {}
        for part in parts:
            part.write(lambda name, values: written.setdefault(name, []).append(values))
        state = {name: blocks[0] if len(blocks) == 1 else torch.cat(blocks) for name, blocks in written.items()}
        for part in parts:
            state |= {name: _empty("cpu").data for name in part.shapes if name not in state}
        if self._source is not None:
            header = replace(header, source=self._source)
        cast(CompressedTablesConfig, self.quantization_config).tables = tables_for_config(header)
        return state, {METADATA_KEY: header.dumps()}

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        decompress_(model)
        return model


def _weights_of(model: Any, checkpoint_files: Any) -> Path:
    """Return the index or the file that transformers loads a model from.

    Raises:
        SwapError: the file is not found.
    """
    if checkpoint_files:
        files = [Path(file) for file in checkpoint_files]
        for index in files[0].parent.glob("*.safetensors.index.json"):
            content = read_json(index)
            if isinstance(content, dict) and {*content.get("weight_map", {}).values()} == {f.name for f in files}:
                return index
        return files[0]
    config = model.config  # transformers before version 5
    for name in (_INDEX, _FILE):
        found = cached_file(
            config._name_or_path,
            name,
            revision=getattr(config, "_commit_hash", None),
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            return Path(found)
    raise SwapError(f"the files of {config._name_or_path!r} are not found")


def _name_in_model(model: Any, table: str, content: CompressedTable) -> str:
    """Return the name of a table's tensor in a model, which may have one more prefix or one less than the file.

    Raises:
        SwapError: there is none of its shape.
    """
    shape, prefix = (content.spec.num_embeddings, content.spec.embedding_dim), f"{model.base_model_prefix}."
    found: list[str] = [name for name, parameter in model.named_parameters() if tuple(parameter.shape) == shape]
    end = ".".join(table.split(".")[-2:])
    similar = [name for name in found if name == end or name.endswith(f".{end}")]
    name: str
    for name in (table, prefix + table, table.removeprefix(prefix), *(similar if len(similar) == 1 else ())):
        if name in found:
            return name
    raise SwapError(
        f"{type(model).__name__} has no {table!r} of {shape[0]} x {shape[1]}, which the file compresses"
    )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _replace(model: nn.Module, parameter: Tensor, other: nn.Parameter) -> None:
    """Put another parameter wherever a model has a parameter."""
    for module in model.modules():
        for name, found in module._parameters.items():
            if found is parameter:
                module._parameters[name] = other


def _empty(device: str, dtype: torch.dtype = MARKER.dtype) -> nn.Parameter:
    """Return what takes the place of a compressed weight in a file, and in a model while transformers fills it."""
    return nn.Parameter(torch.empty(MARKER.shape, dtype=dtype, device=device), requires_grad=False)
