"""What is asked of a clustering, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from cqr_compress.errors import SpecError
from cqr_compress.table.blocks import BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How a clustering is done; the defaults were chosen by measurement.

    Attributes:
        eta: damping of the Newton step, with gradients. Rows step as if others rested: where an example meets rows
            of many tables, such as the 26 of DLRM on Criteo, 0.1 is better.
        tau: weight of the prior in it.
        weighted: weigh ids by how often they occur, where that is known.
        iterations: of k-means.
        points_per_centroid: ids that are sampled for each centroid.
        block_bytes: working memory of a block of rows; results do not depend on it.
        buffer_bytes: memory for gradients; more passes over the data are made where a table needs more.
        skip_unreached: whether layers that no gradient reaches stay as they are, with a warning, instead of an
            error.
        seed: of samples, k-means and helper hashes; drawn anew for each clustering of a layer.
    """

    eta: float = 0.3
    tau: float = 2.0
    weighted: bool = True
    iterations: int = 20
    points_per_centroid: int = 256
    block_bytes: int = BLOCK_BYTES
    buffer_bytes: int = 2 * 2**30
    skip_unreached: bool = False
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
