"""Turn a compressed file back into a dense checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import read_blocks
from cqr_compress.checkpoint.compressed_file import METADATA_KEY, CompressedCheckpoint
from cqr_compress.checkpoint.formats.nesting import flat_skeleton, restore_tree
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.shards import Output, shard_paths
from cqr_compress.checkpoint.streaming_writer import atomic_file, check_outputs
from cqr_compress.errors import FormatError, OutputError
from cqr_compress.progress import Progress, Silent
from cqr_compress.table.blocks import BLOCK_BYTES, row_blocks
from cqr_compress.table.spec import TensorShape

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def load_dense(path: str | Path) -> dict[str, Tensor]:
    """Decode a compressed file to the model's state_dict in memory.

    Tensors that the source had outside it (a trainer's own) are left out; `export` writes them too.
    Names that shared a tensor in the source share one again.

    Args:
        path: a file, index or folder that `convert` wrote.

    Returns:
        Tensors by the source's names, with its dtypes and shapes.

    Raises:
        FormatError: not a compressed file, or a damaged one.
    """
    with open_checkpoint(path) as checkpoint:
        opened = CompressedCheckpoint.of(checkpoint)
        state = _state_dict(opened, Silent())
        return {name: tensor for name, tensor in state.items() if name not in opened.header["extras"]}


def export(
    source: str | Path,
    output: str | Path,
    *,
    shard_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a dense checkpoint with the names, dtypes, shapes, nesting and aliases of the source.

    A torch file is assembled in memory; a safetensors file is streamed.

    Args:
        source: a compressed file.
        output: ends in .pt, .pth, .ckpt, .bin or .safetensors.
        shard_bytes: split a safetensors output into files of about this size.
        force: replace an existing file.
        progress: told of the work.

    Returns:
        Bytes of the files written.

    Raises:
        FormatError: not a compressed file, or a damaged one.
        OutputError: an unknown suffix, or the file cannot be written.
    """
    output, progress = Path(output), progress or Silent()
    if output.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise OutputError(
            f"{str(output)!r} ends in none of {', '.join(TORCH_SUFFIXES)} (torch.save) and .safetensors"
        )
    if shard_bytes is not None and output.suffix != ".safetensors":
        raise OutputError(f"only a .safetensors output can be sharded, not {str(output)!r}")
    check_outputs([output], force)
    with open_checkpoint(source) as checkpoint:
        opened = CompressedCheckpoint.of(checkpoint)
        check_outputs([output], force, opened.checkpoint.files)
        if output.suffix == ".safetensors":
            return _export_safetensors(opened, output, shard_bytes, force, progress)
        state = _state_dict(opened, progress)
        skeleton = opened.header["skeleton"] or flat_skeleton(list(state))
        try:
            tree = restore_tree(skeleton, state.__getitem__)
        except (TypeError, ValueError, KeyError, StopIteration, AttributeError, RecursionError) as e:
            raise FormatError(f"the nesting that {str(source)!r} describes is damaged: {e}") from e
        with atomic_file(output) as file:
            torch.save(tree, file)
    return output.stat().st_size


def _state_dict(opened: CompressedCheckpoint, progress: Progress) -> dict[str, Tensor]:
    state: dict[str, Tensor] = OrderedDict()
    for name in _names(opened):
        if name in opened.aliases:
            continue
        if name in opened.specs:
            spec = opened.specs[name]
            progress.start(f"decoding {name}", spec.num_embeddings, "rows")
            table = torch.empty(spec.num_embeddings, spec.embedding_dim, dtype=spec.torch_dtype)
            for start, rows in _decoded_blocks(opened, name):
                table[start : start + len(rows)] = rows
                progress.advance(len(rows))
            state[name] = table
        else:
            state[name] = opened.dense_entries[name].lazy.read()
    for alias, target in opened.aliases.items():
        state[alias] = state[target]
    return state


def _names(opened: CompressedCheckpoint) -> list[str]:
    return [*opened.specs, *opened.dense_entries]


def _decoded_blocks(opened: CompressedCheckpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    table = opened.table(name)
    for start, stop in row_blocks(table.spec.num_embeddings, table.spec.embedding_dim):
        yield start, table.decode(start, stop)


def _export_safetensors(
    opened: CompressedCheckpoint, output: Path, shard_bytes: int | None, force: bool, progress: Progress
) -> int:
    """Stream to safetensors; other names of a shared tensor get copies, as the format shares nothing."""
    shapes = {
        name: TensorShape((s.num_embeddings, s.embedding_dim), s.torch_dtype) for name, s in opened.specs.items()
    }
    for name, entry in opened.dense_entries.items():
        shapes[name] = TensorShape(entry.shape, entry.dtype)
    for alias, target in opened.aliases.items():
        shapes[alias] = shapes[target]
    paths = shard_paths(output, shapes, shard_bytes)
    metadata = {k: v for k, v in opened.checkpoint.metadata.items() if k != METADATA_KEY}
    out = Output(output, shapes, paths, metadata)
    check_outputs([*paths, out.final_path], force, opened.checkpoint.files)
    with out:
        for name in shapes:
            source = opened.aliases.get(name, name)
            blocks: Any = (
                _decoded_blocks(opened, source)
                if source in opened.specs
                else read_blocks(opened.dense_entries[source], BLOCK_BYTES)
            )
            progress.start(f"writing {name}", shapes[name].nbytes, "bytes")
            for _, block in blocks:
                out.write(name, block)
                progress.advance(block.nbytes)
        out.finish(metadata)
        out.commit()
    return out.file_bytes
