"""Layers over compressed tables, drop-in replacements of nn.Embedding and nn.EmbeddingBag."""
