"""Files that version 0.1.0 wrote, one of each method: they open, decode to the same rows, load and train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.checkpoint.checksums import CHECKSUMS_KEY
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY
from cqr_compress.errors import FormatError
from cqr_compress.table.spec import CodebookSpec

FOLDER = Path(__file__).parent / "golden" / "0.1.0"
ROWS = load_file(FOLDER / "rows.safetensors")
METHODS = sorted(name for name in ROWS if "." not in name and name not in ("shards", "finetuned"))
N, D = 96, 8


class Net(nn.Module):
    """The model that the files were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.head = nn.Embedding(N, D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.item(ids))


def same_rows(found: Tensor, wanted: Tensor, spec: object) -> bool:
    """Bit for bit, NaN included; products with a rotation may be rounded otherwise on another processor."""
    if isinstance(spec, CodebookSpec) and spec.rotation:
        return torch.allclose(found, wanted, atol=1e-6, equal_nan=True)
    return torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("name", [*METHODS, "finetuned"])
def test_a_file_decodes_to_the_rows_it_had(name: str) -> None:
    with open_checkpoint(FOLDER / f"{name}.safetensors") as checkpoint:
        opened = CompressedFile.from_checkpoint(checkpoint)
        assert json.loads(opened.header.dumps()).keys() == json.loads(checkpoint.metadata[METADATA_KEY]).keys()
        (table,) = opened.specs
        assert same_rows(opened.table(table).decode(), ROWS[name], opened.specs[table])
    dense = cqr.load_dense_state_dict(FOLDER / f"{name}.safetensors")
    assert len(dense) == 3 and same_rows(dense[table], ROWS[name], opened.specs[table])


@pytest.mark.parametrize("name", METHODS)
def test_a_file_loads_and_is_saved_and_exported_again(name: str, tmp_path: Path) -> None:
    with cqr.init_empty_weights():
        model = Net()
    cqr.load_compressed(model, FOLDER / f"{name}.safetensors", device="cpu")
    with torch.no_grad():
        assert torch.allclose(model.item(torch.arange(N)), ROWS[name], atol=1e-6, equal_nan=True)
    cqr.save_compressed(model, tmp_path / "again.safetensors", FOLDER / f"{name}.safetensors")
    before, after = (load_file(path) for path in (FOLDER / f"{name}.safetensors", tmp_path / "again.safetensors"))
    assert after.keys() - before.keys() == {"item.weight"} and after.pop("item.weight").shape == (0,)
    assert before.keys() == after.keys()
    assert all(same_rows(before[key].float(), after[key].float(), None) for key in before)
    cqr.export(tmp_path / "again.safetensors", tmp_path / "dense.pt")
    dense = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert dense.keys() == {"epoch", "model"} and dense["epoch"] == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_same_request_makes_the_same_tensors_with_no_more_error(name: str, tmp_path: Path) -> None:
    with open_checkpoint(FOLDER / f"{name}.safetensors") as checkpoint:
        header = CompressedFile.from_checkpoint(checkpoint).header
        (spec,) = header.specs.values()
    fixed = {"method": header.method, "nonfinite": "keep", "exact_rows": (7, -1), "min_rows": 1}
    if isinstance(spec, CodebookSpec) and header.method not in ("auto", "hash", "qr"):
        fixed |= {"n_bits": spec.n_bits, "num_columns": spec.num_columns, "codebook_dtype": spec.codebook_dtype}
        fixed |= {"rotation": spec.rotation, "rank": spec.rank}
        if header.method == "cqr":
            fixed |= {"helper": {(): "none", ("stored",): "stored", ("hashed",): "hashed"}[spec.code_sources[1:]]}
        else:
            fixed |= {"num_levels": spec.num_levels}
    elif isinstance(spec, CodebookSpec):
        fixed |= {"ratio": 4}
    report = cqr.convert(FOLDER / "source.pt", tmp_path / "new.safetensors", tables=["*item.weight"], **fixed)
    old, new = (load_file(path) for path in (FOLDER / f"{name}.safetensors", tmp_path / "new.safetensors"))
    assert new.pop("item.weight").shape == (0,)  # since format version 2
    if name != "auto":  # which chooses among more layouts since
        assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
        entry = len(json.dumps({"item.weight": {"dtype": "U8", "shape": [0], "data_offsets": [10_000, 10_000]}}))
        checksums = len(f',"{CHECKSUMS_KEY}":""') + 8 * (len(new) + 1)
        more = report.file_bytes_after - (FOLDER / f"{name}.safetensors").stat().st_size
        assert 0 < more < entry + checksums + 8
    dense = torch.load(FOLDER / "source.pt", weights_only=True)["model"]["item.weight"].float()
    decoded = cqr.load_dense_state_dict(tmp_path / "new.safetensors")["item.weight"].float()
    usable = dense.isfinite().all(1)
    error, error_before = ((rows - dense)[usable].square().sum() for rows in (decoded, ROWS[name].float()))
    assert float(error) <= 1.05 * float(error_before) + 1e-6


