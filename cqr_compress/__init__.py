"""Make trained models small by compressing their embedding tables.

import cqr_compress as cqr
cqr.convert("ckpt.pt", "small.safetensors", cqr.Request(ratio=16))
cqr.load_compressed(model, "small.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cqr_compress.clustering import ClusterOptions as ClusterOptions
    from cqr_compress.clustering import ClusterSchedule as ClusterSchedule
    from cqr_compress.clustering import CQREmbedding as CQREmbedding
    from cqr_compress.clustering import CQREmbeddingBag as CQREmbeddingBag
    from cqr_compress.clustering import cluster_ as cluster_
    from cqr_compress.conversion import convert as convert
    from cqr_compress.dense import export as export
    from cqr_compress.dense import load_dense as load_dense
    from cqr_compress.errors import CqrCompressError as CqrCompressError
    from cqr_compress.evaluation import evaluate as evaluate
    from cqr_compress.inspection import inspect_file as inspect_file
    from cqr_compress.live import compress_ as compress_
    from cqr_compress.loading import load_compressed as load_compressed
    from cqr_compress.loading import parameters_on_meta as parameters_on_meta
    from cqr_compress.nn import CompressedEmbedding as CompressedEmbedding
    from cqr_compress.nn import CompressedEmbeddingBag as CompressedEmbeddingBag
    from cqr_compress.progress import PrintProgress as PrintProgress
    from cqr_compress.refitting import refit as refit
    from cqr_compress.request import Request as Request
    from cqr_compress.saving import save_compressed as save_compressed
    from cqr_compress.sketches import sketch_table as sketch_table
    from cqr_compress.swap import decompress_ as decompress_
    from cqr_compress.swap import swap_embeddings_ as swap_embeddings_
    from cqr_compress.table import CompressedTable as CompressedTable
    from cqr_compress.tuning import FinetuneOptions as FinetuneOptions
    from cqr_compress.tuning import Task as Task
    from cqr_compress.tuning import TuningReport as TuningReport
    from cqr_compress.tuning import finetune as finetune

_PUBLIC = {
    "CQREmbedding": "clustering",
    "CQREmbeddingBag": "clustering",
    "ClusterOptions": "clustering",
    "ClusterSchedule": "clustering",
    "CompressedEmbedding": "nn",
    "CompressedEmbeddingBag": "nn",
    "CompressedTable": "table",
    "CqrCompressError": "errors",
    "FinetuneOptions": "tuning",
    "PrintProgress": "progress",
    "Request": "request",
    "Task": "tuning",
    "TuningReport": "tuning",
    "cluster_": "clustering",
    "compress_": "live",
    "convert": "conversion",
    "decompress_": "swap",
    "evaluate": "evaluation",
    "export": "dense",
    "finetune": "tuning",
    "inspect_file": "inspection",
    "load_compressed": "loading",
    "load_dense": "dense",
    "parameters_on_meta": "loading",
    "refit": "refitting",
    "save_compressed": "saving",
    "sketch_table": "sketches",
    "swap_embeddings_": "swap",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing the package is quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
