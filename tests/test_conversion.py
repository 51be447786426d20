import json
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cqr_compress as cqr
from cqr_compress.checkpoint import streaming_writer as writer
from cqr_compress.checkpoint.checksums import CHECKSUMS_KEY
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import (
    BudgetError,
    CheckpointError,
    CqrCompressWarning,
    FormatError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    ShapeError,
    SpecError,
    TableNotFoundError,
    TableRefusedError,
    VerificationError,
)

State = dict[str, torch.Tensor]
PQ: dict[str, Any] = {"method": "pq", "num_columns": 4, "n_bits": 4}
"""A layout without a search, where any will do."""
REQUESTS = {
    "auto": cqr.ConvertOptions(ratio=8, effort="fast"),
    "pq": cqr.ConvertOptions(method="pq", ratio=8),
    "pq opq": cqr.ConvertOptions(method="pq", num_columns=4, n_bits=6, rotation="opq"),
    "pq rank": cqr.ConvertOptions(method="pq", num_columns=4, n_bits=6, rotation="pca", rank=8),
    "rq rank": cqr.ConvertOptions(method="rq", ratio=8, rotation="opq", rank="auto", effort="fast"),
    "rq": cqr.ConvertOptions(method="rq", num_levels=3, n_bits=5),
    "prq": cqr.ConvertOptions(method="prq", ratio=8, num_columns=2, effort="fast"),
    "int8": cqr.ConvertOptions(method="int8"),
    "int4": cqr.ConvertOptions(method="int4", codebook_dtype="float32"),
    "hash": cqr.ConvertOptions(method="hash", ratio=8),
    "qr": cqr.ConvertOptions(method="qr", ratio=8),
    "cqr": cqr.ConvertOptions(method="cqr", ratio=8, effort="fast"),
    "cqr random": cqr.ConvertOptions(method="cqr", num_columns=4, n_bits=5),
    "cqr fitted": cqr.ConvertOptions(method="cqr", ratio=8, helper="stored", effort="fast"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_predicted_bytes_are_the_bytes_on_disk(tmp_path: Path, few_rows: Path, name: str) -> None:
    out = tmp_path / "small.safetensors"
    plan = cqr.convert(few_rows, out, REQUESTS[name], dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]
    report = cqr.convert(few_rows, out, REQUESTS[name])
    assert plan.file_bytes_after == report.file_bytes_after == out.stat().st_size
    assert [t.bytes_after for t in plan.tables] == [t.bytes_after for t in report.tables]
    with safe_open(out, "pt") as file:
        for table in report.tables:
            stem = table.name.removesuffix(".weight")
            stored = [file.get_tensor(key) for key in file.keys() if key.startswith(stem)]  # noqa: SIM118
            assert sum(tensor.nbytes for tensor in stored) == table.bytes_after
    ratio = REQUESTS[name].ratio
    assert ratio is None or all(table.ratio_bytes >= ratio for table in report.tables)


@pytest.mark.parametrize("name", REQUESTS)
def test_export_restores_everything_but_the_tables_bit_for_bit(tmp_path: Path, few_rows: Path, name: str) -> None:
    model_state = torch.load(few_rows, weights_only=True)
    report = cqr.convert(few_rows, tmp_path / "small.safetensors", REQUESTS[name])
    cqr.export(tmp_path / "small.safetensors", tmp_path / "dense.pt")
    dense = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert list(dense) == list(model_state)
    for table in report.tables:
        source, decoded = model_state[table.name], dense.pop(table.name)
        assert decoded.dtype == source.dtype and decoded.shape == source.shape
        measured = float((source - decoded).square().sum() / source.square().sum())
        assert measured == pytest.approx(table.relative_mse, rel=1e-3)
    assert all(torch.equal(dense[key], model_state[key]) for key in dense)


def test_the_files_metadata_tells_the_whole_report(tmp_path: Path, ckpt: Path) -> None:
    report = cqr.convert(ckpt, tmp_path / "small.safetensors", effort="fast")
    assert cqr.inspect(tmp_path / "small.safetensors").to_json() == report.to_json()
    saved = json.loads((tmp_path / "small.report.json").read_text())
    assert saved["schema_version"] == 2 and saved["tables"][0]["name"] == "item_embedding.weight"
    assert cqr.inspect(tmp_path / "small.report.json") == report
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["pq", "int8"])
def test_the_sources_dtype_comes_back(
    tmp_path: Path, table: torch.Tensor, dtype: torch.dtype, method: str
) -> None:
    save_file({"emb.weight": table.to(dtype)}, tmp_path / "m.safetensors")
    report = cqr.convert(tmp_path / "m.safetensors", tmp_path / "s.safetensors", cqr.ConvertOptions(method=method))
    decoded = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["emb.weight"]
    assert decoded.dtype == dtype
    assert report.tables[0].bytes_before == table.numel() * dtype.itemsize
    assert float((decoded.float() - table).square().sum() / table.square().sum()) < 0.2


def test_nesting_plain_values_and_shared_tensors_come_back(tmp_path: Path, table: torch.Tensor) -> None:
    content = {
        "epoch": 3, "name": "run", "lr": [0.1, None, (True, "x")],
        "model": OrderedDict({"lm_head.weight": table, "wte.weight": table, 3: table[:2].clone()}),
        "optimizer": {"state": {0: {"exp_avg": table.clone()}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
    torch.save(content, tmp_path / "m.pt")
    with pytest.warns(CqrCompressWarning, match="'lm_head.weight' shares its values with 'wte.weight'"):
        report = cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", **PQ)
    assert report.optimizer_bytes == table.nbytes
    assert report.tables[0].name == "wte.weight" and report.tables[0].aliases == ("lm_head.weight",)
    cqr.export(tmp_path / "s.safetensors", tmp_path / "d.pt")
    back = torch.load(tmp_path / "d.pt", weights_only=True)
    assert list(back) == ["epoch", "name", "lr", "model"]
    assert (back["epoch"], back["name"], back["lr"]) == (3, "run", [0.1, None, (True, "x")])
    assert isinstance(back["model"], OrderedDict) and list(back["model"]) == ["lm_head.weight", "wte.weight", 3]
    assert back["model"]["lm_head.weight"].data_ptr() == back["model"]["wte.weight"].data_ptr()
    cqr.export(tmp_path / "s.safetensors", tmp_path / "d.safetensors")
    flat = load_file(tmp_path / "d.safetensors")
    assert torch.equal(flat["lm_head.weight"], flat["wte.weight"])


def test_untie_keeps_the_other_name_dense(tmp_path: Path, table: torch.Tensor) -> None:
    torch.save({"wte.weight": table, "lm_head.weight": table}, tmp_path / "m.pt")
    cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", untie=True, **PQ)
    dense = cqr.load_dense_state_dict(tmp_path / "s.safetensors")
    assert torch.equal(dense["lm_head.weight"], table) and not torch.equal(dense["wte.weight"], table)


def test_a_bare_tensor_and_a_lone_weight_get_names(tmp_path: Path, table: torch.Tensor) -> None:
    for source, stored in (("embeddings", "embeddings.codes"), ("weight", "codes")):
        save_file({source: table}, tmp_path / "m.safetensors")
        cqr.convert(tmp_path / "m.safetensors", tmp_path / "s.safetensors", tables=[source], force=True, **PQ)
        assert stored in load_file(tmp_path / "s.safetensors")
        assert list(cqr.load_dense_state_dict(tmp_path / "s.safetensors")) == [source]


@pytest.mark.parametrize("method", ["pq", "rq", "int4", "hash", "qr", "cqr"])
def test_kept_and_zero_rows_stay_bit_exact(tmp_path: Path, table: torch.Tensor, method: str) -> None:
    table[0] = 0
    table[77] = -0.0
    table[5, 3] = float("nan")
    table[6, 0] = float("-inf")
    torch.save({"emb.weight": table}, tmp_path / "m.pt")
    with pytest.raises(
        NonFiniteError, match=r"'emb.weight' \(3000 x 16\) has NaN or infinity in 2 rows, first 5, 6"
    ):
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", effort="fast")
    request = cqr.ConvertOptions(method=method, exact_rows=(9, -1), nonfinite="keep")
    report = cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", request)
    decoded = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["emb.weight"]
    kept = torch.tensor([0, 5, 6, 9, 77, 2999])
    assert torch.equal(decoded[kept].view(torch.uint8), table[kept].view(torch.uint8))
    assert report.tables[0].rows_stored_apart == 6
    others = torch.ones(3000, dtype=torch.bool)
    others[kept] = False
    assert decoded[others].isfinite().all()
    with pytest.raises(SpecError, match="exact row 3000 is outside 'emb.weight': give ids from -3000 to 2999"):
        cqr.convert(tmp_path / "m.pt", tmp_path / "t.safetensors", cqr.ConvertOptions(exact_rows=(3000,)))


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_magnitudes_whose_squares_leave_float32_are_refused(
    tmp_path: Path, table: torch.Tensor, magnitude: float
) -> None:
    torch.save({"emb.weight": table * magnitude}, tmp_path / "m.pt")
    with pytest.raises(TableRefusedError, match="the largest magnitude in 'emb.weight' is .*e[+-](30|31|29)"):
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", cqr.ConvertOptions(method="pq"))


@pytest.mark.parametrize("magnitude", [1e6, 1e-6])
def test_magnitudes_that_float16_cannot_hold_get_float32_codebooks(
    tmp_path: Path, table: torch.Tensor, magnitude: float
) -> None:
    torch.save({"emb.weight": table * magnitude}, tmp_path / "m.pt")
    for method in ("pq", "int8"):
        out = tmp_path / f"{method}.safetensors"
        report = cqr.convert(tmp_path / "m.pt", out, cqr.ConvertOptions(method=method))
        assert report.tables[0].relative_mse is not None and report.tables[0].relative_mse < 0.2


def test_shards_hold_the_same_model(tmp_path: Path, ckpt: Path) -> None:
    whole = cqr.convert(ckpt, tmp_path / "one.safetensors", **PQ)
    report = cqr.convert(ckpt, tmp_path / "many.safetensors", shard_bytes=9000, **PQ)
    index = tmp_path / "many.safetensors.index.json"
    shards = sorted(tmp_path.glob("many-*.safetensors"))
    assert report.file == str(index) and len(shards) > 1
    assert report.file_bytes_after == index.stat().st_size + sum(p.stat().st_size for p in shards)
    assert [t.bytes_after for t in report.tables] == [t.bytes_after for t in whole.tables]
    one, many = cqr.load_dense_state_dict(tmp_path / "one.safetensors"), cqr.load_dense_state_dict(index)
    assert set(one) == set(many) and all(torch.equal(one[name], many[name]) for name in one)
    cqr.export(index, tmp_path / "d.safetensors", shard_bytes=100_000)
    with open_checkpoint(tmp_path / "d.safetensors.index.json") as dense:
        assert set(dense.entries) == set(one)


def test_small_tables_stay_dense_and_say_why(tmp_path: Path, ckpt: Path) -> None:
    report = cqr.convert(ckpt, tmp_path / "s.safetensors", min_rows=2000, **PQ)
    assert [t.name for t in report.tables] == ["item_embedding.weight"]
    assert report.left_dense[0].reason == "1500 rows are fewer than min_rows = 2000"
    with pytest.raises(TableNotFoundError, match="3000 rows are fewer than min_rows = 9999"):
        cqr.convert(ckpt, tmp_path / "t.safetensors", min_rows=9999, **PQ)


def test_an_impossible_budget_says_what_is_possible_for_every_table(tmp_path: Path, ckpt: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        cqr.convert(ckpt, tmp_path / "s.safetensors", cqr.ConvertOptions(method="pq", ratio=5000))
    assert "'item_embedding.weight' (3000 x 16 float32, 192000 bytes) to ratio 5000" in str(caught.value)
    assert "'user_embedding.weight'" in str(caught.value)
    possible = float(str(caught.value).split("--ratio ")[1].split(",")[0])
    request = cqr.ConvertOptions(method="pq", ratio=possible)
    cqr.convert(ckpt, tmp_path / "s.safetensors", request, tables=["item*"])
    with pytest.raises(BudgetError, match="ratio 16"):
        cqr.convert(ckpt, tmp_path / "t.safetensors", cqr.ConvertOptions(method="int4", ratio=16))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "magic"}, {"ratio": 0}, {"ratio": 8, "bits_per_dim": 2}, {"n_bits": 17}, {"nonfinite": "hide"},
        {"method": "int8", "n_bits": 4}, {"method": "rq", "num_columns": 2}, {"method": "pq", "num_levels": 2},
        {"method": "hash", "rotation": "opq"}, {"codebook_dtype": "int4"}, {"method": "qr", "codebook_dtype": "int8"},
        {"method": "trellis", "codebook_dtype": "int8"}, {"method": "int4", "codebook_dtype": "int8"}, {"min_rows": -1},
        {"rank": 8, "method": "pq"}, {"rank": 0}, {"rank": "some"}, {"method": "rq", "rotation": "opq"},
        {"seed": -1}, {"seed": 2**31}, {"ratio": float("nan")}, {"ratio": 0.5},
    ],
)  # fmt: skip
def test_a_request_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        cqr.ConvertOptions(**fields)


@pytest.mark.parametrize(
    "request_",
    [
        cqr.ConvertOptions(num_columns=8, ratio=6, effort="fast", refine_rounds=0), cqr.ConvertOptions(method="rq", rotation="opq", rank=64, ratio=6, effort="fast", refine_rounds=0),
        cqr.ConvertOptions(rank=64, ratio=6, effort="fast", refine_rounds=0), cqr.ConvertOptions(rank=4, ratio=6, effort="fast", refine_rounds=0), cqr.ConvertOptions(method="prq", rotation="pca", rank="auto", num_columns=4, ratio=6, effort="fast", refine_rounds=0),
    ],
)  # fmt: skip
def test_ranks_that_a_table_cannot_have_are_left_out(
    tmp_path: Path, few_rows: Path, request_: cqr.ConvertOptions
) -> None:
    report = cqr.convert(few_rows, tmp_path / "s.safetensors", request_, tables=["item*"])
    assert len(report.tables) == 1 and all(table.ratio_bytes >= 6 for table in report.tables)
    if request_.rank == 4:
        assert all("rank 4" in table.layout for table in report.tables)


def test_a_column_count_that_does_not_divide_is_refused_with_the_choices(tmp_path: Path, ckpt: Path) -> None:
    with pytest.raises(SpecError, match="Choose num_columns from 1, 2, 4, 8, 16"):
        cqr.convert(ckpt, tmp_path / "s.safetensors", cqr.ConvertOptions(method="pq", num_columns=3, n_bits=4))


def test_nothing_is_overwritten_without_force_and_never_the_source(tmp_path: Path, ckpt: Path) -> None:
    out = tmp_path / "s.safetensors"
    for existing in (out, tmp_path / "s.report.json"):
        existing.write_bytes(b"precious")
        with pytest.raises(OutputExistsError, match="already exists. Pass --force"):
            cqr.convert(ckpt, out, **PQ)
        assert existing.read_bytes() == b"precious"
        existing.unlink()
    with pytest.raises(OutputError, match="is the checkpoint itself"):
        cqr.convert(ckpt, ckpt, force=True, **PQ)
    with pytest.raises(OutputError, match="no such folder"):
        cqr.convert(ckpt, tmp_path / "nowhere" / "s.safetensors", **PQ)


def test_what_is_compressed_already_or_has_no_table_is_refused(tmp_path: Path, ckpt: Path) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", **PQ)
    with pytest.raises(CheckpointError, match="already compressed"):
        cqr.convert(tmp_path / "s.safetensors", tmp_path / "t.safetensors", **PQ)
    torch.save({"fc.weight": torch.zeros(5, 5), "fc.bias": torch.zeros(5)}, tmp_path / "n.pt")
    with pytest.raises(TableNotFoundError, match="found no embedding table in .* fc.weight 5 x 5"):
        cqr.convert(tmp_path / "n.pt", tmp_path / "t.safetensors", **PQ)
    with pytest.raises(FormatError, match="not a compressed checkpoint"):
        cqr.load_dense_state_dict(ckpt)


def test_a_name_that_is_taken_is_refused(tmp_path: Path, table: torch.Tensor) -> None:
    torch.save({"emb.weight": table, "emb.codes": torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(
        ShapeError, match="has a tensor 'emb.codes', a name that is reserved for a compressed table 'emb.weight'"
    ):
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", **PQ)


def corrupt(path: Path, change: Callable[[dict[str, Any], State], None]) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    header, tensors = json.loads(metadata["cqr_compress"]), load_file(path)
    change(header, tensors)
    del metadata[CHECKSUMS_KEY]
    save_file(tensors, path, {**metadata, "cqr_compress": json.dumps(header)})


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], State], object], str]] = {
    "newer": (lambda h, t: h.update(format_version=3), "format version 3, but this version reads up to 2"),
    "no tensor": (lambda h, t: t.pop("item_embedding.codes"), "the file has no such tensor"),
    "shape": (
        lambda h, t: t.update({"item_embedding.codes": torch.zeros(2, 2)}),
        "requires 'item_embedding.codes' of",
    ),
    "dense rows as well": (
        lambda h, t: t.update({"item_embedding.weight": torch.zeros(3000, 16)}),
        "has a dense tensor 'item_embedding.weight' of .* in addition to the compressed table",
    ),
    "no tables": (lambda h, t: h.pop("tables"), "metadata .* is damaged: KeyError"),
    "bad spec": (lambda h, t: h["tables"]["item_embedding.weight"]["spec"].update(num_columns=5), "is damaged"),
    "alias": (lambda h, t: h["aliases"].update(x="gone"), "an alias of 'gone'"),
    "aliases of another type": (lambda h, t: h.update(aliases=[]), "is damaged: TypeError"),
    "list of another type": (lambda h, t: h.update(left_dense=5), "is damaged: TypeError"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_newer_file_is_refused_not_served(tmp_path: Path, ckpt: Path, name: str) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4))
    corrupt(tmp_path / "s.safetensors", DAMAGE[name][0])  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=DAMAGE[name][1]):
        cqr.load_dense_state_dict(tmp_path / "s.safetensors")


