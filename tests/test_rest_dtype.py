"""Other tensors in half precision: smaller in the file, and in their own dtypes wherever they are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.export import export, load_dense_state_dict
from cqr_compress.commands.finetune import finetune
from cqr_compress.commands.refit import refit
from cqr_compress.errors import FormatError, SpecError
from cqr_compress.finetuning.task import Task

LAYOUT: dict[str, Any] = {"method": "pq", "num_columns": 4, "n_bits": 4}
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8}


class Model(nn.Module):
    """A table, layers of several dtypes of which one is tied, running statistics, and buffers of odd values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.emb = nn.Embedding(1200, 8, _weight=torch.randn(1200, 8, generator=generator))
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 8)
        self.again = self.hidden
        self.wide = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.empty = nn.Parameter(torch.empty(0, 3))
        with torch.no_grad():
            for parameter in self.hidden.parameters():
                parameter.normal_(generator=generator)
        for name, values in {
            "special": torch.tensor([torch.nan, torch.inf, -torch.inf, 0.1]),
            "large": torch.tensor([0.1, -1e39], dtype=torch.float64),
            "tiny": torch.full((3,), 1e-42),
            "tiny_double": torch.full((3,), 1e-200, dtype=torch.float64),
            "inv_freq": torch.tensor([1.0, 0.3]),
            "half_": torch.ones(3, dtype=torch.float16),
            "eighth": torch.ones(3, dtype=torch.float8_e4m3fn),
            "phases": torch.ones(3, dtype=torch.complex64),
            "mask": torch.ones(3, dtype=torch.bool),
        }.items():
            self.register_buffer(name, values)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.norm(self.hidden(self.emb(ids))) * self.wide).sum(1) + self.scalar


