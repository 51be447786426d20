"""What is asked of a clustering, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from cqr_compress.option_fields import check_fields, documented, option
from cqr_compress.table.blocks import BLOCK_BYTES

_PANEL = "Clustering"


@documented
@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How a clustering is done; the defaults were chosen by measurement.

    Rows step as if all others stayed: where an example meets rows of many tables, such as the 26 of DLRM on
        Criteo,
    a step_size of 0.1 is better.
    """

    step_size: float = option(0.3, "Part of a damped Newton step that rows take.", panel=_PANEL, above=0)
    prior_weight: float = option(2.0, "Weight of the Gaussian prior in that step.", panel=_PANEL, above=0)
    weighted: bool = option(True, "Weight ids by how often they occur, where that is known.", panel=_PANEL)
    iterations: int = option(20, "Iterations of k-means.", panel=_PANEL, low=1)
    points_per_centroid: int = option(256, "Ids sampled for each centroid.", panel=_PANEL, low=1)
    block_bytes: int = option(
        BLOCK_BYTES, "Working memory of a block of rows; results do not depend on it.", panel=_PANEL, low=1
    )
    buffer_bytes: int = option(
        2 * 2**30,
        "Memory for gradients; more passes over the data are made where a table needs more.",
        panel=_PANEL,
        low=1,
    )
    skip_unreached: bool = option(
        False,
        "Leave layers that no gradient reaches as they are, with a warning, instead of an error.",
        panel=_PANEL,
    )
    seed: int = option(0, "Seed of samples, k-means and helper hashes.", panel=_PANEL)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Clustering:
    """What one clustering did to one layer.

    Attributes:
        name: of the layer in the model.
        moved: share of ids that point elsewhere in at least one column.
        relative_error: squared distance of the ids' targets to their centroids / that of the targets to zero.
        dead_codewords: codewords to which no id points, all columns together.
    """

    name: str
    moved: float
    relative_error: float
    dead_codewords: int
