"""Clustering the sketch: trainable layers whose ids are pointed anew while they train (arXiv:2210.05974)."""

from cqr_compress.clustering.cluster import cluster_
from cqr_compress.clustering.entropy import Entropies, pointer_entropies
from cqr_compress.clustering.layers import PRESETS, CQREmbedding, CQREmbeddingBag
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.clustering.schedule import ClusterSchedule

__all__ = [
    "PRESETS",
    "CQREmbedding",
    "CQREmbeddingBag",
    "ClusterOptions",
    "ClusterSchedule",
    "Clustering",
    "Entropies",
    "cluster_",
    "pointer_entropies",
]
