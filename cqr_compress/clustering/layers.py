"""Layers that are trained as sketches and clustered during training."""

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
    """Named defaults of arguments, each of which can be overridden.

    Attributes:
        num_columns: C.
        helper: whether each column has a hashed helper codebook.
        init_scale: scale of the initial codebooks, see `sketch_table`.
    """

    num_columns: int
    helper: bool
    init_scale: float


PRESETS: dict[str, Preset] = {
    "default": Preset(num_columns=8, helper=False, init_scale=0.3),
    # arXiv:2210.05974, Algorithm 3; the paper gives no scale, and a small one is better at all measured sizes
    "paper": Preset(num_columns=4, helper=True, init_scale=0.3),
}


class _Clusters(TableLayer):
    """Methods of trainable sketches, in addition to those of `TableLayer`."""

    def cluster(
        self,
        losses: Losses | None = None,
        *,
        counts: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        optimizer_state: str = "reset",
        options: ClusterOptions | None = None,
    ) -> Clustering:
        """Cluster this layer only, between two training steps; see `cluster_`.

        Args:
            losses: begins a pass over training data, for gradient-informed clustering; or None.
            counts: (N,) counts of the ids; or None.
            optimizer: optimizer of the codebooks.
            optimizer_state: "reset" or "keep".
            options: see `ClusterOptions`.
        """
        by_name = None if counts is None else {"": counts}
        return cluster_(
            self, losses, counts=by_name, optimizer=optimizer, optimizer_state=optimizer_state, options=options
        )[0]

    def entropies(self) -> Entropies:
        """Compute the entropies of the pointers."""
        return pointer_entropies(pointers(self), self.spec.codebook_size)  # type: ignore[union-attr]


class CQREmbedding(_Clusters, CompressedEmbedding):
    """A trainable embedding with few parameters, whose ids are clustered during training.

    "Clustering the Sketch", arXiv:2210.05974. It replaces nn.Embedding; between training steps, `cluster()`, which
    a `ClusterSchedule` can call, lets ids with similar rows share codewords.

    row(i) = concat over columns of codebooks[c, 0][pointer(c, i)] (+ codebooks[c, 1][hash(c, i)] with a helper).
    Pointers are initialized with hashes and take ceil(log2 K) bits each; hashes of the helper take none.

    Shapes: N rows, D dimensions; ids (...) of any shape, rows (..., D).
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
        """Create a layer with random codebooks; the first arguments are those of nn.Embedding.

        Args:
            num_embeddings: N.
            embedding_dim: D, divisible by num_columns.
            padding_idx: row of zeros that is never trained.
            max_norm: rows with a larger norm are renormalized to this norm.
            norm_type: p of the p-norm for max_norm.
            scale_grad_by_freq: scale gradients by the inverse frequency of the ids in the batch.
            sparse: has to be False.
            codebook_size: K, a power of two; the layer has K * D parameters, or 2 * K * D with a helper.
            num_columns: C; that of the preset if None.
            helper: whether each column has a hashed helper codebook; as in the preset if None.
            init_scale: codewords are initialized uniformly in +-init_scale / sqrt(D); as in the preset if None.
            preset: a name of PRESETS: "default", or "paper" for the settings of the paper.
            seed: seed of codebooks, hashes and clusterings; drawn from torch's generator if None.
            device: device of the tensors.
            dtype: dtype of rows and codebooks.

        Raises:
            SpecError: invalid settings.
        """
        table = _first_table(
            num_embeddings, embedding_dim, padding_idx, codebook_size, num_columns, helper, init_scale, preset,
            seed, dtype,
        )  # fmt: skip
        super().__init__(table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device)
        self.reseed(cast(CodebookSpec, table.spec).seed)


class CQREmbeddingBag(_Clusters, CompressedEmbeddingBag):
    """The bag variant of `CQREmbedding`: reduces bags of rows, as nn.EmbeddingBag does."""

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
        """Create a layer with random codebooks; the arguments are those of nn.EmbeddingBag and `CQREmbedding`.

        Raises:
            SpecError: invalid settings.
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
