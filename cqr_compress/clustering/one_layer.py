"""The clustering of one layer, column by column; the layer stays as it is until all columns are done.

Shapes: N rows, D dimensions, C columns of S = D // C, K codewords.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cqr_compress.bitpack import pack_codes, unpack_codes
from cqr_compress.clustering.gradients import Moments, Prior, RowGradients
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.errors import NonFiniteError, SpecError
from cqr_compress.nn import TableLayer
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids, row_weights
from cqr_compress.spec import STORED, CodebookSpec
from cqr_compress.table import row_blocks, row_codes


@dataclass(eq=False)
class LayerClustering:
    """One layer on its way through a clustering; the layer stays as it is until `finish`."""

    name: str
    layer: TableLayer
    spec: CodebookSpec
    weights: Tensor | None
    options: ClusterOptions
    moments: Moments | None
    prior: Prior | None
    codebooks: Tensor  # (C, L, K, S), filled column by column
    codes: Tensor  # (N, width), packed
    sample: Tensor  # ids that k-means sees
    seed: int
    used: int = 0
    error: float = 0.0
    norm: float = 0.0

    @classmethod
    def begin(
        cls, name: str, layer: TableLayer, weights: Tensor | None, options: ClusterOptions, informed: bool
    ) -> LayerClustering:
        spec, tensors = layer.spec, layer.table_tensors()
        assert isinstance(spec, CodebookSpec)
        _check_finite(tensors["codebooks"], "codebooks", name)
        seed = spec.seed + 1 + options.seed
        job = cls(
            name=name,
            layer=layer,
            spec=spec,
            weights=weights,
            options=options,
            moments=None,
            prior=None,
            codebooks=torch.zeros_like(tensors["codebooks"], dtype=torch.float32),
            codes=tensors["codes"].clone(),
            sample=_sample_ids(layer, options.points_per_centroid * spec.codebook_size, seed),
            seed=seed,
        )
        if informed:
            job.moments = Moments.of_rows(layer.column_rows(ids) for ids in job.id_blocks())
        return job

    def id_blocks(self, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Split ids, or all of them, into blocks."""
        count = self.spec.num_embeddings if ids is None else len(ids)
        width = 2 * self.spec.embedding_dim + 4 * self.spec.num_columns * self.spec.num_levels
        for a, b in row_blocks(count, width, self.options.block_bytes):
            yield torch.arange(a, b, device=self.layer.device) if ids is None else ids[a:b]

    def targets(self, ids: Tensor, column: int, gradients: RowGradients | None) -> Tensor:
        """Where one column of some rows is, or wants to be: (B, S) float32."""
        S = self.spec.sub_dim
        rows = self.layer.column_rows(ids)
        if gradients is None:
            return rows[:, column * S : (column + 1) * S].contiguous()
        assert self.prior is not None
        moved = gradients.target(ids, rows[:, gradients.columns], self.prior, self.options.eta)
        at = column * S - gradients.columns.start
        return moved[:, at : at + S].contiguous()

    def take(self, gradients: RowGradients) -> None:
        """Learn from a pass over the data what the prior of rows is.

        Raises:
            SpecError: no gradient reached the layer.
            NonFiniteError: gradients with NaN or infinity.
        """
        if not gradients.counts.any():
            raise SpecError(
                f"no gradient reached {self.name!r}: the losses do not depend on it, or a compiled or traced "
                "copy of the model made them"
            )
        for sums in (gradients.gradient, gradients.fisher):
            _check_finite(sums, "gradients", self.name)
        assert self.moments is not None
        self.prior = Prior.estimate(self.moments, gradients.fisher, self.options.tau)

    @torch.no_grad()
    def cluster_column(self, column: int, gradients: RowGradients | None) -> None:
        """Find the centroids of a column, and each id's."""
        K = self.spec.codebook_size
        weights = self.weights
        if weights is None and gradients is not None:
            weights = gradients.counts
        points = torch.cat([self.targets(ids, column, gradients) for ids in self.id_blocks(self.sample)]).cpu()
        sampled = None
        if weights is not None and self.options.weighted:
            sampled = row_weights(weights.cpu())[self.sample.cpu()]
        centroids = fit_centroids(points, K, self.seed + column, self.options.iterations, weights=sampled)
        del points
        centroids = centroids.to(self.codebooks.device)
        level = self.spec.code_sources.index(STORED)
        self.codebooks[column, level] = centroids
        used = torch.zeros(K, dtype=torch.bool, device=centroids.device)
        for ids in self.id_blocks():
            targets = self.targets(ids, column, gradients)
            nearest = nearest_centroids(targets, centroids)
            used[nearest] = True
            self.error += float((targets - centroids[nearest]).square().sum())
            self.norm += float(targets.square().sum())
            block = slice(int(ids[0]), int(ids[-1]) + 1)
            codes = unpack_codes(self.codes[block], self.spec.num_columns, self.spec.n_bits)
            codes[:, column] = nearest.to(codes.dtype)
            self.codes[block] = pack_codes(codes, self.spec.n_bits)
        self.used += int(used.sum())

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None) -> Clustering:
        """Put the new pointers, codewords and hash into the layer, all at once."""
        tensors = self.layer.table_tensors()
        moved = float((self.codes != tensors["codes"]).any(1).float().mean())
        tensors["codes"].copy_(self.codes)
        tensors["codebooks"].copy_(self.codebooks)
        self.layer.reseed(self.seed)
        if optimizer is not None:
            optimizer.state.pop(tensors["codebooks"], None)
        return Clustering(
            name=self.name,
            moved=moved,
            relative_error=self.error / max(self.norm, 1e-30),
            dead_codewords=self.spec.num_columns * self.spec.codebook_size - self.used,
        )


def pointers(layer: TableLayer) -> Tensor:
    """The stored codes of a layer: (N, C) integers in [0, K)."""
    spec = layer.spec
    assert isinstance(spec, CodebookSpec) and spec.num_stored_levels == 1
    stored = replace(spec, num_levels=1, code_sources=(STORED,))
    return row_codes(stored, layer.table_tensors()["codes"], torch.empty(0))[:, :, 0]


def _check_finite(values: Tensor, what: str, name: str) -> None:
    if not values.isfinite().all():
        raise NonFiniteError(
            f"the {what} of layer {name!r} have NaN or infinity: training diverged, or a loss was not finite. "
            "The model is as it was"
        )


def _sample_ids(layer: TableLayer, size: int, seed: int) -> Tensor:
    """Draw `size` ids without replacement, or all; ascending, without rows that are stored apart."""
    N, tensors = layer.num_embeddings, layer.table_tensors()
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    if size >= N:
        ids = torch.arange(N, device="cpu")
    elif size * 4 > N:
        ids = torch.randperm(N, **draw)[:size].sort().values
    else:  # few of many: no permutation of all
        ids = torch.unique(torch.randint(N, (size + size // 4,), **draw))
        if len(ids) > size:
            ids = ids[torch.randperm(len(ids), **draw)[:size]].sort().values
    if "kept_ids" in tensors:
        others = ids[~torch.isin(ids, tensors["kept_ids"].cpu().to(torch.int64))]
        ids = others if len(others) else ids
    return ids.to(layer.device)
