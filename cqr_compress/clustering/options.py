"""Options and result of a clustering."""

from __future__ import annotations

from dataclasses import dataclass

from cqr_compress.option_fields import check_fields, documented, option
from cqr_compress.table.blocks import BLOCK_BYTES

_PANEL = "Clustering"


@documented
@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options of a clustering; the defaults were tuned empirically.

    The Newton step of a row ignores its interaction with other rows: if an example looks up rows of many tables,
    such as the 26 of DLRM on Criteo, a step_size of 0.1 is better.
    """

    step_size: float = option(
        0.3, "Step size of the damped Newton step toward the rows' targets.", panel=_PANEL, above=0
    )
    prior_weight: float = option(2.0, "Weight of the Gaussian prior in the Newton step.", panel=_PANEL, above=0)
    weighted: bool = option(True, "Weight ids by their frequency in k-means, if known.", panel=_PANEL)
    iterations: int = option(20, "Iterations of k-means.", panel=_PANEL, low=1)
    points_per_centroid: int = option(256, "Ids sampled for each centroid.", panel=_PANEL, low=1)
    block_bytes: int = option(
        BLOCK_BYTES, "Working memory of a block of rows; results do not depend on it.", panel=_PANEL, low=1
    )
    buffer_bytes: int = option(
        2 * 2**30,
        "Memory for gradients; tables that need more are processed in several passes over the data.",
        panel=_PANEL,
        low=1,
    )
    skip_unreached: bool = option(
        False,
        "Skip layers that no gradient reaches, with a warning instead of an error.",
        panel=_PANEL,
    )
    seed: int = option(0, "Random seed of samples, k-means and helper hashes.", panel=_PANEL)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Clustering:
    """Result of clustering one layer.

    Attributes:
        name: name of the layer in the model.
        moved: share of ids whose pointer changed in at least one column.
        relative_error: squared distance of the ids' targets to their centroids / squared norm of the targets.
        dead_codewords: number of codewords that no pointer uses, over all columns.
    """

    name: str
    moved: float
    relative_error: float
    dead_codewords: int
