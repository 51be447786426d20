"""Layers that read compressed tables, usable wherever nn.Embedding and nn.EmbeddingBag are."""

from cqr_compress.nn.embedding import CompressedEmbedding, CompressedEmbeddingBag
from cqr_compress.nn.search import TopK
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.nn.table_weight import TableWeight

__all__ = ["CompressedEmbedding", "CompressedEmbeddingBag", "TableLayer", "TableWeight", "TopK"]
