"""StaticEmbedding of sentence-transformers over a compressed table.

`StaticEmbedding.load` passes the weights of a file to the class's constructor, without a way for others to read
them; so its `load` and `save` are replaced by functions that call them for all but compressed tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.compressed_file import CompressedFile, is_compressed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError, FormatError
from cqr_compress.model.save import save_compressed
from cqr_compress.model.swap import swap_embeddings_
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.table import CompressedTable

_TABLES = ("embedding.weight", "embeddings")
"""Names of the table in files of sentence-transformers and of model2vec."""
_LOCATION = ("subfolder", "token", "cache_folder", "revision", "local_files_only")


def extend(module: str) -> None:
    """Let the class StaticEmbedding of an imported module load and save compressed tables."""
    cls = sys.modules[module].StaticEmbedding
    load_dense: Callable[..., Any] = cls.load.__func__
    save_dense: Callable[..., Any] = cls.save

    def load(cls: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        names = ("subfolder", *(() if len(args) < 2 else _LOCATION[1 : len(args)]))
        where = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in _LOCATION}}
        path = cls.load_file_path(model_name_or_path, "model.safetensors", **where)
        table = None if path is None else _table_in(Path(path))
        if table is None:
            return load_dense(cls, model_name_or_path, *args, **kwargs)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(cls.load_file_path(model_name_or_path, "tokenizer.json", **where))
        # weights of the right shape that take no memory
        weights = torch.empty(1, dtype=table.spec.torch_dtype, device="cpu")
        made = cls(
            tokenizer, embedding_weights=weights.expand(table.spec.num_embeddings, table.spec.embedding_dim)
        )
        swap_embeddings_(made, {"embedding.weight": table})
        made.embedding.to(table.spec.torch_dtype)  # the library takes the first dtype for the model's
        return made

    def save(self: Any, output_path: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.embedding, TableLayer):
            save_dense(self, output_path, *args, **kwargs)
            return
        save_compressed(self, Path(output_path) / "model.safetensors", force=True)
        self.tokenizer.save(str(Path(output_path) / "tokenizer.json"))

    cls.load, cls.save = classmethod(load), save


def _table_in(path: Path) -> CompressedTable | None:
    """Read the table of a file; None if it is not compressed.

    Raises:
        FormatError: a compressed file with other tensors than the table of a StaticEmbedding.
    """
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:  # the library says what it thinks of it
        return None
    with checkpoint:
        if not is_compressed(checkpoint):
            return None
        opened = CompressedFile.from_checkpoint(checkpoint)
        opened.verify()
        name = next((name for name in _TABLES if name in opened.specs), None)
        if name is None or opened.dense_entries:
            tables, tensors = sorted(opened.specs), sorted(opened.dense_entries)
            raise FormatError(
                f"{opened.name!r} is no StaticEmbedding: it has tables {tables} and tensors {tensors}"
            )
        return opened.table(name)
