"""One clustering of a trained sketch: ids are pointed anew to the centroids of where they are, or want to be.

"Clustering the Sketch", arXiv:2210.05974, Algorithm 3: in each column, k-means of the rows of a sample of ids;
every id then points to its nearest centroid, the centroids become the codebook, and the helper is hashed anew and
set to zero. Beyond the paper, ids can be clustered by where a Newton step would take their rows (`gradients`).

Shapes: N rows, D dimensions, C columns of S = D // C, K codewords.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.bitpack import pack_codes, unpack_codes
from cqr_compress.clustering.gradients import Losses, Moments, Prior, RowGradients, backpropagate, observed
from cqr_compress.errors import NonFiniteError, ShapeError, SpecError, TableNotFoundError
from cqr_compress.nn import TableLayer
from cqr_compress.progress import Progress, Silent
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids, row_weights
from cqr_compress.spec import HASHED, STORED, CodebookSpec
from cqr_compress.table import BLOCK_BYTES, row_blocks, row_codes


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How a clustering is done; the defaults were chosen by measurement.

    Attributes:
        eta: damping of the Newton step, with gradients.
        tau: weight of the prior in it.
        weighted: weigh ids by how often they occur, where that is known.
        iterations: of k-means.
        points_per_centroid: ids that are sampled for each centroid.
        block_bytes: working memory of a block of rows; results do not depend on it.
        buffer_bytes: memory for gradients; more passes over the data are made where a table needs more.
        seed: of samples, k-means and helper hashes; drawn anew for each clustering of a layer.
    """

    eta: float = 0.3
    tau: float = 2.0
    weighted: bool = True
    iterations: int = 20
    points_per_centroid: int = 256
    block_bytes: int = BLOCK_BYTES
    buffer_bytes: int = 2 * 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.eta > 0 and self.tau > 0):
            raise SpecError(f"eta is {self.eta} and tau is {self.tau}: give positive numbers")
        counts = (self.iterations, self.points_per_centroid, self.block_bytes, self.buffer_bytes)
        if min(counts) < 1:
            raise SpecError("iterations, points_per_centroid, block_bytes and buffer_bytes are at least 1")


@dataclass(frozen=True)
class Clustering:
    """What one clustering did to one layer.

    Attributes:
        name: of the layer in the model.
        moved: share of ids that point elsewhere in at least one column.
        relative_error: squared distance of the ids' targets to their centroids, beside that of the targets to
            zero.
        dead_codewords: codewords to which no id points, all columns together.
    """

    name: str
    moved: float
    relative_error: float
    dead_codewords: int


def cluster_(
    model: nn.Module,
    losses: Losses | None = None,
    *,
    counts: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: str = "reset",
    options: ClusterOptions | None = None,
    progress: Progress | None = None,
) -> list[Clustering]:
    """Cluster every compressed layer of a model that has one level of stored codes, in place.

    Call it between two steps of training. With `losses` the pass over the data runs the model as it is: call
    `model.eval()` before if dropout and statistics of batches shall rest, and hand over the model inside of a DDP
    or compiled wrapper.

    Args:
        model: changed in place: pointers, codebooks and, where there are helpers, their hash.
        losses: begins a pass over the training data, or a sample of it, and yields for each batch the losses of
            its examples, not reduced; makes the clustering gradient-informed. None for the paper's.
        counts: how often each id is used, (N,) by the layer's name; those of the pass, where None.
        optimizer: of the codebooks.
        optimizer_state: "reset" to forget what the optimizer holds for codebooks, whose codewords are all made
            anew; "keep" to leave it.
        options: see `ClusterOptions`.
        progress: told of the work.

    Returns:
        One entry for each layer.

    Raises:
        TableNotFoundError: no such layer.
        SpecError: options that contradict each other, reduced losses, or a layer that no gradient reached; the
            model is as it was.
        ShapeError: counts that do not fit a layer.
        NonFiniteError: codebooks or gradients with NaN or infinity; the model is as it was.
    """
    options, progress = options or ClusterOptions(), progress or Silent()
    if optimizer_state not in ("reset", "keep"):
        raise SpecError(f"optimizer_state is {optimizer_state!r}: give 'reset' or 'keep'")
    if losses is not None and not callable(losses):
        raise SpecError(f"losses is a {type(losses).__name__}: give a function that begins a pass over the data")
    layers = clusterable_layers(model)
    if not layers:
        raise TableNotFoundError(_nothing_to_cluster(model))
    weights = _check_counts(layers, counts or {})
    informed = losses is not None
    jobs = [_Job.begin(name, layer, weights.get(name), options, informed) for name, layer in layers.items()]
    for group in _groups(jobs, options.buffer_bytes if losses else None):
        sums: dict[TableLayer, RowGradients] = {}
        if losses is not None:
            S = {job.name: job.spec.sub_dim for job in group}
            sums = {
                job.layer: RowGradients.zeros(job.layer, slice(c.start * S[job.name], c.stop * S[job.name]))
                for job, c in group.items()
            }
            progress.start("summing gradients", 0, "batches")
            with observed(sums):
                backpropagate(model, losses, progress.advance)
        progress.start("clustering", sum(map(len, group.values())), "columns")
        for job, columns in group.items():
            found = sums.get(job.layer)
            if found is not None and not found.counts.any():
                raise SpecError(
                    f"no gradient reached {job.name!r}: the losses do not depend on it, or a compiled or traced "
                    "copy of the model made them"
                )
            if found is not None and job.moments is not None:
                job.prior = Prior.estimate(job.moments, found.fisher, options.tau)
            for column in columns:
                job.cluster_column(column, found)
                progress.advance()
    return [job.finish(optimizer if optimizer_state == "reset" else None) for job in jobs]


