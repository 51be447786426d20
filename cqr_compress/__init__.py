"""Compress the embedding tables of trained models.

import cqr_compress as cqr
cqr.convert("ckpt.pt", "small.safetensors", ratio=16)
cqr.load_compressed(model, "small.safetensors")
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cqr_compress._version import __version__
from cqr_compress.integrations.after_import import after_import

if TYPE_CHECKING:
    from cqr_compress.checkpoint.size_report import SizeReport as SizeReport
    from cqr_compress.checkpoint.size_report import TableReport as TableReport
    from cqr_compress.clustering.cluster import cluster_ as cluster_
    from cqr_compress.clustering.entropy import Entropies as Entropies
    from cqr_compress.clustering.layers import CQREmbedding as CQREmbedding
    from cqr_compress.clustering.layers import CQREmbeddingBag as CQREmbeddingBag
    from cqr_compress.clustering.options import Clustering as Clustering
    from cqr_compress.clustering.options import ClusterOptions as ClusterOptions
    from cqr_compress.clustering.schedule import ClusterSchedule as ClusterSchedule
    from cqr_compress.commands.convert import convert as convert
    from cqr_compress.commands.convert_folder import FolderReport as FolderReport
    from cqr_compress.commands.convert_folder import convert_folder as convert_folder
    from cqr_compress.commands.evaluate import EvaluationReport as EvaluationReport
    from cqr_compress.commands.evaluate import evaluate as evaluate
    from cqr_compress.commands.export import export as export
    from cqr_compress.commands.export import load_dense_state_dict as load_dense_state_dict
    from cqr_compress.commands.export_onnx import export_onnx as export_onnx
    from cqr_compress.commands.finetune import finetune as finetune
    from cqr_compress.commands.inspect import DenseReport as DenseReport
    from cqr_compress.commands.inspect import DenseTable as DenseTable
    from cqr_compress.commands.inspect import inspect as inspect
    from cqr_compress.commands.page import write_page as write_page
    from cqr_compress.commands.refit import refit as refit
    from cqr_compress.commands.sweep import sweep as sweep
    from cqr_compress.commands.sweep_report import SweepPoint as SweepPoint
    from cqr_compress.commands.sweep_report import SweepReport as SweepReport
    from cqr_compress.errors import CqrCompressError as CqrCompressError
    from cqr_compress.errors import CqrCompressWarning as CqrCompressWarning
    from cqr_compress.finetuning.early_stopping import Evaluation as Evaluation
    from cqr_compress.finetuning.options import FinetuneOptions as FinetuneOptions
    from cqr_compress.finetuning.report import TuningReport as TuningReport
    from cqr_compress.finetuning.task import Task as Task
    from cqr_compress.model.compress import CompressedLayer as CompressedLayer
    from cqr_compress.model.compress import compress_ as compress_
    from cqr_compress.model.empty_weights import init_empty_weights as init_empty_weights
    from cqr_compress.model.load import LoadReport as LoadReport
    from cqr_compress.model.load import load_compressed as load_compressed
    from cqr_compress.model.save import save_compressed as save_compressed
    from cqr_compress.model.swap import decompress_ as decompress_
    from cqr_compress.model.swap import swap_embeddings_ as swap_embeddings_
    from cqr_compress.nn.embedding import CompressedEmbedding as CompressedEmbedding
    from cqr_compress.nn.embedding import CompressedEmbeddingBag as CompressedEmbeddingBag
    from cqr_compress.nn.search import TopK as TopK
    from cqr_compress.progress import NoProgress as NoProgress
    from cqr_compress.progress import Progress as Progress
    from cqr_compress.progress import ProgressBars as ProgressBars
    from cqr_compress.quantize.faiss_index import to_faiss as to_faiss
    from cqr_compress.quantize.options import ConvertOptions as ConvertOptions
    from cqr_compress.table.quality import Quality as Quality
    from cqr_compress.table.random_tables import sketch_table as sketch_table
    from cqr_compress.table.spec import CodebookSpec as CodebookSpec
    from cqr_compress.table.spec import RowwiseSpec as RowwiseSpec
    from cqr_compress.table.table import CompressedTable as CompressedTable
    from cqr_compress.vectors.word_vectors import WordVectors as WordVectors
    from cqr_compress.vectors.word_vectors import load_vectors as load_vectors

_HOMES = {
    "checkpoint.size_report": ("SizeReport", "TableReport"),
    "clustering.cluster": ("cluster_",),
    "clustering.entropy": ("Entropies",),
    "clustering.layers": ("CQREmbedding", "CQREmbeddingBag"),
    "clustering.options": ("ClusterOptions", "Clustering"),
    "clustering.schedule": ("ClusterSchedule",),
    "commands.convert": ("convert",),
    "commands.convert_folder": ("FolderReport", "convert_folder"),
    "commands.evaluate": ("EvaluationReport", "evaluate"),
    "commands.export": ("export", "load_dense_state_dict"),
    "commands.export_onnx": ("export_onnx",),
    "commands.finetune": ("finetune",),
    "commands.inspect": ("DenseReport", "DenseTable", "inspect"),
    "commands.page": ("write_page",),
    "commands.refit": ("refit",),
    "commands.sweep": ("sweep",),
    "commands.sweep_report": ("SweepPoint", "SweepReport"),
    "errors": ("CqrCompressError", "CqrCompressWarning"),
    "finetuning.early_stopping": ("Evaluation",),
    "finetuning.options": ("FinetuneOptions",),
    "finetuning.report": ("TuningReport",),
    "finetuning.task": ("Task",),
    "model.compress": ("CompressedLayer", "compress_"),
    "model.empty_weights": ("init_empty_weights",),
    "model.load": ("LoadReport", "load_compressed"),
    "model.save": ("save_compressed",),
    "model.swap": ("decompress_", "swap_embeddings_"),
    "nn.embedding": ("CompressedEmbedding", "CompressedEmbeddingBag"),
    "nn.search": ("TopK",),
    "progress": ("NoProgress", "Progress", "ProgressBars"),
    "quantize.faiss_index": ("to_faiss",),
    "quantize.options": ("ConvertOptions",),
    "table.quality": ("Quality",),
    "table.random_tables": ("sketch_table",),
    "table.spec": ("CodebookSpec", "RowwiseSpec"),
    "table.table": ("CompressedTable",),
    "vectors.word_vectors": ("WordVectors", "load_vectors"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME_OF)]


def _extend_static_embedding(module: str) -> None:
    import_module(f"{__name__}.integrations.static_embedding").extend(module)


after_import(
    "transformers.quantizers.auto", lambda: import_module(f"{__name__}.integrations.transformers_quantizer")
)
for _module in ("sentence_transformer.modules.static_embedding", "models.StaticEmbedding"):
    after_import(
        f"sentence_transformers.{_module}", partial(_extend_static_embedding, f"sentence_transformers.{_module}")
    )


if not TYPE_CHECKING:  # for type checkers, other names are errors

    def __getattr__(name: str) -> Any:
        """Import a public name on first access, which keeps the import of the package fast."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return __all__
