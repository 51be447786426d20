"""One clustering of a trained sketch: ids are pointed anew to the centroids of where they are, or want to be.

"Clustering the Sketch", arXiv:2210.05974, Algorithm 3: in each column, k-means of the rows of a sample of ids;
every id then points to its nearest centroid, the centroids become the codebook, and the helper is hashed anew and
set to zero. Beyond the paper, ids can be clustered by where a Newton step would take their rows (`gradients`).
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
from cqr_compress.table.spec import HASHED, STORED, CodebookSpec


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
    or compiled wrapper. Where torch.distributed is set up, every process calls this with losses of its own part of
    the data; gradients are added up, the first process clusters, and all of them get its result.

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
    jobs = [
        LayerClustering.begin(name, layer, weights.get(name), options, gradient_informed)
        for name, layer in layers.items()
    ]
    done = update_columns(model, jobs, losses, options.buffer_bytes, "clustering", progress)
    return [job.finish(optimizer if optimizer_state == "reset" else None) for job in done]


def clusterable_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Layers with one level of stored codes, each table once, by the name of the layer in the model."""
    return codebook_layers(model, _is_clusterable)


def codebook_layers(model: nn.Module, wanted: Callable[[CodebookSpec], bool]) -> dict[str, TableLayer]:
    """Layers over codebooks whose spec is wanted, each table once, by the name of the layer in the model."""
    layers: dict[str, TableLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, TableLayer) and module.owner not in layers.values():
            spec = module.spec
            if isinstance(spec, CodebookSpec) and wanted(spec):
                layers[name] = module.owner
    return layers


def listed_layers(model: nn.Module) -> str:
    """The compressed layers that a model has, for a message."""
    others = [
        f"{name!r} is {module.spec.method} {module.spec.layout}"
        for name, module in model.named_modules()
        if isinstance(module, TableLayer)
    ]
    return f" ({'; '.join(others)})" if others else ""


def _nothing_to_cluster(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no layer with one level of stored codes{listed_layers(model)}: make it with "
        "CQREmbedding or load a table that was compressed with pq, or with cqr and a helper that is random or none"
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
