"""Exported to ONNX, models with compressed layers give torch's outputs in onnxruntime, for batches of any size."""

import io
import json
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_nn import IDS, SPECS, D, codebook_spec, random_table
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding, CompressedEmbeddingBag, CompressedTable
from cqr_compress.checkpoint.header import METADATA_KEY
from cqr_compress.commands.export_onnx import export_onnx
from cqr_compress.errors import TableNotFoundError
from cqr_compress.table.bitpack import packed_width, unpack_codes
from cqr_compress.table.spec import DIGIT, STORED, RowwiseSpec

pytest.importorskip("onnxscript", reason="torch exports to ONNX with onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported files")
if not hasattr(torch.compiler, "is_exporting"):
    pytest.skip("the exporter of torch before 2.7 lacks operations", allow_module_level=True)

ANY = torch.export.Dim.DYNAMIC
MORE = IDS.flip(0).repeat(7, 3)  # ids of another shape than those of the export
LAYOUTS = SPECS | {
    "one_kept": codebook_spec(num_kept_rows=1),
    "rank_kept": codebook_spec(
        rotation="pca", rank=6, num_levels=2, code_sources=(STORED,) * 2, num_kept_rows=3, num_zero_rows=2
    ),
    "digits": codebook_spec(code_sources=(DIGIT,)),
    "int4_odd": RowwiseSpec(method="int4", num_embeddings=300, embedding_dim=11, n_bits=4),
    "float64": codebook_spec(codebook_dtype="float64", dtype="float64"),
    "bfloat16": codebook_spec(codebook_dtype="bfloat16"),
    "half": codebook_spec(dtype="float16", num_levels=2, code_sources=(STORED,) * 2),
}  # fmt: skip
SCORED = ("rank_kept", "one_zero", "cqr", "int4")  # each branch of the search


def tables(names: Iterable[str]) -> dict[str, CompressedTable]:
    return {f"of_{name}": random_table(LAYOUTS[name]) for name in names}


def export(model: nn.Module, example: tuple[Tensor, ...], varying: Any, *, optimize: bool = False) -> bytes:
    """Export a model; `varying` has the varying dimensions of each argument.

    The optimization, torch's default, takes a third of the time: a few tests, and what commands export, go through it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch and onnxscript warn of their own code
        program = torch.onnx.export(
            model, example, dynamo=True, dynamic_shapes=varying, verbose=False, optimize=optimize
        )
        program.save(file)
    return file.getvalue()


def run(file: bytes, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    fed = dict(zip(names, (each.numpy() for each in inputs), strict=True))
    return [torch.from_numpy(each) for each in session.run(None, fed)]


def assert_same(model: nn.Module, file: bytes, *inputs: Tensor) -> None:
    """Compare each named output; sums of a few codewords differ by the order of the additions."""
    with torch.no_grad():
        wanted: dict[str, Tensor] = model(*inputs)
    for (name, rows), found in zip(wanted.items(), run(file, *inputs), strict=True):
        assert found.dtype == rows.dtype and found.shape == rows.shape, name
        tolerance = (1e-3 if rows.dtype == torch.float16 else 1e-6) * max(1.0, float(rows.abs().max()))
        assert torch.allclose(found, rows, rtol=0, atol=tolerance), name


class Codes(nn.Module):
    """Unpacks codes of all widths."""

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        widths = {n: packed_width(5, n) for n in range(1, 17)}
        return {f"{n} bits": unpack_codes(rows[:, :width], 5, n).int() for n, width in widths.items()}


def test_codes_of_all_widths() -> None:
    rows = torch.randint(256, (50, packed_width(5, 16)), dtype=torch.uint8)
    file = export(Codes(), (rows[:3],), ({0: ANY},))
    assert_same(Codes(), file, rows)


class Lookups(nn.Module):
    """Looks the same ids up in several tables."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: CompressedEmbedding(table) for name, table in tables(names).items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: layer(ids) for name, layer in self.layers.items()}


def test_lookups_of_all_layouts() -> None:
    model = Lookups(LAYOUTS)
    file = export(model, (IDS,), ({0: ANY, 1: ANY},))
    assert_same(model, file, IDS)
    assert_same(model, file, MORE)


def test_lookups_of_int32_ids() -> None:
    model = Lookups(["rank_kept", "hash", "digits", "int4"])
    assert_same(model, export(model, (IDS.int(),), ({0: ANY, 1: ANY},), optimize=True), MORE.int())


