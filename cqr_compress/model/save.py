"""Write a live model with compressed layers as a compressed file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cqr_compress.checkpoint.compressed_file import (
    CompressedCheckpoint,
)
from cqr_compress.checkpoint.compressed_writer import Changes, _new_header, _Parts, _write
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.checkpoint.streaming_writer import check_outputs
from cqr_compress.errors import SwapError, TableNotFoundError
from cqr_compress.model.load import model_tensors
from cqr_compress.model.surgery import computed
from cqr_compress.model.swap import Place, compressed_places, refuse_wrapper
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import Progress, Silent
from cqr_compress.table.spec import AnySpec, CodebookSpec, TensorShape


def save_compressed(
    model: nn.Module,
    output: str | Path,
    like: str | Path | None = None,
    *,
    prefix: str | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
    change_header: Changes = lambda header: None,
    progress: Progress | None = None,
) -> SizeReport:
    """Write a model whose embedding layers are compressed, and a JSON report beside the file.

    The output is written to a temporary file, read back, and only then renamed into place.

    Args:
        model: with compressed layers, as `load_compressed`, `compress_` or `CQREmbedding` make them.
        output: the safetensors file to write.
        like: the compressed file that was loaded into the model: names, dtypes, nesting and whatever the model
            does not have are taken over from it. Without one, names are the model's, dtypes those of its tensors.
        prefix: as it was given to `load_compressed`.
        shard_bytes: split the output into files of about this size.
        force: replace existing output.
        change_header: may change the metadata before it is written.
        progress: told of the work.

    Returns:
        The size report.

    Raises:
        TableNotFoundError: the model has no compressed layer.
        SwapError: the model is not the one that `like` was loaded into.
        NonFiniteError: a value that is not finite in the file's dtype.
        OutputExistsError: the output is there and `force` is not given; other errors of writing.
    """
    output, progress = Path(output), progress or Silent()
    refuse_wrapper(model)
    check_outputs([output, report_path(output)], force)
    if like is None:
        header = _new_header(model)
        return _write(
            output, header, {}, _parts_of_model(model, header), shard_bytes, force, progress, change_header
        )
    with open_checkpoint(like) as checkpoint:
        opened = CompressedCheckpoint.of(checkpoint)
        header = json.loads(json.dumps(opened.header))
        parts = _parts_like(model, opened, header, prefix)
        return _write(output, header, checkpoint.metadata, parts, shard_bytes, force, progress, change_header)


def _parts_like(
    model: nn.Module, opened: CompressedCheckpoint, header: dict[str, Any], prefix: str | None
) -> _Parts:
    """Take every tensor of the file from the model, and from the file what the model does not have."""
    parts, places = _Parts(), model_tensors(model, opened, prefix)
    for name, spec in opened.specs.items():
        layer = _layer_at(places.get(name))
        if layer is None:
            raise SwapError(
                f"the model does not read {name!r} from codes: load {str(opened.checkpoint.path)!r} into it first"
            )
        made = _as_in_file(layer.spec, spec)
        parts.add_table(name, made, layer.table_tensors())
        header["tables"][name]["spec"] = made.to_json()
        if made.layout != spec.layout:
            header["tables"][name]["reason"] = "chosen anew for the task"
    for name, entry in opened.dense_entries.items():
        place = places.get(name)
        if place is not None and tuple(place.tensor.shape) == tuple(entry.shape):
            parts.add_dense(entry, place.tensor)
        else:
            parts.copy(entry)
    return parts


def _as_in_file(spec: AnySpec, file: AnySpec) -> AnySpec:
    """The layer's spec, with the dtypes of the file."""
    if isinstance(spec, CodebookSpec) and isinstance(file, CodebookSpec):
        return replace(spec, dtype=file.dtype, codebook_dtype=file.codebook_dtype)
    return replace(spec, dtype=file.dtype)


def _parts_of_model(model: nn.Module, header: dict[str, Any]) -> _Parts:
    """Take every tensor of the model under its own name."""
    parts = _Parts()
    named: dict[int, str] = {}
    hidden = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TableLayer):
            shorts = (*module.spec.tensor_shapes(), "hash_seed")
            hidden |= {f"{path}.{short}" if path else short for short in shorts}
    for place in compressed_places(model, every_path=True):
        layer = _layer_at(place)
        assert layer is not None
        if id(layer.owner) in named:
            header["aliases"][place.name] = named[id(layer.owner)]
            continue
        named[id(layer.owner)] = place.name
        table = layer.table()
        parts.add_table(place.name, table.spec, table.tensors)
        header["tables"][place.name] = {
            "spec": table.spec.to_json(), "quality": {}, "reason": "made by its layer",
        }  # fmt: skip
    if not named:
        raise TableNotFoundError(f"{type(model).__name__} has no compressed layer")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in hidden:
            continue
        if id(tensor) in named:
            header["aliases"][name] = named[id(tensor)]
            continue
        named[id(tensor)] = name
        parts.add_tensor(name, TensorShape(tuple(tensor.shape), tensor.dtype), tensor)
    dense = sum(shape.nbytes for name, shape in parts.shapes.items())
    stored = sum(spec.nbytes - spec.dense_nbytes for spec in parts.specs.values())
    header["source"]["bytes"] = dense - stored
    return parts


def _layer_at(place: Place | None) -> TableLayer | None:
    return None if place is None else computed(place.module).get(place.attribute)
