"""Layers that are trained as sketches and clustered while they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cqr_compress.clustering.cluster import cluster_
from cqr_compress.clustering.cluster_layer import pointers
from cqr_compress.clustering.entropy import Entropies, pointer_entropies
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.errors import SpecError
from cqr_compress.nn.embedding import CompressedEmbedding, CompressedEmbeddingBag
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.random_tables import sketch_table
from cqr_compress.table.spec import CodebookSpec
from cqr_compress.table.table import CompressedTable


@dataclass(frozen=True)
class Preset:
    """What a name stands for; every value can be given on its own.

    Attributes:
        num_columns: C.
        helper: whether each column adds a hashed helper codebook.
        init_scale: of the codebooks, see `sketch_table`.
    """

    num_columns: int
    helper: bool
    init_scale: float


PRESETS: dict[str, Preset] = {
    "default": Preset(num_columns=8, helper=False, init_scale=0.3),
    # arXiv:2210.05974, Algorithm 3; the paper names no scale, and a small one is better at every size we measured
    "paper": Preset(num_columns=4, helper=True, init_scale=0.3),
}


class _Clusters(TableLayer):
    """What the trained layers have beside those over a finished table."""

    def cluster(
        self,
        losses: Losses | None = None,
        *,
        counts: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        optimizer_state: str = "reset",
        options: ClusterOptions | None = None,
    ) -> Clustering:
        """Cluster this layer alone, between two steps of training; see `cluster_`.

        Args:
            losses: for gradient-informed clustering, begins a pass over training data; or None.
            counts: (N,) how often each id is used; or None.
            optimizer: of the codebooks.
            optimizer_state: "reset" or "keep".
            options: see `ClusterOptions`.
        """
        by_name = None if counts is None else {"": counts}
        return cluster_(
            self, losses, counts=by_name, optimizer=optimizer, optimizer_state=optimizer_state, options=options
        )[0]

    def entropies(self) -> Entropies:
        """How evenly and independently the pointers are spread."""
        return pointer_entropies(pointers(self), self.spec.codebook_size)  # type: ignore[union-attr]


class CQREmbedding(_Clusters, CompressedEmbedding):
    """A trainable embedding of few parameters, whose ids are clustered while it trains.

    "Clustering the Sketch", arXiv:2210.05974. It is used where nn.Embedding is; between steps of training,
    `cluster()` points ids that behave alike to common codewords (or let a `ClusterSchedule` call it).

    row(i) = concat over columns of codebooks[c, 0][pointer(c, i)] (+ codebooks[c, 1][hash(c, i)] with a helper).
    Pointers begin as hashes and take ceil(log2 K) bits each; helper hashes take none.

    Shapes: N rows, D dimensions; ids of any shape (...) give rows (..., D).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        codebook_size: int = 256,
        num_columns: int | None = None,
        helper: bool | None = None,
        init_scale: float | None = None,
        preset: str = "default",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make a layer with random codebooks; the first arguments are those of nn.Embedding.

        Args:
            num_embeddings: N.
            embedding_dim: D, divisible by num_columns.
            padding_idx: row of zeros that is never trained.
            max_norm: rows longer than this are returned with this length.
            norm_type: p of that length.
            scale_grad_by_freq: divide gradients by how often an id is in the batch.
            sparse: only False.
            codebook_size: K, a power of two; codewords for each dimension: K, or 2 K with a helper.
            num_columns: C; that of the preset if None.
            helper: whether each column has a hashed helper codebook; that of the preset if None.
            init_scale: codewords begin uniform in +-init_scale / sqrt(D); that of the preset if None.
            preset: a name of PRESETS: "default", or "paper" for the algorithm as it is in the paper.
            seed: of codebooks, hashes and clusterings; drawn from torch's generator if None.
            device: where to put the tensors.
            dtype: of rows and codebooks.

        Raises:
            SpecError: settings that no table can have.
        """
        table = _first_table(
            num_embeddings, embedding_dim, padding_idx, codebook_size, num_columns, helper, init_scale, preset,
            seed, dtype,
        )  # fmt: skip
        super().__init__(table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device)
        self.reseed(cast(CodebookSpec, table.spec).seed)


class CQREmbeddingBag(_Clusters, CompressedEmbeddingBag):
    """The bag form of `CQREmbedding`: bags of ids are reduced to one row, as nn.EmbeddingBag does."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        codebook_size: int = 256,
        num_columns: int | None = None,
        helper: bool | None = None,
        init_scale: float | None = None,
        preset: str = "default",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make a layer with random codebooks; the arguments are those of nn.EmbeddingBag and `CQREmbedding`.

        Raises:
            SpecError: settings that no table can have.
        """
        table = _first_table(
            num_embeddings, embedding_dim, padding_idx, codebook_size, num_columns, helper, init_scale, preset,
            seed, dtype,
        )  # fmt: skip
        super().__init__(
            table, max_norm, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset, padding_idx, device
        )
        self.reseed(cast(CodebookSpec, table.spec).seed)


def _first_table(
    N: int,
    D: int,
    padding_idx: int | None,
    codebook_size: int,
    num_columns: int | None,
    helper: bool | None,
    init_scale: float | None,
    preset: str,
    seed: int | None,
    dtype: torch.dtype,
) -> CompressedTable:
    chosen = PRESETS.get(preset)
    if chosen is None:
        raise SpecError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if padding_idx is not None and not -N <= padding_idx < N:
        raise SpecError(f"padding_idx {padding_idx} is outside the table of {N} rows")
    return sketch_table(
        "cqr_helper" if (chosen.helper if helper is None else helper) else "cqr",
        N,
        D,
        codebook_size,
        num_columns=num_columns or chosen.num_columns,
        init_scale=chosen.init_scale if init_scale is None else init_scale,
        zero_row=None if padding_idx is None else padding_idx % N,
        seed=seed,
        dtype=dtype,
    )