class Products(nn.Module):
    """Multiplies queries with all rows in the ways of an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: CompressedEmbedding(t) for n, t in tables(SCORED).items()})

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, layer in self.layers.items():
            out[f"{name}: scores"] = layer.scores(h)
            out[f"{name}: product with the weight"] = F.linear(h, layer.weight)
            out[f"{name}: values of topk"] = layer.topk(h, 3).values
        return out


def test_products_with_all_rows() -> None:
    model = Products()
    file = export(model, (torch.randn(4, D),), ({0: ANY},))
    assert_same(model, file, torch.randn(4, D))
    assert_same(model, file, torch.randn(150, D))  # more than a block of queries in eager mode


def test_topk_gives_the_ids_of_its_values() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CompressedEmbedding(random_table(SPECS["kept"]))

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = self.layer.topk(h, 4)
            return values, indices

    model, h = Best(), torch.randn(70, D)
    values, indices = run(export(model, (h[:4],), ({0: ANY},)), h)
    assert torch.allclose((h @ model.layer.decode().T).gather(1, indices), values, atol=1e-4)


class Bags(nn.Module):
    """Reduces bags in each mode, with and without a padding row and a last offset."""

    def __init__(self, *kinds: tuple[str, int | None, bool], layout: str = "kept") -> None:
        super().__init__()
        table = random_table(LAYOUTS[layout])
        self.layers = nn.ModuleDict(
            {
                f"{mode}_{padding_idx}_{last}": CompressedEmbeddingBag(
                    table, mode=mode, padding_idx=padding_idx, include_last_offset=last
                )
                for mode, padding_idx, last in kinds
            }
        )

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {name: layer(ids, offsets, weights) for name, layer in self.layers.items()}


def test_bags() -> None:
    model = Bags(
        ("sum", None, False), ("sum", 5, True), ("mean", 5, False), ("max", None, False), ("max", 5, False)
    )
    file = export(model, (IDS,), ({0: ANY, 1: ANY},))
    assert_same(model, file, IDS)
    assert_same(model, file, torch.cat([MORE, torch.full_like(MORE, 5)]))  # also bags of padding only


def test_bags_split_at_offsets() -> None:
    model = Bags(
        ("sum", None, False), ("sum", 5, True), ("mean", 5, False), ("max", None, True), ("max", 5, False)
    )
    file = export(model, (IDS.flatten(), torch.tensor([0, 2, 2, 12])), ({0: ANY}, {0: ANY}))
    assert_same(model, file, IDS.flatten(), torch.tensor([0, 2, 2, 12]))
    assert_same(model, file, MORE.flatten(), torch.tensor([0, 0, 5, 80, 80, MORE.numel()]))


def test_bags_in_half_precision() -> None:
    model = Bags(("sum", 5, False), ("mean", None, False), ("max", 5, False), layout="half")
    file = export(model, (IDS.flatten(), torch.tensor([0, 2, 2, 12])), ({0: ANY}, {0: ANY}))
    assert_same(model, file, IDS.flatten(), torch.tensor([0, 2, 2, 12]))


def test_bags_with_weights() -> None:
    model = Bags(("sum", 5, False))
    example = {"ids": IDS.flatten(), "offsets": torch.tensor([0, 2, 2, 7]), "weights": torch.rand(IDS.numel())}
    file = export(model, tuple(example.values()), ({0: ANY}, {0: ANY}, {0: ANY}))
    assert_same(model, file, MORE.flatten(), torch.tensor([0, 0, 5, 80]), torch.rand(MORE.numel()))


class Tied(nn.Module):
    """A language model's ends: an embedding and an output layer with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20_000, 32)
        self.out = nn.Linear(32, 20_000, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.embedding(ids))}


def test_an_onnx_file_is_about_as_large_as_the_compressed_file(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "model.pt")
    options: dict[str, Any] = {"method": "pq", "num_columns": 8, "n_bits": 6}
    with pytest.warns(cqr.CqrCompressWarning, match="shares its values"):
        report = cqr.convert(tmp_path / "model.pt", tmp_path / "small.safetensors", **options)
    model = Tied()
    cqr.load_compressed(model, tmp_path / "small.safetensors")
    file = export(model, (IDS,), ({0: ANY, 1: ANY},), optimize=True)
    assert_same(model, file, IDS)
    assert len(file) < 1.1 * report.file_bytes_after + 60_000  # the graph, and no decoded table of 2.5 MB


def test_a_table_to_export_is_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: CompressedEmbedding(random_table(SPECS["pq4"])) for name in "ab"})
    cqr.save_compressed(model, tmp_path / "two.safetensors")
    for name in (None, "", "c"):
        with pytest.raises(TableNotFoundError, match="a.weight, b.weight"):
            export_onnx(tmp_path / "two.safetensors", tmp_path / "m.onnx", table=name)
    with safe_open(tmp_path / "two.safetensors", "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata[METADATA_KEY]) | {"tables": {}}
    save_file({}, tmp_path / "none.safetensors", {METADATA_KEY: json.dumps(header)})
    with pytest.raises(TableNotFoundError, match="has no table"):
        export_onnx(tmp_path / "none.safetensors", tmp_path / "m.onnx")
