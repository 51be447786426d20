"""Tables in other runtimes: an index of faiss with the same codes, and ONNX files of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cqr_compress as cqr
from cqr_compress.cli.app import app
from cqr_compress.errors import SpecError, TableNotFoundError

N, D = 1200, 16
LAYOUTS: dict[str, dict[str, Any]] = {
    "pq8": {"method": "pq", "num_columns": 4, "n_bits": 8},
    "pq5": {"method": "pq", "num_columns": 8, "n_bits": 5},
    "opq": {"method": "pq", "num_columns": 4, "n_bits": 6, "rotation": "opq"},
    "pq_int8": {"method": "pq", "num_columns": 4, "n_bits": 6, "rotation": "opq", "codebook_dtype": "int8"},
    "pca_rank": {"method": "pq", "num_columns": 4, "n_bits": 6, "rotation": "pca", "rank": 8},
    "rq": {"method": "rq", "num_levels": 3, "n_bits": 8},
    "rq6": {"method": "rq", "num_levels": 5, "n_bits": 6},
    "prq": {"method": "prq", "num_columns": 2, "num_levels": 3, "n_bits": 5},
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"emb.weight": torch.randn(N, D) + 0.5}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def layer_of(table: Path, options: dict[str, Any]) -> cqr.CompressedEmbedding:
    small = table.with_name("small.safetensors")
    cqr.convert(table, small, force=True, **options)
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(N, D)})
    cqr.load_compressed(model, small)
    layer = model["emb"]
    assert isinstance(layer, cqr.CompressedEmbedding)
    return layer


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_index_of_faiss_finds_the_same_rows(table: Path, name: str, metric: str) -> None:
    layer = layer_of(table, LAYOUTS[name])
    if metric == "l2" and name == "pca_rank":
        with pytest.raises(SpecError, match="inner_product"):
            cqr.to_faiss(layer, metric)
        return
    index = cqr.to_faiss(layer, metric)
    rows = layer.decode().detach().float().numpy()
    assert index.ntotal == N and index.d == D
    queries = np.random.default_rng(0).normal(size=(20, D)).astype(np.float32)
    distances = np.square(queries[:, None] - rows).sum(2)
    wanted = -queries @ rows.T if metric == "inner_product" else distances
    values, ids = index.search(queries, 5)
    values = -values if metric == "inner_product" else values
    tolerance = 2e-2 if name == "pq_int8" else 2e-3  # rows of an int8 rotation are orthonormal to 1%
    assert np.allclose(values, np.take_along_axis(wanted, ids, 1), atol=tolerance, rtol=tolerance)
    assert np.allclose(values, np.sort(wanted, 1)[:, :5], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "trellis", "ratio": 6}, "no index for trellis"),
        ({"method": "int8"}, "no index for int8"),
        ({"method": "hash", "num_columns": 2, "codebook_size": 64}, "no index for hash"),
        ({"method": "pq", "num_columns": 4, "n_bits": 6, "exact_rows": (0,)}, "1 rows that are stored apart"),
    ],
)
def test_what_faiss_has_not_is_refused(table: Path, options: dict[str, Any], wanted: str) -> None:
    if options["method"] == "hash":
        layer: Any = cqr.CompressedEmbedding(cqr.sketch_table("hash", N, D, codebook_size=64))
    else:
        layer = layer_of(table, options)
    with pytest.raises(SpecError, match=wanted):
        cqr.to_faiss(layer)


def test_an_unknown_metric_is_refused(table: Path) -> None:
    with pytest.raises(SpecError, match="metric is 'cosine'"):
        cqr.to_faiss(layer_of(table, LAYOUTS["pq8"]), "cosine")


@pytest.mark.parametrize("name", ["pq5", "trellis"])
def test_the_command_writes_onnx_files(table: Path, tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("the exporter of torch before 2.7 lacks operations")
    layer = layer_of(table, LAYOUTS.get(name, {"method": "trellis", "ratio": 5}))
    small = str(table.with_name("small.safetensors"))
    for output, more in (("rows.onnx", []), ("best.onnx", ["--topk", "7"])):
        done = CliRunner().invoke(app, ["export", small, "-o", str(tmp_path / output), *more])
        assert done.exit_code == 0, done.output
    session = onnxruntime.InferenceSession(str(tmp_path / "rows.onnx"))
    ids = np.array([3, 1, 4, 1, 5, 1199])
    (rows,) = session.run(["rows"], {"ids": ids})
    assert np.allclose(rows, layer(torch.from_numpy(ids)).detach().numpy(), atol=1e-5)
    queries = torch.randn(9, D)
    scores, found = onnxruntime.InferenceSession(str(tmp_path / "best.onnx")).run(
        None, {"queries": queries.numpy()}
    )
    wanted = torch.topk(queries @ layer.decode().detach().T, 7)
    assert (
        np.allclose(scores, wanted.values.numpy(), atol=1e-4) and (found == wanted.indices.numpy()).mean() > 0.95
    )
    assert (tmp_path / "rows.onnx").stat().st_size < (N * D * 4) // 2
    assert (tmp_path / "best.onnx").stat().st_size < N * D * 4  # a larger graph, and no decoded table


def test_onnx_needs_one_table_and_rows_enough(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(N, D), "b.weight": torch.randn(N, D)}, tmp_path / "a.pt")
    cqr.convert(tmp_path / "a.pt", tmp_path / "small.safetensors", method="int8", tables=["*"])
    with pytest.raises(TableNotFoundError, match="several tables: name one as --table: a.weight, b.weight"):
        cqr.export_onnx(tmp_path / "small.safetensors", tmp_path / "m.onnx")
    with pytest.raises(TableNotFoundError, match="no table 'c'"):
        cqr.export_onnx(tmp_path / "small.safetensors", tmp_path / "m.onnx", table="c")
    with pytest.raises(SpecError, match="topk is 5000"):
        cqr.export_onnx(tmp_path / "small.safetensors", tmp_path / "m.onnx", table="a.weight", topk=5000)
    refused = CliRunner().invoke(
        app, ["export", str(tmp_path / "small.safetensors"), "-o", str(tmp_path / "a.bin"), "--topk", "3"]
    )
    assert refused.exit_code == 2 and "--topk are for an .onnx output" in " ".join(refused.output.split())
