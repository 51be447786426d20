"""Layers that read compressed tables, usable wherever nn.Embedding and nn.EmbeddingBag are."""