def test_a_change_between_writing_and_verifying_fails_and_leaves_nothing(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = writer.SafetensorsWriter.finish

    def finish_and_flip(self: writer.SafetensorsWriter, metadata: dict[str, str]) -> None:
        finish(self, metadata)
        with self.partial_path.open("r+b") as file:
            file.seek(-9, os.SEEK_END)
            byte = file.read(1)
            file.seek(-9, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(writer.SafetensorsWriter, "finish", finish_and_flip)
    with pytest.raises(VerificationError, match="differs when read back"):
        cqr.convert(ckpt, tmp_path / "s.safetensors", **PQ)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]


def test_a_file_that_may_not_grow_fails_and_leaves_nothing(tmp_path: Path, ckpt: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .* the file size limit is exceeded"):
            cqr.convert(ckpt, tmp_path / "s.safetensors", **PQ)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]


def test_a_large_table_is_fitted_on_a_sample_and_encoded_in_blocks(
    tmp_path: Path, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"emb.weight": table}, tmp_path / "m.pt")
    request = cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4, max_sample=1000)
    cqr.convert(tmp_path / "m.pt", tmp_path / "a.safetensors", request)
    monkeypatch.setattr("cqr_compress.checkpoint.parts.BLOCK_BYTES", 10_000)
    monkeypatch.setattr(
        "cqr_compress.planning.scan.row_blocks", lambda n, d: ((a, min(a + 77, n)) for a in range(0, n, 77))
    )
    cqr.convert(tmp_path / "m.pt", tmp_path / "b.safetensors", request)
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert torch.equal(a["emb.codebooks"], b["emb.codebooks"])
    assert float((a["emb.codes"] == b["emb.codes"]).float().mean()) > 0.999


