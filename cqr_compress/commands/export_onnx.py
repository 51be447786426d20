"""Export a compressed table to an ONNX model that holds its codes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.output_files import atomic_file, check_outputs
from cqr_compress.errors import CqrCompressError, SpecError, TableNotFoundError
from cqr_compress.nn.embedding import CompressedEmbedding
from cqr_compress.progress import Progress, shown


def export_onnx(
    source: str | Path,
    output: str | Path,
    *,
    table: str | None = None,
    topk: int | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write an ONNX model: ids (n,) int64 to rows (n, D); or, for retrieval, queries (n, D) to the best rows.

    With `topk`, outputs are `scores` (n, topk), the largest inner products, and `ids` (n, topk) int64.

    Args:
        source: a compressed file.
        output: the file to write.
        table: name of the table; None for the only one.
        topk: number of rows that are found for a query; None for lookups.
        force: replace an existing file.
        verify: whether to compare the tensors with the checksums in the file first.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Returns:
        Bytes of the written file.

    Raises:
        TableNotFoundError: no such table, or several without a name.
        SpecError: `topk` is more than the rows of the table.
        CqrCompressError: torch cannot export, see the message: it needs torch 2.7, onnx and onnxscript.
        OutputError: the file cannot be written.
    """
    output = Path(output)
    with shown(progress) as progress, open_checkpoint(source) as checkpoint:
        check_outputs([output], force, checkpoint.files)
        opened = CompressedFile.from_checkpoint(checkpoint)
        if verify:
            opened.verify()
        if not opened.specs:
            raise TableNotFoundError(f"{opened.name!r} has no table")
        if table is None and len(opened.specs) > 1:
            raise TableNotFoundError(
                f"{opened.name!r} has several tables: name one as --table: {', '.join(opened.specs)}"
            )
        name = next(iter(opened.specs)) if table is None else table
        if name not in opened.specs:
            raise TableNotFoundError(f"{opened.name!r} has no table {name!r}: it has {', '.join(opened.specs)}")
        layer = CompressedEmbedding(opened.table(name)).requires_grad_(False)
    N, D = layer.num_embeddings, layer.embedding_dim
    if topk is not None and not 1 <= topk <= N:
        raise SpecError(f"topk is {topk}: the table has {N} rows")
    dim = torch.export.Dim("n", min=1, max=2**31)
    progress.start(f"exporting {name}", 1, "tables")
    if topk is None:
        content = _exported(layer, torch.zeros(2, dtype=torch.int64, device="cpu"), dim, ["ids"], ["rows"])
    else:  # without optimization, which would decode all rows as a constant
        query = torch.zeros(2, D, dtype=layer.dtype, device="cpu")
        content = _exported(_Retrieval(layer, topk), query, dim, ["queries"], ["scores", "ids"], optimize=False)
    progress.advance()
    with atomic_file(output) as file:
        file.write(content)
    return output.stat().st_size


class _Retrieval(nn.Module):
    """The rows with the largest inner products with queries."""

    def __init__(self, layer: CompressedEmbedding, k: int) -> None:
        super().__init__()
        self.layer, self.k = layer, k

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Map queries (n, D) to scores and ids (n, k)."""
        scores, ids = torch.topk(queries @ self.layer.weight.T, self.k)
        return scores, ids


def _exported(
    model: nn.Module, example: Tensor, dim: Any, inputs: list[str], outputs: list[str], optimize: bool = True
) -> bytes:
    file, printed = io.BytesIO(), io.StringIO()
    try:
        with _only_errors(), warnings.catch_warnings(), contextlib.redirect_stdout(printed), torch.no_grad():
            warnings.simplefilter("ignore")  # torch and onnxscript warn of their own code
            program = torch.onnx.export(
                model.eval(), (example,), dynamo=True, dynamic_shapes=({0: dim},), input_names=inputs,
                output_names=outputs, verbose=False, optimize=optimize,
            )  # fmt: skip
            assert program is not None, "dynamo=True returns a program"
            program.save(file)  # type: ignore[arg-type]
            return _stripped(file.getvalue())
    except ImportError as e:
        raise CqrCompressError(f"export to ONNX needs other packages: pip install onnx onnxscript ({e})") from e
    except Exception as e:
        raise CqrCompressError(f"torch {torch.__version__} cannot export the table to ONNX: {e}") from e


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Leave out what torch logs of operations of other libraries that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stripped(content: bytes) -> bytes:
    """Remove the stack traces of each node, which can take more bytes than a small table."""
    import onnx

    model = onnx.load_from_string(content)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    return bytes(model.SerializeToString())
