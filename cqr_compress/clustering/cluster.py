"""Clustering of a trained sketch: pointers are reassigned to the centroids of rows, or of targets of rows.

"Clustering the Sketch", arXiv:2210.05974, Algorithm 3: in each column, the rows of a sample of ids are clustered
with k-means, each id points to its nearest centroid, the centroids become the codebook, and the helper gets a new
hash function and zero codewords. Beyond the paper, the targets of a damped Newton step can be clustered in place
of the rows (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cqr_compress.clustering.cluster_layer import LayerClustering
from cqr_compress.clustering.gradient_passes import update_columns
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.errors import ShapeError, SpecError, TableNotFoundError
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import NoProgress, Progress
from cqr_compress.table.spec import HASHED, STORED, AnySpec, CodebookSpec


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

    Call it between two training steps. With `losses`, the pass over the data uses the model in its current mode:
    call `model.eval()` before to disable dropout and updates of batch statistics, and pass the module inside a DDP
    or compiled wrapper. If torch.distributed is initialized, each process calls this with the losses of its part
    of the data; gradients are summed over processes, the first process clusters, and its result is broadcast.

    Products of queries with rows (`layer.scores`, a tied output layer) use the gradient of each example; a lookup
    that the examples of a batch share uses the sum of their gradients, and counts as one lookup.

    Args:
        model: modified in place: pointers, codebooks and the hash function of helpers.
        losses: begins a pass over the training data, or a sample of it, and yields for each batch the unreduced
            losses of its examples, for gradient-informed clustering; None for the clustering of the paper.
        counts: counts of the ids, (N,) by the layer's name; if None, those of the pass.
        optimizer: optimizer of the codebooks.
        optimizer_state: "reset" to drop the optimizer's state of the codebooks, because all codewords are
            replaced; "keep" to keep it.
        options: see `ClusterOptions`.
        progress: receives the progress of the work.

    Returns:
        One result for each layer.

    Raises:
        TableNotFoundError: no layer has one level of stored codes, or `counts` names an unknown layer.
        SpecError: invalid arguments, reduced losses, or a layer that no gradient reached; the model is unchanged.
        ShapeError: counts that do not match a layer.
        NonFiniteError: codebooks or gradients with NaN or infinity; the model is unchanged.
    """
    options, progress = options or ClusterOptions(), progress or NoProgress()
    if optimizer_state not in ("reset", "keep"):
        raise SpecError(f"optimizer_state is {optimizer_state!r}: give 'reset' or 'keep'")
    if losses is not None and not callable(losses):
        raise SpecError(f"losses is a {type(losses).__name__}: give a function that begins a pass over the data")
    layers = clusterable_layers(model)
    if not layers:
        raise TableNotFoundError(_nothing_to_cluster(model))
    weights = _check_counts(layers, counts or {})
    gradient_informed = losses is not None
    updates = [
        LayerClustering.begin(name, layer, weights.get(name), options, gradient_informed)
        for name, layer in layers.items()
    ]
    done = update_columns(model, updates, losses, options.buffer_bytes, "clustering", progress)
    return [update.finish(optimizer if optimizer_state == "reset" else None) for update in done]


def clusterable_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Find the layers with one level of stored codes, each table once, by name in the model."""
    return layers_with(model, _is_clusterable)


def layers_with(model: nn.Module, wanted: Callable[[AnySpec], bool]) -> dict[str, TableLayer]:
    """Find the layers whose spec satisfies a predicate, each table once, by name in the model."""
    layers: dict[str, TableLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, TableLayer) and module.owner not in layers.values() and wanted(module.spec):
            layers[name] = module.owner
    return layers


def listed_layers(model: nn.Module) -> str:
    """List the compressed layers of a model, for an error message."""
    others = [
        f"{name!r} is {module.spec.method} {module.spec.layout}"
        for name, module in model.named_modules()
        if isinstance(module, TableLayer)
    ]
    return f" ({'; '.join(others)})" if others else ""


def _nothing_to_cluster(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no layer with one level of stored codes{listed_layers(model)}: build it with "
        "CQREmbedding, or load a table compressed with pq, or with cqr and helper hashed or none"
    )


def _is_clusterable(spec: AnySpec) -> bool:
    if not isinstance(spec, CodebookSpec):
        return False
    return spec.num_stored_levels == 1 and set(spec.code_sources) <= {STORED, HASHED}


def _check_counts(layers: Mapping[str, TableLayer], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if unknown := sorted(set(counts) - set(layers)):
        raise TableNotFoundError(
            f"counts has unknown layers {', '.join(map(repr, unknown))}: the layers are {sorted(layers)}"
        )
    for name, count in counts.items():
        N = layers[name].num_embeddings
        count = count.double()
        if count.shape != (N,) or not bool(((count >= 0) & count.isfinite()).all()) or not bool(count.any()):
            raise ShapeError(
                f"counts of {name!r} have shape {tuple(count.shape)}: give ({N},) finite numbers of at least 0, "
                "not all 0"
            )
    return {name: count.float() for name, count in counts.items()}
