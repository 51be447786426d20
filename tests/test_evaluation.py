"""What compression cost: rows by frequency, a task's metrics side by side, and refits of a file without data."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import OutputExistsError, ShapeError, SpecError, SwapError, TableNotFoundError
from cqr_compress.finetuning.fisher_fit import transformed
from cqr_compress.model.load import load_checkpoint
from cqr_compress.planning.scan import ScannedTable, scan_table, source_rows
from cqr_compress.progress import NoProgress
from cqr_compress.quantize.refine import refine

Cli = Callable[..., subprocess.CompletedProcess[str]]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item_embedding, self.user_embedding = nn.Embedding(3000, 16), nn.Embedding(1500, 16)


def rows_of(path: Path, name: str) -> Tensor:
    model = Model()
    load_checkpoint(model, path)
    layer = getattr(model, f"{name}_embedding")
    return layer.decode().detach() if isinstance(layer, cqr.CompressedEmbedding) else layer.weight.detach()


@pytest.fixture
def dense(tmp_path: Path, model_state: dict[str, Tensor]) -> Path:
    path = tmp_path / "dense.pt"
    torch.save({name: value for name, value in model_state.items() if "embedding" in name}, path)
    return path


@pytest.fixture
def small(dense: Path, tmp_path: Path) -> Path:
    cqr.convert(dense, tmp_path / "small.safetensors", cqr.ConvertOptions(method="rq", num_levels=4, n_bits=4))
    return tmp_path / "small.safetensors"


def size_task() -> cqr.Task:
    """The mean length of rows, as a figure."""
    return cqr.Task(
        name="size", model=Model, train_batches=lambda epoch: [torch.arange(10)],
        loss=lambda model, ids: model.item_embedding(ids).square().sum(1),
        evaluate=lambda model: {"length": float(model.item_embedding(torch.arange(3000)).norm(dim=1).mean())},
        metric="length",
    )  # fmt: skip


def test_figures_of_tables_and_tasks_stand_side_by_side(dense: Path, small: Path, tmp_path: Path) -> None:
    cqr.convert(dense, tmp_path / "other.safetensors", cqr.ConvertOptions(method="int8"))
    report = cqr.evaluate([small, tmp_path / "other.safetensors"], original=dense, task=size_task())
    assert report.dense_bytes == dense.stat().st_size
    rows = rows_of(dense, "item")
    assert report.dense == {"length": pytest.approx(float(rows.norm(dim=1).mean()))}
    for file in report.files:
        decoded = rows_of(Path(file.file), "item")
        table = next(t for t in file.tables if t.name == "item_embedding.weight")
        assert table.quality["relative_mse"] == pytest.approx(
            float((rows - decoded).square().sum() / rows.square().sum()), rel=1e-4
        )
        assert table.quality["mean_cosine"] == pytest.approx(
            float(torch.cosine_similarity(rows, decoded).mean()), rel=1e-4
        )
        assert file.metrics == {"length": pytest.approx(float(decoded.norm(dim=1).mean()))}
        assert file.file_bytes == Path(file.file).stat().st_size and table.bands == []
    first, second = report.files
    assert first.tables[0].quality["relative_mse"] > second.tables[0].quality["relative_mse"]


def test_bands_hold_the_ids_with_their_share_of_all_uses(dense: Path, small: Path) -> None:
    counts = torch.zeros(3000)
    counts[:10] = 500.0  # half of all uses
    counts[10:410] = 10.0  # the next 40%
    counts[410:1410] = 1.0  # the last tenth
    report = cqr.evaluate([small], original=dense, frequencies={"item_embedding.weight": counts})
    table = next(t for t in report.files[0].tables if t.name == "item_embedding.weight")
    assert [(band.name, band.num_ids) for band in table.bands] == [
        ("half of all uses", 10), ("the next 40%", 400), ("the last 10%", 1000), ("never used", 1590)
    ]  # fmt: skip
    rows, decoded = rows_of(dense, "item"), rows_of(small, "item")
    for band, ids in zip(
        table.bands, (slice(10), slice(10, 410), slice(410, 1410), slice(1410, None)), strict=True
    ):
        error = (rows[ids] - decoded[ids]).square().sum() / rows[ids].square().sum()
        assert band.relative_mse == pytest.approx(float(error), rel=1e-4)
        assert band.mean_cosine == pytest.approx(
            float(torch.cosine_similarity(rows[ids], decoded[ids]).mean()), rel=1e-4
        )
        assert band.recall_at_10 is None or 0 <= band.recall_at_10 <= 1
    assert table.bands[3].recall_at_10 is not None
    assert "weighted_relative_mse" in table.quality
    assert next(t for t in report.files[0].tables if t.name != table.name).bands == []


def test_inspect_shows_what_evaluate_found(dense: Path, small: Path, cli: Cli) -> None:
    before = small.read_bytes()
    trials = json.loads(small.with_suffix(".report.json").read_text())["rate_distortion"]
    torch.save({"user_embedding.weight": torch.ones(1500)}, dense.with_name("counts.pt"))
    printed = cli("evaluate", small, "--original", dense).stdout
    assert "item_embedding.weight" in printed and "rows compared with" in printed
    assert small.read_bytes() == before
    saved = json.loads(small.with_suffix(".report.json").read_text())
    assert saved["evaluation"]["tables"][0]["quality"]["relative_mse"] > 0
    assert saved["rate_distortion"] == trials and trials  # of the conversion, which wrote the report before
    assert "rows compared with" in cli("inspect", small).stdout
    shown = json.loads(cli("evaluate", small, "--original", dense, "--json").stdout)
    assert shown["kind"] == "evaluation_report" and len(shown["files"][0]["tables"]) == 2
    # a file that was written anew is not the one that was evaluated
    cli("convert", dense, "-o", small, "--method", "pq", "--ratio", 4, "--force")
    assert "rows compared with" not in cli("inspect", small).stdout


def test_evaluate_wants_a_source_or_a_task_that_fit(dense: Path, small: Path, cli: Cli, tmp_path: Path) -> None:
    assert "--original" in cli("evaluate", small, code=2).stderr
    torch.save({"item_embedding.weight": torch.randn(3000, 16)}, tmp_path / "less.pt")
    with pytest.raises(TableNotFoundError, match="user_embedding.weight"):
        cqr.evaluate([small], original=tmp_path / "less.pt")
    torch.save(
        {n: torch.randn(1500, 16) for n in ("item_embedding.weight", "user_embedding.weight")}, tmp_path / "o.pt"
    )
    with pytest.raises(ShapeError, match=r"is \(1500, 16\) in .* and \(3000, 16\) in the compressed file"):
        cqr.evaluate([small], original=tmp_path / "o.pt")


# refits without data

LAYOUTS: dict[str, dict[str, Any]] = {
    "pq": {"method": "pq", "num_columns": 4, "n_bits": 4},
    "opq": {"method": "pq", "num_columns": 4, "n_bits": 4, "rotation": "opq"},
    "rank": {"method": "pq", "num_columns": 4, "n_bits": 4, "rotation": "pca", "rank": 8},
    "rq": {"method": "rq", "num_levels": 5, "n_bits": 4, "refine_rounds": 0},
    "prq": {"method": "prq", "num_columns": 2, "num_levels": 3, "n_bits": 4, "refine_rounds": 0},
    "helper": {"method": "cqr", "num_columns": 4, "n_bits": 4, "helper": "hashed", "refine_rounds": 0},
    "trellis": {"method": "trellis", "ratio": 10, "refine_rounds": 1},
    "trellis pca": {"method": "trellis", "ratio": 16, "rotation": "pca", "refine_rounds": 1},
    "int4": {"method": "int4"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_refit_lowers_the_error_of_rows_at_the_same_bytes(name: str, dense: Path, tmp_path: Path) -> None:
    given, made = tmp_path / "given.safetensors", tmp_path / "made.safetensors"
    cqr.convert(dense, given, cqr.ConvertOptions(max_sample=700, **LAYOUTS[name]))
    report = cqr.refit(given, made, original=dense, refine_rounds=3)
    for table in report.tables:
        short = table.name.split("_")[0]
        rows = rows_of(dense, short)
        before, after = (
            float((rows - rows_of(path, short)).square().sum() / rows.square().sum()) for path in (given, made)
        )
        assert table.relative_mse == pytest.approx(after, rel=1e-3)
        assert after < before if name != "int4" else after == before
    assert made.stat().st_size == pytest.approx(given.stat().st_size, abs=64)


def test_errors_of_a_refit_fall_round_by_round_and_are_those_of_the_rows(dense: Path, small: Path) -> None:
    with open_checkpoint(dense) as checkpoint:
        scan = scan_table(checkpoint.entries["item_embedding.weight"])
        model = Model()
        cqr.load_compressed(model, small)
        table: Any = model.item_embedding.table()
        found = refine(scan, table.spec, dict(table.tensors), refine_rounds=4)
    assert (
        all(b < a + 1e-6 for a, b in zip(found.errors, found.errors[1:], strict=False)) and len(found.errors) == 5
    )
    rows = rows_of(dense, "item")
    assert found.errors[0] == pytest.approx(
        float((rows - table.decode()).square().sum() / rows.square().sum()), rel=1e-3
    )
    made = cqr.CompressedTable(table.spec, {**table.tensors, **found.tensors})
    assert found.errors[-1] == pytest.approx(
        float((rows - made.decode()).square().sum() / rows.square().sum()), rel=1e-3
    )


def test_frequent_rows_are_fitted_better_where_counts_say_so(dense: Path, small: Path, tmp_path: Path) -> None:
    counts = torch.ones(3000)
    counts[:300] = 1000.0
    frequent = slice(300)
    rows, errors = rows_of(dense, "item"), []
    for given in ((), {"item_embedding.weight": counts}):
        cqr.refit(small, tmp_path / "r.safetensors", original=dense, frequencies=given, force=True)
        made = rows_of(tmp_path / "r.safetensors", "item")
        errors.append(float((rows[frequent] - made[frequent]).square().sum()))
    assert errors[1] < errors[0]


def test_rows_in_another_basis_are_read_block_by_block(dense: Path) -> None:
    basis = torch.randn(16, 16)
    with open_checkpoint(dense) as checkpoint:
        scan: ScannedTable = scan_table(checkpoint.entries["item_embedding.weight"])
        moved = transformed(scan, basis)
        blocks = torch.cat([rows for _, rows in moved.blocks()])
        assert torch.allclose(blocks, rows_of(dense, "item") @ basis, atol=1e-4)
        assert torch.allclose(moved.sample, scan.sample @ basis) and moved.largest == float(
            moved.sample.abs().max()
        )


def test_refit_on_the_command_line(dense: Path, small: Path, cli: Cli, tmp_path: Path) -> None:
    printed = cli("refit", small, "--original", dense, "-o", "free.safetensors", "--refine-rounds", 2)
    assert printed.stdout.count("relative squared error") + printed.stderr.count("relative squared error") == 2
    assert rows_of(tmp_path / "free.safetensors", "item").shape == (3000, 16)
    with pytest.raises(OutputExistsError):
        cqr.refit(small, tmp_path / "free.safetensors", original=dense)
    assert "--original" in cli("refit", small, code=2).stderr
    with pytest.raises(SpecError, match="rounds is 0"):
        cqr.refit(small, tmp_path / "x.safetensors", original=dense, refine_rounds=0)


def test_large_tensors_of_a_checkpoint_are_loaded_in_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cqr_compress.model.load.BLOCK_BYTES", 1000)

    def made(rows: int = 100) -> nn.Module:
        table, head, norm = nn.Embedding(rows, 8), nn.Linear(8, rows), nn.BatchNorm1d(8)
        head.weight = table.weight
        return nn.ModuleDict({"table": table, "norm": norm, "head": head})

    source, model = made(), made()
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "ckpt.pt")
    load_checkpoint(model, tmp_path / "ckpt.pt")
    assert all(value.equal(model.state_dict()[name]) for name, value in source.state_dict().items())
    assert model.table.weight is model.head.weight
    with pytest.raises(SwapError, match="size mismatch for table.weight"):
        load_checkpoint(made(101), tmp_path / "ckpt.pt")
    with pytest.raises(SwapError, match=r"the file does not have these tensors of the model: 'extra.weight'"):
        load_checkpoint(nn.ModuleDict({**dict(made().items()), "extra": nn.Linear(2, 2)}), tmp_path / "ckpt.pt")
    with pytest.raises(SwapError, match="the model does not have these tensors of the file: 'norm.weight'"):
        load_checkpoint(
            nn.ModuleDict({"table": nn.Embedding(100, 8), "head": nn.Linear(8, 100)}), tmp_path / "ckpt.pt"
        )


def test_the_report_of_a_split_file_is_the_one_beside_it(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    cqr.convert(dense, folder / "s.safetensors", cqr.ConvertOptions(method="int8"), shard_bytes=30_000)
    index = folder / "s.safetensors.index.json"
    before = set(folder.iterdir())
    for path in (index, folder):
        report = folder / "s.report.json"
        saved = json.loads(report.read_text())
        report.write_text(json.dumps({**saved, "evaluation": None}))
        cqr.evaluate([path], original=dense)
        assert json.loads(report.read_text())["evaluation"]["tables"]
        shown = cqr.inspect(path)
        assert shown.evaluation is not None and set(folder.iterdir()) == before  # type: ignore[union-attr]
    assert not list(tmp_path.glob("split.report.json"))


def test_rows_stored_apart_take_no_part_in_a_refit(dense: Path, tmp_path: Path) -> None:
    """Far rows that are stored verbatim must not pull codewords: the others are fitted as if those were ordinary."""
    state = torch.load(dense)
    far = {name: rows.clone() for name, rows in state.items()}
    far["item_embedding.weight"][[5, 7]] = 1000.0
    torch.save(far, tmp_path / "far.pt")
    chosen = {"method": "pq", "num_columns": 4, "n_bits": 4, "exact_rows": (5, 7)}
    errors = []
    for name, source in (("near", dense), ("far", tmp_path / "far.pt")):
        small, refitted = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.refit.safetensors"
        cqr.convert(source, small, **chosen)
        with open_checkpoint(small) as file, open_checkpoint(source) as original:
            table = CompressedFile.from_checkpoint(file).table("item_embedding.weight")
            scan = source_rows(original, "item_embedding.weight", table, None, NoProgress())
            assert scan.exact_ids.tolist() == table.exact_ids.tolist() == [5, 7]
        cqr.refit(small, refitted, original=source, refine_rounds=2)
        decoded = cqr.load_dense_state_dict(refitted)["item_embedding.weight"]
        others = torch.ones(len(decoded), dtype=torch.bool)
        others[[5, 7]] = False
        errors.append(float((decoded - state["item_embedding.weight"])[others].square().mean()))
    assert errors[1] < 1.05 * errors[0]
