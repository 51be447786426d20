"""Make trained models small by compressing their embedding tables.

import cqr_compress as cqr
cqr.convert("ckpt.pt", "small.safetensors", cqr.ConvertOptions(ratio=16))
cqr.load_compressed(model, "small.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cqr_compress._version import __version__

if TYPE_CHECKING:
    from cqr_compress.clustering.cluster import cluster_ as cluster_
    from cqr_compress.clustering.layers import CQREmbedding as CQREmbedding
    from cqr_compress.clustering.layers import CQREmbeddingBag as CQREmbeddingBag
    from cqr_compress.clustering.options import ClusterOptions as ClusterOptions
    from cqr_compress.clustering.schedule import ClusterSchedule as ClusterSchedule
    from cqr_compress.commands.convert import convert as convert
    from cqr_compress.commands.evaluate import evaluate as evaluate
    from cqr_compress.commands.export import export as export
    from cqr_compress.commands.export import load_dense_state_dict as load_dense_state_dict
    from cqr_compress.commands.finetune import finetune as finetune
    from cqr_compress.commands.inspect import inspect as inspect
    from cqr_compress.commands.refit import refit as refit
    from cqr_compress.errors import CqrCompressError as CqrCompressError
    from cqr_compress.finetuning.options import FinetuneOptions as FinetuneOptions
    from cqr_compress.finetuning.report import TuningReport as TuningReport
    from cqr_compress.finetuning.task import Task as Task
    from cqr_compress.model.compress import compress_ as compress_
    from cqr_compress.model.load import init_empty_weights as init_empty_weights
    from cqr_compress.model.load import load_compressed as load_compressed
    from cqr_compress.model.save import save_compressed as save_compressed
    from cqr_compress.model.swap import decompress_ as decompress_
    from cqr_compress.model.swap import swap_embeddings_ as swap_embeddings_
    from cqr_compress.nn.embedding import CompressedEmbedding as CompressedEmbedding
    from cqr_compress.nn.embedding import CompressedEmbeddingBag as CompressedEmbeddingBag
    from cqr_compress.progress import NoProgress as NoProgress
    from cqr_compress.progress import Progress as Progress
    from cqr_compress.progress import ProgressBars as ProgressBars
    from cqr_compress.quantize.options import ConvertOptions as ConvertOptions
    from cqr_compress.table.random_tables import sketch_table as sketch_table
    from cqr_compress.table.table import CompressedTable as CompressedTable

_PUBLIC = {
    "CQREmbedding": "clustering.layers",
    "CQREmbeddingBag": "clustering.layers",
    "ClusterOptions": "clustering.options",
    "ClusterSchedule": "clustering.schedule",
    "CompressedEmbedding": "nn.embedding",
    "CompressedEmbeddingBag": "nn.embedding",
    "CompressedTable": "table.table",
    "CqrCompressError": "errors",
    "FinetuneOptions": "finetuning.options",
    "NoProgress": "progress",
    "Progress": "progress",
    "ProgressBars": "progress",
    "ConvertOptions": "quantize.options",
    "Task": "finetuning.task",
    "TuningReport": "finetuning.report",
    "cluster_": "clustering.cluster",
    "compress_": "model.compress",
    "convert": "commands.convert",
    "decompress_": "model.swap",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "finetune": "commands.finetune",
    "inspect": "commands.inspect",
    "load_compressed": "model.load",
    "load_dense_state_dict": "commands.export",
    "init_empty_weights": "model.load",
    "refit": "commands.refit",
    "save_compressed": "model.save",
    "sketch_table": "table.random_tables",
    "swap_embeddings_": "model.swap",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing the package is quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
