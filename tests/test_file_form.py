"""Tensors of tables as files store them: int8 codebooks and rotations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.errors import NonFiniteError
from cqr_compress.table.file_form import as_in_file, from_file, rounded, to_file
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec


def codebook_spec(rotation: str | None, **fields: object) -> CodebookSpec:
    base = {
        "method": "prq", "num_embeddings": 50, "embedding_dim": 12, "num_columns": 3, "num_levels": 2,
        "codebook_size": 16, "code_sources": ("stored", "stored"), "codebook_dtype": "int8", "rotation": rotation,
    }  # fmt: skip
    return CodebookSpec(**(base | fields))  # type: ignore[arg-type]


SPECS: list[AnySpec] = [
    codebook_spec(None),
    codebook_spec("opq"),
    codebook_spec("opq", rank=9),
    TrellisSpec(method="trellis", num_embeddings=50, embedding_dim=12, tier_nbytes=(3,), rotation="pca", rank=7),
    TrellisSpec(
        method="trellis", num_embeddings=50, embedding_dim=12, tier_nbytes=(2, 3), tier_rows=(20, 30), rotation="pca",
        codebook_dtype="float64",
    ),
]  # fmt: skip


def random_values(spec: AnySpec, scale: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        short: torch.randn(shape.shape, generator=generator, dtype=torch.float64).to(shape.dtype) * scale
        for short, shape in spec.tensor_shapes().items()
        if shape.dtype.is_floating_point
    }


def decoded(spec: AnySpec, tensors: dict[str, Tensor]) -> Tensor:
    """What every row is a sum of: codewords or scaled dimensions, rotated."""
    if isinstance(spec, CodebookSpec):
        C, L, K, S = tensors["codebooks"].shape
        parts = torch.zeros(C, L, K, C, S)
        for c in range(C):
            parts[c, :, :, c] = tensors["codebooks"][c].float()
        rows = parts.view(-1, C * S)
    else:
        rows = torch.stack([torch.diag(scale) for scale in tensors["dim_scale"].float()]).flatten(0, 1)
    return rows @ tensors["rotation"].float() if spec.rotation else rows  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", SPECS)
def test_rounded_values_are_close_and_do_not_change_again(spec: AnySpec) -> None:
    tensors = random_values(spec)
    once = as_in_file(spec, tensors)
    held = {short: t.to(spec.file_shapes()[short].dtype) for short, t in to_file(spec, once).items()}
    for short, tensor in held.items():
        assert tuple(tensor.shape) == spec.file_shapes()[short].shape
        assert short in ("codebook_scale", "row_mean", "dim_scale") or tensor.dtype == torch.int8
    again = from_file(spec, held)
    for short, tensor in once.items():
        assert tensor.dtype == spec.tensor_shapes()[short].dtype
        assert torch.allclose(again[short], tensor, rtol=1e-6, atol=0), short
    second = {short: t.to(spec.file_shapes()[short].dtype) for short, t in to_file(spec, again).items()}
    for short, tensor in held.items():
        assert torch.equal(second[short], tensor) or (
            tensor.dtype == torch.float64 and torch.allclose(second[short], tensor)
        )
    before, after = decoded(spec, tensors), decoded(spec, once)
    assert float((before - after).square().sum()) < 2e-4 * float(before.square().sum())


def test_values_that_a_file_cannot_hold_are_refused() -> None:
    spec = codebook_spec(None)
    tensors = {"codebooks": torch.full(spec.tensor_shapes()["codebooks"].shape, 1e8)}
    assert not rounded(spec, tensors)["codebooks"].isfinite().all()
    with pytest.raises(NonFiniteError, match="codebooks are outside the range"):
        as_in_file(spec, tensors)


@pytest.fixture
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2000, 16, generator=generator) * torch.linspace(1, 0.2, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pq", "codebook_dtype": "int8", "num_columns": 4},
        {"method": "pq", "codebook_dtype": "int8", "num_columns": 4, "rotation": "opq"},
        {"method": "rq", "codebook_dtype": "int8"},
        {"method": "cqr", "codebook_dtype": "int8"},
        {"method": "trellis", "rotation": "pca"},
    ],
)
def test_a_file_is_loaded_saved_and_exported(rows: Tensor, tmp_path: Path, options: dict[str, object]) -> None:
    torch.save({"item.weight": rows}, tmp_path / "a.pt")
    small, again, dense = (tmp_path / f"{name}.safetensors" for name in ("small", "again", "dense"))
    report = cqr.convert(tmp_path / "a.pt", small, ratio=10, **options)  # type: ignore[arg-type]
    stored = load_file(small)
    assert sum(t.nbytes for t in stored.values()) == report.tables[0].bytes_after <= rows.nbytes / 10
    ints = "item.codebooks" if "item.codebooks" in stored else "item.rotation"
    assert stored[ints].dtype == torch.int8 and int(stored[ints].abs().max()) == 127
    model = nn.ModuleDict({"item": nn.Embedding(2000, 16)})
    cqr.load_compressed(model, small)
    short = ints.removeprefix("item.")
    assert model["item"].get_parameter(short).requires_grad  # in floating point
    cqr.save_compressed(model, again, small)
    for name, tensor in load_file(again).items():
        assert torch.equal(tensor, stored[name]), name
    cqr.save_compressed(model, tmp_path / "alone.safetensors")
    assert torch.equal(load_file(tmp_path / "alone.safetensors")[ints], stored[ints])
    cqr.export(small, dense)
    assert torch.allclose(load_file(dense)["item.weight"], model["item"].weight[:], atol=1e-5)
    live = nn.ModuleDict({"item": nn.Embedding.from_pretrained(rows.clone())})
    cqr.compress_(live, ratio=10, tables=["item.weight"], **options)  # type: ignore[arg-type]
    assert torch.allclose(live["item"].weight[:], model["item"].weight[:], atol=1e-5)


def test_int8_codebooks_are_smaller_at_the_same_error(rows: Tensor, tmp_path: Path) -> None:
    torch.save({"item.weight": rows}, tmp_path / "a.pt")
    half, byte = (
        cqr.convert(
            tmp_path / "a.pt", tmp_path / f"{dtype}.safetensors", method="pq", num_columns=4, n_bits=8,
            codebook_dtype=dtype,
        ).tables[0]
        for dtype in ("float16", "int8")
    )  # fmt: skip
    assert byte.bytes_after == half.bytes_after - 256 * 16 + 16 * 2
    assert half.relative_mse and byte.relative_mse and byte.relative_mse < 1.002 * half.relative_mse


def test_fine_tuning_writes_int8_codebooks(rows: Tensor, tmp_path: Path) -> None:
    torch.save({"item.weight": rows}, tmp_path / "a.pt")
    small = tmp_path / "small.safetensors"
    cqr.convert(tmp_path / "a.pt", small, method="pq", num_columns=4, n_bits=4, codebook_dtype="int8")
    model = nn.ModuleDict({"item": nn.Embedding(2000, 16)})
    cqr.load_compressed(model, small)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):
        ids = torch.randint(2000, (256,))
        loss = (model["item"](ids) - rows[ids]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cqr.save_compressed(model, tmp_path / "tuned.safetensors", small)
    loaded = nn.ModuleDict({"item": nn.Embedding(2000, 16)})
    cqr.load_compressed(loaded, tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "tuned.safetensors")["item.codebooks"].dtype == torch.int8
    spread = float(model["item"].weight[:].detach().std())
    difference = loaded["item"].weight[:] - model["item"].weight[:]
    assert float(difference.detach().abs().max()) < 0.02 * spread
