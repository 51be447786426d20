"""Fused tables are planned field by field: rows of their own sizes for each field, small fields exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cqr_compress as cqr
from cqr_compress.errors import CheckpointError, SpecError, TableNotFoundError
from cqr_compress.planning.fields import small_field_rows
from cqr_compress.quantize.tiers import field_means

STARTS = [0, 20, 2020]
OPTIONS: dict[str, Any] = {"method": "trellis", "effort": "fast", "ratio": 12}


def table() -> torch.Tensor:
    """Fields of 20, 2,000 and 3,000 rows, of which the last one has a hundredth of the energy."""
    scales = torch.cat([torch.full((20,), 3.0), torch.full((2000,), 1.0), torch.full((3000,), 0.1)])
    return torch.randn(5020, 16) * scales[:, None]


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    state = {"embedding.embedding.weight": table(), "embedding.offsets": torch.tensor(STARTS)}
    torch.save(state, tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"embedding.embedding.weight": table()}, tmp_path / "p.pt")
    return tmp_path / "p.pt"


def tiers(file: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from cqr_compress.checkpoint.compressed_file import CompressedFile
    from cqr_compress.checkpoint.formats.open import open_checkpoint

    with open_checkpoint(file) as opened:
        (spec,) = CompressedFile.from_checkpoint(opened).specs.values()
    return spec.tier_nbytes, spec.tier_rows


def test_fields_of_a_buffer_are_tiers_and_small_ones_are_exact(fused: Path, tmp_path: Path) -> None:
    report = cqr.convert(fused, tmp_path / "s.safetensors", **OPTIONS)
    assert report.tables[0].rows_stored_apart == 20 and report.tables[0].ratio_bytes >= 12
    nbytes, rows = tiers(tmp_path / "s.safetensors")
    assert len(nbytes) >= 2 and rows[0] in range(2900, 3021)  # the weak field has the smallest rows
    rows_after = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["embedding.embedding.weight"]
    source = torch.load(fused)["embedding.embedding.weight"]
    assert torch.equal(rows_after[:20], source[:20])
    errors = [
        float((rows_after[a:b] - source[a:b]).square().sum() / source[a:b].square().sum())
        for a, b in ((20, 2020), (2020, 5020))
    ]
    assert errors[0] < 0.5 * errors[1]  # of which the bytes cost the whole table more


def test_offsets_that_are_given_lower_the_error(plain: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    one = cqr.convert(plain, tmp_path / "one.safetensors", **OPTIONS)
    ours = cqr.convert(
        plain, tmp_path / "ours.safetensors", **OPTIONS, offsets={"embedding.embedding.weight": STARTS}
    )
    budget = 5020 * 16 * 4 / 12
    assert max(ours.tables_bytes_after, one.tables_bytes_after) <= budget
    assert ours.tables[0].relative_mse < 0.8 * one.tables[0].relative_mse
    np.save(tmp_path / "starts.npy", np.array(STARTS))
    common = ("convert", plain, "--method", "trellis", "--effort", "fast", "--ratio", 12)
    cli(*common, "-o", tmp_path / "a.safetensors", "--offsets", "0,20,2020")
    cli(
        *common,
        "-o",
        tmp_path / "b.safetensors",
        "--offsets",
        f"embedding.embedding.weight={tmp_path / 'starts.npy'}",
    )
    first = (tmp_path / "ours.safetensors").read_bytes()
    assert first == (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "buffer",
    [torch.tensor([1, 40]), torch.tensor([0, 40, 40]), torch.tensor([0, 9999]), torch.tensor([0.0, 40.0]), torch.tensor(0)],
)  # fmt: skip
def test_buffers_that_are_no_offsets_are_left_alone(plain: Path, buffer: torch.Tensor) -> None:
    torch.save({"embedding.embedding.weight": table(), "embedding.offsets": buffer}, plain)
    report = cqr.convert(plain, **OPTIONS, dry_run=True)
    assert report.tables[0].rows_stored_apart == 0


def test_offsets_that_do_not_fit_are_told(plain: Path, tmp_path: Path) -> None:
    for wrong in ([40, 2040], [0, 40, 40], [0, 5020], [[0, 1]]):
        with pytest.raises(SpecError, match="have to be ascending rows of its 5,020"):
            cqr.convert(plain, offsets={"embedding.embedding.weight": torch.tensor(wrong)}, dry_run=True)
    with pytest.raises(TableNotFoundError, match="'other' has offsets, and is not a selected table"):
        cqr.convert(plain, offsets={"other": [0, 5]}, dry_run=True)
    with pytest.raises(SpecError, match="offsets are 'many': give rows such as"):
        cqr.convert(plain, offsets=["many"], dry_run=True)
    with pytest.raises(CheckpointError, match="no such file"):
        cqr.convert(plain, offsets=["none.npy"], dry_run=True)
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match="is no array of numpy with offsets"):
        cqr.convert(plain, offsets=[str(tmp_path / "bad.npy")], dry_run=True)


def test_a_plan_and_a_size_keep_the_fields(fused: Path, tmp_path: Path) -> None:
    made = cqr.convert(fused, tmp_path / "s.safetensors", **OPTIONS, plan=tmp_path / "p.json")
    cqr.convert(fused, tmp_path / "t.safetensors", plan=tmp_path / "p.json")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    sized = cqr.convert(fused, method="trellis", effort="fast", size=made.file_bytes_after, dry_run=True)
    assert sized.tables[0].rows_stored_apart == 20


def test_small_fields_take_a_share_of_the_bytes() -> None:
    assert small_field_rows([0, 10, 1000, 1020], (5000, 16), 4, 100_000) == (*range(10), *range(1000, 1020))
    assert small_field_rows([0, 10, 1000, 1020], (5000, 16), 4, 15_000) == tuple(range(10))
    assert small_field_rows([0, 2500], (5000, 16), 4, 100_000) == ()


def test_means_of_fields() -> None:
    values = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    assert field_means(values, [0, 2]).tolist() == [2.0, 2.0, 20.0, 20.0, 20.0]
