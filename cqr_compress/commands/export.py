"""Export a compressed file to a dense checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import Destination, write_dense
from cqr_compress.checkpoint.formats.nesting import flat_structure, restore_tree
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY
from cqr_compress.checkpoint.output_files import check_outputs
from cqr_compress.checkpoint.parts import Part, Put, copied_part
from cqr_compress.checkpoint.torch_writer import save_torch
from cqr_compress.commands.export_vectors import VECTOR_SUFFIXES, export_vectors, is_word_vectors
from cqr_compress.errors import FormatError, OutputError
from cqr_compress.progress import NoProgress, Progress, shown
from cqr_compress.table.base_spec import TensorShape
from cqr_compress.table.blocks import row_blocks

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def load_dense_state_dict(path: str | Path, *, verify: bool = True) -> dict[str, Tensor]:
    """Decode a compressed file to the model's dense state_dict, in memory at its full size.

    Tensors outside the model's state_dict in the source, such as a trainer's, are omitted; `export` includes them.
    Names that shared a tensor in the source share a tensor.

    Args:
        path: a file, index or folder that `convert` wrote.
        verify: whether to compare the tensors with the checksums in the file.

    Returns:
        Tensors by name, with the names, dtypes and shapes of the source.

    Raises:
        FormatError: not a compressed file, or a damaged one.
    """
    with open_checkpoint(path) as checkpoint:
        opened = CompressedFile.from_checkpoint(checkpoint)
        if verify:
            opened.verify()
        state = _state_dict(opened, NoProgress())
        return {name: tensor for name, tensor in state.items() if name not in opened.header.outside_model}


def export(
    source: str | Path,
    output: str | Path,
    *,
    shard_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write a dense checkpoint with the names, dtypes, shapes, nesting and aliases of the source.

    A torch file is assembled in memory; a safetensors file is streamed. Objects of unknown classes (a pickled
    config), sets, bytes, numpy arrays, and sparse and quantized tensors of a torch checkpoint are not stored in a
    compressed file, and therefore are not exported.

    Args:
        source: a compressed file.
        output: path that ends in .pt, .pth, .ckpt, .bin or .safetensors; of word vectors also .txt and .vec (text
            of word2vec) or .npy, and .bin is the binary form of word2vec.
        shard_bytes: split a safetensors output into files of about this size.
        force: replace an existing file.
        verify: whether to compare the tensors with the checksums in the file first.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Returns:
        Bytes of the written files.

    Raises:
        FormatError: not a compressed file, or a damaged one.
        OutputError: an unknown suffix, or the file cannot be written.
    """
    output = Path(output)
    if output.suffix in VECTOR_SUFFIXES and is_word_vectors(source):
        return export_vectors(source, output, force=force, verify=verify, progress=progress)
    if output.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise OutputError(
            f"{str(output)!r} has an unknown suffix: give {', '.join(TORCH_SUFFIXES)} (torch.save) or .safetensors"
        )
    if shard_bytes is not None and output.suffix != ".safetensors":
        raise OutputError(f"only a .safetensors output can be sharded, not {str(output)!r}")
    with shown(progress) as progress, open_checkpoint(source) as checkpoint:
        destination = Destination(path=output, shard_bytes=shard_bytes, force=force, reading=checkpoint.files)
        if output.suffix == ".safetensors":
            destination.check(with_report=False)
        else:
            check_outputs([output], force, checkpoint.files)
        opened = CompressedFile.from_checkpoint(checkpoint)
        if verify:
            progress.start("verifying", sum(entry.nbytes for entry in checkpoint.entries.values()), "bytes")
            opened.verify(progress.advance)
        if output.suffix == ".safetensors":
            metadata = {k: v for k, v in checkpoint.metadata.items() if k != METADATA_KEY}
            return write_dense(destination, _dense_parts(opened), metadata, progress)
        state = _state_dict(opened, progress)
        structure = opened.header.structure or flat_structure(list(state))
        try:
            tree = restore_tree(structure, state.__getitem__)
        except (TypeError, ValueError, KeyError, StopIteration, AttributeError, RecursionError) as e:
            raise FormatError(f"the nesting in the header of {str(source)!r} is damaged: {e}") from e
        save_torch(tree, output)
    return output.stat().st_size


def _state_dict(opened: CompressedFile, progress: Progress) -> dict[str, Tensor]:
    state: dict[str, Tensor] = OrderedDict()
    for name, spec in opened.specs.items():
        progress.start(f"decoding {name}", spec.num_embeddings, "rows")
        table = torch.empty(spec.num_embeddings, spec.embedding_dim, dtype=spec.torch_dtype, device="cpu")
        for start, rows in _decoded_blocks(opened, name):
            table[start : start + len(rows)] = rows
            progress.advance(len(rows))
        state[name] = table
    dtypes = {} if opened.header.rest is None else opened.header.rest.source_dtypes()
    for name, entry in opened.dense_entries.items():
        state[name] = entry.stored.read().to(dtypes.get(name, entry.dtype))
    for alias, target in opened.aliases.items():
        state[alias] = state[target]
    return state


def _decoded_blocks(opened: CompressedFile, name: str) -> Iterator[tuple[int, Tensor]]:
    table = opened.table(name)
    for start, stop in row_blocks(table.spec.num_embeddings, table.spec.embedding_dim):
        yield start, table.decode(start, stop)


def _dense_parts(opened: CompressedFile) -> list[Part]:
    """List decoded tables and copied tensors; safetensors cannot share memory, so tied names are copies."""
    names = {name: name for name in (*opened.specs, *opened.dense_entries)} | dict(opened.aliases)
    dtypes = {} if opened.header.rest is None else opened.header.rest.source_dtypes()
    return [
        _decoded_part(opened, name, source)
        if source in opened.specs
        else copied_part(opened.dense_entries[source], name, dtypes.get(source))
        for name, source in names.items()
    ]


def _decoded_part(opened: CompressedFile, name: str, source: str) -> Part:
    spec = opened.specs[source]

    def write(put: Put) -> None:
        for _, rows in _decoded_blocks(opened, source):
            put(name, rows)

    return Part({name: TensorShape((spec.num_embeddings, spec.embedding_dim), spec.torch_dtype)}, write)