STATE = Model().state_dict()
KEPT = {"large", "tiny", "tiny_double", "inv_freq", "norm.running_mean", "norm.running_var"}
NARROWED = {
    "wide", "scalar", "empty", "special", "norm.weight", "norm.bias", "hidden.weight", "hidden.bias",
    "again.weight", "again.bias",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer's checkpoint with an averaged copy of a layer outside the model."""
    path = tmp_path_factory.mktemp("rest") / "model.pt"
    torch.save({"model": STATE, "average": {"w": STATE["hidden.weight"] + 1}, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def small(source: Path, request: pytest.FixtureRequest) -> Path:
    path = source.with_name(f"{request.param}.safetensors")
    cqr.convert(source, path, rest_dtype=request.param, **LAYOUT)
    return path


def record(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        rest = CompressedFile.from_checkpoint(checkpoint).header.rest
    assert rest is not None
    return rest.to_json()


def dtypes_of(path: Path) -> dict[str, torch.dtype]:
    with open_checkpoint(path) as checkpoint:
        return {name: entry.dtype for name, entry in checkpoint.entries.items()}


def assert_rounded(state: dict[str, Tensor], dtype: str) -> None:
    """Check that a state_dict has the source's dtypes, and its values to rounding."""
    assert state.keys() == STATE.keys()
    for name, wanted in STATE.items():
        found = state[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        if name in NARROWED:
            assert torch.allclose(found, wanted, rtol=EPSILON[dtype], atol=1e-7, equal_nan=True), name
        elif name != "emb.weight":
            assert (
                torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)) if wanted.ndim else found == wanted
            )


def test_floats_are_narrowed_unless_that_loses_them(small: Path) -> None:
    dtypes, rest = dtypes_of(small), record(small)
    narrow = {name for name in NARROWED & dtypes.keys() if str(dtypes[name]) == f"torch.{small.stem}"}
    assert narrow == NARROWED & dtypes.keys() >= {"wide", "scalar", "special", "norm.weight"}
    for name in STATE.keys() - NARROWED - {"emb.weight"}:
        assert dtypes[name] == STATE[name].dtype, name
    assert str(dtypes["average.w"]) == f"torch.{small.stem}"
    assert rest["kept"].keys() == KEPT
    assert "outside the range" in rest["kept"]["large"]
    assert "zero" in rest["kept"]["tiny_double"] and "running" in rest["kept"]["norm.running_var"]


def test_sizes_are_counted_and_predicted(small: Path, source: Path) -> None:
    report = SizeReport.from_json(json.loads(report_path(small).read_text()), "report")
    planned = cqr.convert(source, small, rest_dtype=small.stem, force=True, dry_run=True, **LAYOUT)
    assert planned.file_bytes_after == report.file_bytes_after == small.stat().st_size
    assert report.rest is not None and planned.rest is not None
    others = {n: d for n, d in dtypes_of(small).items() if not n.startswith("emb.")}
    with open_checkpoint(small) as checkpoint:
        assert planned.rest["bytes_after"] == sum(checkpoint.entries[name].nbytes for name in others)
    whole = cqr.convert(source, small.with_suffix(".whole.safetensors"), force=True, dry_run=True, **LAYOUT)
    assert whole.rest is None and planned.rest["bytes_after"] < planned.rest["bytes_before"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exports_have_the_dtypes_of_the_source(small: Path, tmp_path: Path, suffix: str) -> None:
    export(small, tmp_path / f"dense{suffix}")
    if suffix == ".pt":
        tree = torch.load(tmp_path / "dense.pt", weights_only=True)
        assert_rounded(tree["model"], small.stem)
        assert tree["model"]["again.weight"].data_ptr() == tree["model"]["hidden.weight"].data_ptr()
        assert tree["average"]["w"].dtype == torch.float32 and tree["epoch"] == 3
        return
    with open_checkpoint(tmp_path / "dense.safetensors") as checkpoint:
        read = {n: e.stored.read() for n, e in checkpoint.entries.items() if n != "average.w"}
        assert_rounded(read, small.stem)


def test_models_have_the_dtypes_of_the_source(small: Path) -> None:
    assert_rounded(load_dense_state_dict(small), small.stem)
    with cqr.init_empty_weights():
        empty = Model()
    for model in (Model(), empty):
        cqr.load_compressed(model, small)
        cqr.decompress_(model)
        assert_rounded(model.state_dict(), small.stem)


def test_shards_hold_the_same(small: Path, source: Path, tmp_path: Path) -> None:
    cqr.convert(source, tmp_path / "m.safetensors", rest_dtype=small.stem, shard_bytes=2000, **LAYOUT)
    index = tmp_path / "m.safetensors.index.json"
    assert record(index) == record(small) and dtypes_of(index) == dtypes_of(small)
    export(index, tmp_path / "dense.safetensors", shard_bytes=10_000)
    cqr.convert(
        tmp_path / "dense.safetensors.index.json", tmp_path / "n.safetensors", rest_dtype=small.stem, **LAYOUT
    )
    assert dtypes_of(tmp_path / "n.safetensors").items() >= dtypes_of(small).items()


def test_a_model_saved_over_its_file_keeps_the_dtypes(small: Path, source: Path, tmp_path: Path) -> None:
    model = Model()
    cqr.load_compressed(model, small)
    cqr.save_compressed(model, tmp_path / "saved.safetensors", small)
    refit(small, tmp_path / "refitted.safetensors", original=source)
    for name in ("saved", "refitted"):
        path = tmp_path / f"{name}.safetensors"
        assert record(path) == record(small) and dtypes_of(path) == dtypes_of(small)


class Finite(Model):
    """The model without buffers that no training expects."""

    def __init__(self) -> None:
        super().__init__()
        del self.special, self.eighth


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    return F.mse_loss(model(ids).float(), (ids % 2).float(), reduction="none")


def loss_of(model: nn.Module) -> dict[str, float]:
    return {"loss": losses(model, torch.arange(1200)).mean().item()}


def test_fine_tuning_trains_narrowed_tensors(tmp_path: Path) -> None:
    torch.save(Finite().state_dict(), tmp_path / "m.pt")
    cqr.convert(tmp_path / "m.pt", tmp_path / "m.safetensors", rest_dtype="float16", **LAYOUT)
    task = Task(
        name="parity", model=Finite, train_batches=lambda epoch: torch.arange(1200).split(200), loss=losses,
        evaluate=loss_of, metric="loss", mode="min",
    )  # fmt: skip
    options = cqr.FinetuneOptions(epochs=2, trainable="all", learning_rate=1e-2, warmup_steps=1)
    report = finetune(tmp_path / "m.safetensors", tmp_path / "t.safetensors", task, options)
    assert report.improved and record(tmp_path / "t.safetensors") == record(tmp_path / "m.safetensors")
    assert dtypes_of(tmp_path / "t.safetensors") == dtypes_of(tmp_path / "m.safetensors")
    export(tmp_path / "t.safetensors", tmp_path / "t.pt")
    dense = Finite()
    dense.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    assert dense.wide.dtype == torch.float64 and not torch.equal(dense.wide, STATE["wide"])
    assert abs(loss_of(dense.eval())["loss"] - report.after["loss"]) < 1e-3 * report.after["loss"]


@pytest.mark.parametrize(
    "change",
    [
        [], "x", 1, {},
        {"dtype": "float64"}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"dtype": []}, {"dtype": "float8_e4m3fn"},
        {"narrowed": []}, {"narrowed": {"float32": "a"}}, {"narrowed": {"float32": [1]}}, {"narrowed": {"int8": []}},
        {"narrowed": {"float32": ["nothing"]}}, {"narrowed": {"float32": ["count"]}},
        {"narrowed": {"float32": ["emb.weight"]}}, {"narrowed": {"float32": ["emb.codes"]}},
        {"narrowed": {"float16": ["a"]}}, {"narrowed": {"float8_e4m3fn": ["a"]}},
        {"kept": []}, {"kept": {"a": 1}}, {"bytes_after": -1}, {"bytes_before": 1e400}, {"bytes_before": True},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(change: Any, tmp_path: Path) -> None:
    state = {"emb.weight": STATE["emb.weight"], "a": torch.ones(4), "count": torch.tensor(3)}
    torch.save(state, tmp_path / "m.pt")
    cqr.convert(tmp_path / "m.pt", tmp_path / "m.safetensors", rest_dtype="float16", **LAYOUT)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata[METADATA_KEY])
    header["rest"] = {**header["rest"], **change} if isinstance(change, dict) and change else change
    save_file(tensors, tmp_path / "bad.safetensors", metadata | {METADATA_KEY: json.dumps(header)})
    with pytest.raises(FormatError, match="damaged"):
        export(tmp_path / "bad.safetensors", tmp_path / "dense.pt", verify=False)


def test_only_halves_are_offered(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="bfloat16"):
        cqr.convert(source, tmp_path / "m.safetensors", rest_dtype="float64")
