"""Rows behind codes: gradients, encoding, and fine-tuning that trains codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_nn import SPECS, random_table
from test_tuning import compressed, dense, options, task  # noqa: F401
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.errors import SpecError, TableNotFoundError
from cqr_compress.finetuning.latent_rows import LatentRows, has_trainable_codes
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.spec import AnySpec

N, D = 3000, 12


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3)) * torch.linspace(1.5, 0.3, D)


LAYOUTS = [
    {"method": "pq", "num_columns": 4, "n_bits": 6},
    {"method": "pq", "num_columns": 4, "n_bits": 6, "rotation": "opq", "codebook_dtype": "int8"},
    {"method": "rq", "num_levels": 4, "n_bits": 6},
    {"method": "trellis", "bits_per_dim": 3.0, "max_tiers": 1},
    {"method": "trellis", "bits_per_dim": 3.3, "rotation": "pca"},
]


def layer_of(rows: Tensor, asked: dict[str, object]) -> TableLayer:
    model = nn.ModuleDict({"item": nn.Embedding.from_pretrained(rows.clone())})
    cqr.compress_(model, tables=["item.weight"], **asked)  # type: ignore[arg-type]
    layer = model["item"]
    assert isinstance(layer, TableLayer)
    return layer


@pytest.mark.parametrize("asked", LAYOUTS)
def test_rows_that_moved_are_encoded_and_the_others_stay(rows: Tensor, asked: dict[str, object]) -> None:
    layer = layer_of(rows, asked)
    before = layer.decode().detach()
    latent = LatentRows.begin(layer, rows)
    ids = torch.arange(0, N, 3)
    other = rows[torch.randperm(N, generator=torch.Generator().manual_seed(1))]  # what codes are fitted to, too
    with torch.no_grad():
        latent.moved.copy_((other - rows) / latent.unit)
    layer(ids).sum().backward()
    assert latent.encode() > 0.9 and latent.encode() == 0.0
    after = layer.decode().detach()
    stay = torch.ones(N, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(after[stay], before[stay])
    error = (before - rows).square().mean()
    assert float((after - other)[ids].square().mean()) < 1.5 * float(error)  # a tier keeps its rows
    latent.end()
    assert layer.observer is None


@pytest.mark.parametrize("asked", LAYOUTS[::3])
def test_gradients_of_lookups_and_products_move_the_rows(rows: Tensor, asked: dict[str, object]) -> None:
    layer = layer_of(rows, asked)
    with torch.no_grad():
        plain = layer(torch.tensor([5, 7]))
    latent = LatentRows.begin(layer, rows)
    found, h = layer(torch.tensor([5, 7])), torch.randn(3, D)
    assert torch.equal(found.detach(), plain)
    (found.sum() + (h @ layer.weight.T)[:, 9].sum()).backward()
    wanted = torch.zeros(N, D)
    wanted[[5, 7]] = 1.0
    wanted[9] = h.sum(0)
    assert latent.moved.grad is not None
    assert torch.allclose(latent.moved.grad, wanted * latent.unit, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_codes_that_are_computed_cannot_be_trained(name: str) -> None:
    spec: AnySpec = SPECS[name]
    trains = name not in ("hash", "qr", "cqr", "int8", "int4")
    assert has_trainable_codes(spec) == trains
    if trains:
        layer = cqr.CompressedEmbedding(random_table(spec))
        latent = LatentRows.begin(layer, None)
        layer(torch.arange(20)).sum().backward()
        latent.encode()
        assert layer.decode().isfinite().all()


@pytest.mark.parametrize(
    "asked",
    [{"method": "pq", "num_columns": 4, "n_bits": 4}, {"method": "trellis", "ratio": 8.0}],
)
def test_training_codes_lowers_the_loss(asked: dict[str, object], dense: Path, tmp_path: Path) -> None:  # noqa: F811
    path = compressed(dense, tmp_path, **asked)
    chosen = options(codes="train", epochs=4, refit=False, learning_rate=1e-2)
    report = cqr.finetune(path, tmp_path / "out.safetensors", task(), chosen, original=dense)
    assert report.after["bce"] < report.before["bce"]
    frozen = options(codes="frozen", epochs=4, refit=False, learning_rate=1e-9)
    still = cqr.finetune(path, tmp_path / "still.safetensors", task(), frozen, original=dense)
    assert report.after["bce"] < still.after["bce"] - 1e-3


def test_codes_are_not_trained_toward_the_rows_of_the_teacher() -> None:
    with pytest.raises(SpecError, match="give distill 'outputs'"):
        options(codes="train", distill="rows")


def test_training_codes_of_hashed_tables_is_refused(dense: Path, tmp_path: Path) -> None:  # noqa: F811
    path = compressed(dense, tmp_path, method="hash", ratio=8.0)
    with pytest.raises(TableNotFoundError, match="no table has all of its codes stored"):
        cqr.finetune(path, tmp_path / "out.safetensors", task(), options(codes="train"))