def test_the_stored_names_and_shapes_are_those_of_the_format(tmp_path: Path, ckpt: Path) -> None:
    request = cqr.ConvertOptions(method="prq", num_columns=4, num_levels=2, n_bits=3, rotation="pca")
    cqr.convert(ckpt, tmp_path / "s.safetensors", request)
    tensors = load_file(tmp_path / "s.safetensors")
    found = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("item_embedding")}
    assert found == {
        "item_embedding.weight": (0,), "item_embedding.codes": (3000, 3), "item_embedding.codebooks": (4, 2, 8, 4),
        "item_embedding.rotation": (16, 16),
    }  # fmt: skip
    with open_checkpoint(tmp_path / "s.safetensors") as checkpoint:
        opened = CompressedFile.from_checkpoint(checkpoint)
        assert (
            checkpoint.metadata["format"] == "pt"
            and json.loads(checkpoint.metadata["cqr_compress"])["format_version"] == 2
        )
        assert opened.header.method == "prq"


@pytest.mark.parametrize("name", ["s3rec/Beauty-epochs-150.pt", "s3rec/LastFM-epochs-150.pt"])
def test_a_published_recommender_survives_the_round_trip(
    tmp_path: Path, shared: Callable[[str], Path], name: str
) -> None:
    source = torch.load(shared(name), weights_only=True)
    report = cqr.convert(shared(name), tmp_path / "s.safetensors", ratio=16, effort="fast")
    cqr.export(tmp_path / "s.safetensors", tmp_path / "d.pt")
    dense = torch.load(tmp_path / "d.pt", weights_only=True)
    assert list(dense) == list(source)
    compressed = {table.name for table in report.tables}
    assert compressed == {"item_embeddings.weight"} and report.tables[0].ratio_bytes >= 16
    assert all(torch.equal(dense[key], source[key]) for key in source if key not in compressed)