def test_files_of_layers_and_shards_decode_to_the_rows_they_had() -> None:
    layers = cqr.load_dense_state_dict(FOLDER / "layers.safetensors")
    for name in ("item", "user"):
        assert same_rows(layers[f"{name}.weight"], ROWS[f"layers.{name}"], None)
    shards = cqr.load_dense_state_dict(FOLDER / "shards.safetensors.index.json")
    assert same_rows(shards["emb.weight"], ROWS["shards"], None) and shards["out.weight"] is shards["emb.weight"]


@pytest.mark.parametrize("name", ["pq", "rq", "cqr_random", "cqr_fitted", "int8", "hash", "layers"])
def test_a_file_is_fine_tuned(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, wanted = torch.randint(8, N - 1, (256,)), torch.randn(256, 3)
    state = {"model": Net} if name != "layers" else {}
    if not state:  # layers that were trained from scratch have no head

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.item, self.user = nn.Embedding(N, D), nn.EmbeddingBag(N, D)

            def forward(self, ids: Tensor) -> Tensor:
                return (self.item(ids) + self.user(ids[:, None]))[:, :3]

        state = {"model": Two}
    task = cqr.Task(
        name="toy",
        model=state["model"],
        train_batches=lambda epoch: [(ids, wanted)] * 4,
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
        evaluate=lambda model: {"mse": float((model(ids) - wanted).square().mean())},
        metric="mse",
        mode="min",
    )
    source, output = FOLDER / f"{name}.safetensors", tmp_path / "tuned.safetensors"
    report = cqr.finetune(source, output, task, epochs=2, learning_rate=1e-2, codes="frozen")
    assert report.improved and cqr.inspect(output).tuning["summary"] == report.summary


def test_a_report_of_a_tuned_file_says_what_it_said(tmp_path: Path) -> None:
    report = cqr.inspect(FOLDER / "finetuned.safetensors")
    assert isinstance(report, cqr.SizeReport) and report.tuning is not None
    assert report.tuning["summary"].startswith("mse 1.7") and report.tuning["improved"]
    shutil.copy(FOLDER / "pq.safetensors", tmp_path)
    cqr.refit(
        tmp_path / "pq.safetensors", tmp_path / "r.safetensors", original=FOLDER / "source.pt", refine_rounds=1
    )


def changed_header(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a compressed file with another header."""
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata[METADATA_KEY])
    change(header)
    save_file(tensors, target, {**metadata, METADATA_KEY: json.dumps(header)})
    return target


def test_keys_that_this_version_does_not_know_are_written_back(tmp_path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["note"] = {"by": "a later version"}
        next(iter(header["tables"].values()))["quality"]["later_metric"] = 0.5

    path = changed_header(FOLDER / "pq.safetensors", tmp_path / "later.safetensors", change)
    cqr.refit(path, tmp_path / "r.safetensors", original=FOLDER / "source.pt", refine_rounds=1)
    with open_checkpoint(tmp_path / "r.safetensors") as checkpoint:
        assert json.loads(checkpoint.metadata[METADATA_KEY])["note"] == {"by": "a later version"}


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("aliases"), lambda h: h.update(seed="x"), lambda h: h.update(tables=[]), lambda h: h.update(extras=7),
        lambda h: h["source"].update(bytes=None), lambda h: h.update(left_dense=[{"name": "x"}]), lambda h: h.update(tuning=[]),
        lambda h: next(iter(h["tables"].values())).update(reason=3), lambda h: next(iter(h["tables"].values())).update(quality=4),
        lambda h: next(iter(h["tables"].values()))["quality"].update(relative_mse=10**400),
        lambda h: next(iter(h["tables"].values()))["spec"].update(num_embeddings=True),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = changed_header(FOLDER / "pq.safetensors", tmp_path / "bad.safetensors", change)
    for read in (cqr.inspect, cqr.load_dense_state_dict):
        with pytest.raises(FormatError, match=r"the metadata of .*bad.safetensors' is damaged|wants|needs"):
            read(path)


def test_a_tuned_file_has_the_keys_of_its_format(tmp_path: Path) -> None:
    cqr.refit(FOLDER / "finetuned.safetensors", tmp_path / "r.safetensors", original=FOLDER / "source.pt")
    with open_checkpoint(tmp_path / "r.safetensors") as checkpoint:
        tuning = json.loads(checkpoint.metadata[METADATA_KEY])["tuning"]
    assert tuning["verdict"].startswith("mse 1.7") and "summary" not in tuning