def clusterable_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Layers with one level of stored codes, each table once, by the name of the layer in the model."""
    layers: dict[str, TableLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, TableLayer) and module.owner not in layers.values():
            spec = module.spec
            if isinstance(spec, CodebookSpec) and _is_clusterable(spec):
                layers[name] = module.owner
    return layers


def _nothing_to_cluster(model: nn.Module) -> str:
    others = [
        f"{name!r} is {module.spec.method} {module.spec.layout}"
        for name, module in model.named_modules()
        if isinstance(module, TableLayer)
    ]
    found = f" ({'; '.join(others)})" if others else ""
    return (
        f"{type(model).__name__} has no layer with one level of stored codes{found}: make it with CQREmbedding "
        "or load a table that was compressed with pq, or with cqr and a helper that is random or none"
    )


def _is_clusterable(spec: CodebookSpec) -> bool:
    return spec.num_stored_levels == 1 and set(spec.code_sources) <= {STORED, HASHED}


def _check_counts(layers: Mapping[str, TableLayer], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if unknown := sorted(set(counts) - set(layers)):
        raise TableNotFoundError(
            f"counts name {', '.join(map(repr, unknown))}, and the layers are {sorted(layers)}"
        )
    for name, count in counts.items():
        N = layers[name].num_embeddings
        count = count.double()
        if count.shape != (N,) or not bool(((count >= 0) & count.isfinite()).all()) or not bool(count.any()):
            raise ShapeError(
                f"counts of {name!r} are {tuple(count.shape)}: give ({N},) finite numbers of at least 0, "
                "not all of them 0"
            )
    return {name: count.float() for name, count in counts.items()}


def _groups(jobs: list[_Job], buffer_bytes: int | None) -> Iterator[dict[_Job, range]]:
    """Split the columns of all layers into groups whose gradients fit the buffer; at least one column each."""
    group: dict[_Job, range] = {}
    free = buffer_bytes or 0
    for job in jobs:
        start = 0
        for column in range(job.spec.num_columns):
            need = 4 * job.spec.num_embeddings * job.spec.sub_dim
            if buffer_bytes is not None and need > free and group:
                yield group
                group, free, start = {}, buffer_bytes, column
            free -= need
            group[job] = range(start, column + 1)
    yield group


@dataclass(eq=False)
class _Job:
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
    ) -> _Job:
        spec, tensors = layer.spec, layer.table_tensors()
        assert isinstance(spec, CodebookSpec)
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

    @torch.no_grad()
    def cluster_column(self, column: int, gradients: RowGradients | None) -> None:
        """Find the centroids of a column, and each id's."""
        K = self.spec.codebook_size
        weights = self.weights
        if weights is None and gradients is not None:
            weights = gradients.counts
        points = torch.cat([self.targets(ids, column, gradients) for ids in self.id_blocks(self.sample)]).cpu()
        if not points.isfinite().all():
            where = "codebooks" if gradients is None or gradients.gradient.isfinite().all() else "gradients"
            raise NonFiniteError(
                f"the {where} of layer {self.name!r} have NaN or infinity: training diverged, or a loss was not "
                "finite. The model is as it was"
            )
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