def test_no_shard_of_the_source_is_overwritten_even_with_force(tmp_path: Path, ckpt: Path) -> None:
    cqr.convert(ckpt, tmp_path / "c.safetensors", cqr.ConvertOptions(method="int8"))
    cqr.export(tmp_path / "c.safetensors", tmp_path / "m.safetensors", shard_bytes=100_000)
    shards = {path: path.read_bytes() for path in tmp_path.glob("m*")}
    assert len(shards) == 3
    with pytest.raises(OutputError, match="is the checkpoint itself, or a part of it"):
        cqr.convert(
            tmp_path / "m.safetensors.index.json", tmp_path / "m.safetensors", shard_bytes=9_000, force=True
        )
    assert {path: path.read_bytes() for path in tmp_path.glob("m*")} == shards


def test_rotated_rows_beyond_float16_get_float32_codebooks(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.randn(2000, 16) * 10 + 2e4}, tmp_path / "m.pt")
    request = cqr.ConvertOptions(method="pq", rotation="pca", num_columns=4, n_bits=4)
    report = cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", request)
    decoded = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["emb.weight"]
    assert decoded.isfinite().all() and report.tables[0].relative_mse is not None
    assert 0.0 < report.tables[0].relative_mse < 1e-4


@pytest.mark.parametrize("method", ["hash", "qr"])
def test_kept_rows_do_not_count_in_a_sketch(tmp_path: Path, table: torch.Tensor, method: str) -> None:
    errors = []
    for outlier in (1.0, 1e3):
        table[7] = outlier
        torch.save({"emb.weight": table}, tmp_path / "m.pt")
        request = cqr.ConvertOptions(method=method, ratio=4, exact_rows=(7,))
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", request, force=True)
        decoded = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["emb.weight"]
        errors.append(float((decoded - table).square().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_a_trainers_own_tensors_are_exported_and_kept_out_of_the_state_dict(
    tmp_path: Path, model_state: State
) -> None:
    content = {
        "state_dict": model_state, "callbacks": {"best{x}": {"score": torch.tensor(0.5)}},
        "hyper_parameters": {"class_weights": torch.ones(3, 3)}, "meta_optim": torch.ones(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "m.ckpt")
    cqr.convert(tmp_path / "m.ckpt", tmp_path / "s.safetensors", cqr.ConvertOptions(method="int8"))
    assert set(cqr.load_dense_state_dict(tmp_path / "s.safetensors")) == set(model_state)
    cqr.export(tmp_path / "s.safetensors", tmp_path / "d.ckpt")
    back = torch.load(tmp_path / "d.ckpt", weights_only=True)
    assert torch.equal(back["callbacks"]["best{x}"]["score"], torch.tensor(0.5))
    assert torch.equal(back["hyper_parameters"]["class_weights"], torch.ones(3, 3))
    assert torch.equal(back["meta_optim"], torch.ones(3))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"z": torch.zeros(2, dtype=torch.complex128)}, "'z' has dtype torch.complex128, which safetensors"),
        ({"__metadata__": torch.zeros(2)}, "a tensor '__metadata__', a name that safetensors does not support"),
        ({"c": torch.zeros(3, dtype=torch.complex64).conj()}, "stored conjugated or negated"),
    ],
)
def test_a_tensor_that_cannot_be_carried_over_is_named(
    tmp_path: Path, table: torch.Tensor, state: State, message: str
) -> None:
    torch.save({"emb.weight": table, **state}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", dry_run=True, **PQ)


def test_names_with_markup_and_brackets_are_shown_and_matched(
    tmp_path: Path, table: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    from cqr_compress.checkpoint.size_report import SizeReport
    from cqr_compress.cli.render import print_dense_report, print_size_report
    from cqr_compress.commands.inspect import DenseReport

    name = "embedding_dict.[/x][0].weight"
    torch.save({name: table}, tmp_path / "m.pt")
    cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", cqr.ConvertOptions(method="int8"), tables=[name])
    report, dense = cqr.inspect(tmp_path / "s.safetensors"), cqr.inspect(tmp_path / "m.pt", quick=True)
    assert isinstance(report, SizeReport) and isinstance(dense, DenseReport)
    print_size_report(report)
    print_dense_report(dense)
    assert capsys.readouterr().out.count("embedding_dict.[/x][0].weight") == 2


def test_a_converted_folder_can_be_converted_again(tmp_path: Path, table: torch.Tensor) -> None:
    save_file({"emb.weight": table}, tmp_path / "model.safetensors")
    for shard_bytes in (None, 50_000, None):
        cqr.convert(tmp_path, method="int8", force=True, shard_bytes=shard_bytes)
    assert (tmp_path / "model.cqr.safetensors").exists()
    assert len(list(tmp_path.iterdir())) == 3  # with the checkpoint and the report; the shards are replaced


def test_a_table_that_is_named_is_compressed_however_few_rows_it_has(tmp_path: Path) -> None:
    source = tmp_path / "ckpt.pt"
    torch.save({"user.weight": torch.randn(300, 8), "item_emb.weight": torch.randn(300, 8)}, source)
    report = cqr.convert(source, tmp_path / "c.safetensors", tables=["user.weight"], method="int8")
    assert [table.name for table in report.tables] == ["user.weight"]


def test_float64_values_below_the_range_of_float32_are_refused_not_stored_as_zeros(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.randn(2000, 8, dtype=torch.float64) * 1e-60}, tmp_path / "m.pt")
    with pytest.raises(TableRefusedError, match="largest magnitude in 'emb.weight' is .*e-60"):
        cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", method="int8", tables=["emb.weight"])
    assert not (tmp_path / "s.safetensors").exists()
