"""StaticEmbedding of sentence-transformers over a compressed table; `modules.json` of a folder names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer
from torch import nn

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import FormatError
from cqr_compress.model.save import save_compressed
from cqr_compress.nn.embedding import CompressedEmbeddingBag

_TABLES = ("embedding.weight", "embeddings")
"""Names of the table in files of sentence-transformers and of model2vec."""


class CompressedStaticEmbedding(StaticEmbedding):
    """Means of the rows of a compressed table: `SentenceTransformer(FOLDER)` creates it by `modules.json`."""

    def __init__(self, tokenizer: Tokenizer, embedding: CompressedEmbeddingBag, **kwargs: Any) -> None:
        """Create a module of a tokenizer of the tokenizers library, and a compressed layer."""
        nn.Module.__init__(self)
        self.embedding, self.tokenizer = embedding, tokenizer
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.tokenizer.no_padding()
        self.base_model = kwargs.get("base_model")

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the table and the tokenizer to a folder."""
        save_compressed(self, Path(output_path) / "model.safetensors", force=True)
        self.tokenizer.save(str(Path(output_path) / "tokenizer.json"))

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> CompressedStaticEmbedding:
        """Load the module of a folder, or of a repository of the Hugging Face hub.

        Raises:
            FormatError: a file without a compressed table of tokens, or with others next to it.
        """
        where = {"subfolder": subfolder, **{k: v for k, v in kwargs.items() if k in _LOCATION}}
        if hasattr(cls, "load_file_path"):
            tokenizer, weights = (
                cls.load_file_path(model_name_or_path, filename, **where)
                for filename in ("tokenizer.json", "model.safetensors")
            )
        else:  # sentence-transformers before version 5
            tokenizer, weights = (
                str(Path(model_name_or_path) / filename) for filename in ("tokenizer.json", "model.safetensors")
            )
        with open_checkpoint(weights) as checkpoint:
            opened = CompressedFile.from_checkpoint(checkpoint)
            opened.verify()
            name = next((name for name in _TABLES if name in opened.specs), None)
            if name is None or opened.dense_entries:
                raise FormatError(
                    f"{opened.name!r} is no StaticEmbedding: it has tables {sorted(opened.specs)} and tensors "
                    f"{sorted(opened.dense_entries)}"
                )
            layer = CompressedEmbeddingBag(opened.table(name))
        return cls(Tokenizer.from_file(tokenizer), layer)


_LOCATION = ("token", "cache_folder", "revision", "local_files_only")
