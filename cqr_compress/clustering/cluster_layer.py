"""The clustering of one layer, column by column; the layer is unchanged until all columns are done.

Shapes: N rows, D dimensions, C columns of S = D // C, K codewords.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cqr_compress import distributed
from cqr_compress.clustering.gradients import RowGradients
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.clustering.targets import Targets
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.quantize.base import row_weights
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids
from cqr_compress.table.bitpack import pack_codes, unpack_codes
from cqr_compress.table.codes import row_codes
from cqr_compress.table.spec import STORED, CodebookSpec


@dataclass(eq=False)
class LayerClustering:
    """A clustering of one layer in progress; the layer is unchanged until `finish`."""

    targets: Targets
    weights: Tensor | None
    codebooks: Tensor  # (C, L, K, S), filled column by column
    codes: Tensor  # (N, width), packed
    sample: Tensor  # ids whose rows k-means is fitted to
    seed: int
    used: int = 0
    error: float = 0.0
    norm: float = 0.0

    @classmethod
    def begin(
        cls, name: str, layer: TableLayer, weights: Tensor | None, options: ClusterOptions, gradient_informed: bool
    ) -> LayerClustering:
        targets, tensors = Targets.begin(name, layer, options, gradient_informed), layer.table_tensors()
        spec = targets.spec
        assert isinstance(spec, CodebookSpec)
        seed = spec.seed + 1 + options.seed
        return cls(
            targets=targets,
            weights=weights,
            codebooks=torch.zeros_like(tensors["codebooks"], dtype=torch.float32),
            codes=tensors["codes"].clone(),
            sample=_sample_ids(layer, options.points_per_centroid * spec.codebook_size, seed),
            seed=seed,
        )

    @torch.no_grad()
    def update_column(self, column: int, gradients: RowGradients | None) -> None:
        """Compute the centroids of a column, and the nearest centroid of each id."""
        spec, options = self.targets.spec, self.targets.options
        assert isinstance(spec, CodebookSpec)
        K = spec.codebook_size
        weights = self.weights
        if weights is None and gradients is not None:
            weights = gradients.counts
        points = torch.cat(
            [self.targets.column(ids, column, gradients) for ids in self.targets.id_blocks(self.sample)]
        ).cpu()
        sampled = None
        if weights is not None and options.weighted:
            sampled = row_weights(weights.cpu())[self.sample.cpu()]
        centroids = fit_centroids(points, K, self.seed + column, options.iterations, weights=sampled)
        del points
        centroids = centroids.to(self.codebooks.device)
        level = spec.code_sources.index(STORED)
        self.codebooks[column, level] = centroids
        used = torch.zeros(K, dtype=torch.bool, device=centroids.device)
        for ids in self.targets.id_blocks():
            wanted = self.targets.column(ids, column, gradients)
            nearest = nearest_centroids(wanted, centroids)
            used[nearest] = True
            self.error += float((wanted - centroids[nearest]).square().sum())
            self.norm += float(wanted.square().sum())
            block = slice(int(ids[0]), int(ids[-1]) + 1)
            codes = unpack_codes(self.codes[block], spec.num_columns, spec.n_bits)
            codes[:, column] = nearest.to(codes.dtype)
            self.codes[block] = pack_codes(codes, spec.n_bits)
        self.used += int(used.sum())

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None) -> Clustering:
        """Write the new pointers, codewords and hash seed to the layer, identically in all processes."""
        layer, spec = self.targets.layer, self.targets.spec
        assert isinstance(spec, CodebookSpec)
        tensors = layer.table_tensors()
        for made in (self.codes, self.codebooks):
            distributed.broadcast_(made)
        moved = float((self.codes != tensors["codes"]).any(1).float().mean())
        tensors["codes"].copy_(self.codes)
        tensors["codebooks"].copy_(self.codebooks)
        layer.reseed(self.seed)
        if optimizer is not None:
            optimizer.state.pop(tensors["codebooks"], None)
        error, used = distributed.broadcast_object((self.error / max(self.norm, 1e-30), self.used))
        return Clustering(
            name=self.targets.name,
            moved=moved,
            relative_error=error,
            dead_codewords=spec.num_columns * spec.codebook_size - used,
        )


def pointers(layer: TableLayer) -> Tensor:
    """Return the pointers of a layer: (N, C) integers in [0, K)."""
    spec = layer.spec
    assert isinstance(spec, CodebookSpec) and spec.num_stored_levels == 1
    stored = replace(spec, num_levels=1, code_sources=(STORED,))
    ids = torch.empty(0, dtype=torch.int64, device="cpu")  # not read: every code is stored
    return row_codes(stored, layer.table_tensors()["codes"], ids)[:, :, 0]


def _sample_ids(layer: TableLayer, size: int, seed: int) -> Tensor:
    """Sample at most `size` ids without replacement, ascending, without rows that are stored apart."""
    N, tensors = layer.num_embeddings, layer.table_tensors()
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    if size >= N:
        ids = torch.arange(N, device="cpu")
    elif size * 4 > N:
        ids = torch.randperm(N, **draw)[:size].sort().values
    else:  # a small sample, for which a permutation of all ids is too expensive
        ids = torch.unique(torch.randint(N, (size + size // 4,), **draw))
        if len(ids) > size:
            ids = ids[torch.randperm(len(ids), **draw)[:size]].sort().values
    if "kept_ids" in tensors:
        others = ids[~torch.isin(ids, tensors["kept_ids"].cpu().to(torch.int64))]
        ids = others if len(others) else ids
    return ids.to(layer.device)
