"""Tiers of trellis-coded rows: where their codes are, how they are laid out, and what they gain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import cqr_compress as cqr
from cqr_compress.cli.app import app
from cqr_compress.errors import FormatError, ShapeError, SpecError
from cqr_compress.kernel import ops
from cqr_compress.kernel.trellis_ops import TrellisCodes, trellis_states
from cqr_compress.quantize.rates import errors_by_bytes
from cqr_compress.quantize.tiers import RankedRows, allocate_tiers
from cqr_compress.table.spec import TrellisSpec, spec_from_json
from cqr_compress.table.tiers import check_tiers, first_bytes, gather_codes, stored_codes, tier_tensors, tiers_of

needs_library = pytest.mark.skipif(not ops.available(), reason="there is no compiled library")


@st.composite
def tiered(draw: st.DrawFn) -> tuple[TrellisSpec, Tensor]:
    """A spec of 2 to 4 tiers, and the tier of each row."""
    sizes = draw(st.lists(st.integers(2, 30), min_size=2, max_size=4, unique=True))
    N = draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tiers = torch.randint(draw(st.integers(1, len(sizes))), (N,), generator=generator).byte()
    rows = tuple(torch.bincount(tiers, minlength=len(sizes)).tolist())
    base = {"method": "trellis", "num_embeddings": N, "embedding_dim": 30, "window": 8}
    return TrellisSpec(**base, tier_nbytes=tuple(sorted(sizes)), tier_rows=rows), tiers  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(tiered(), st.integers(0, 2**31))
def test_codes_of_tiers_are_found_and_written(case: tuple[TrellisSpec, Tensor], seed: int) -> None:
    spec, tiers = case
    N, sizes = len(tiers), torch.tensor(spec.tier_nbytes)[tiers.long()]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (spec.codes_nbytes,), generator=generator).byte()
    tensors = {"codes": codes, **tier_tensors(spec, tiers)}
    for short, tensor in tensors.items():
        shape = spec.body_shapes()[short]
        assert tuple(tensor.shape) == shape.shape and tensor.dtype == shape.dtype
    check_tiers(spec, tensors)
    ids = torch.randint(N, (40,), generator=generator)
    assert torch.equal(tiers_of(tensors, ids), tiers[ids].long())
    assert torch.equal(first_bytes(spec, tensors, ids), (sizes.cumsum(0) - sizes)[ids])
    every = gather_codes(spec, tensors, torch.arange(N))
    assert torch.equal(stored_codes(spec, every, tiers), codes)


@needs_library
@pytest.mark.parametrize("short", ["row_tiers", "tier_starts"])
@pytest.mark.parametrize("value", [0, -1, 2**30])
def test_the_compiled_lookup_reads_no_codes_outside_the_table(short: str, value: int) -> None:
    spec = TrellisSpec(
        method="trellis", num_embeddings=300, embedding_dim=8, window=8, tier_nbytes=(2, 5), tier_rows=(200, 100)
    )
    tiers = torch.tensor([0, 0, 1] * 100).byte()
    tensors = tier_tensors(spec, tiers)
    rates = torch.tensor([[2] * 8, [5] * 8], dtype=torch.uint8)
    codes = torch.zeros(spec.codes_nbytes, dtype=torch.uint8)

    def states() -> Tensor | None:
        places = (tensors[name].contiguous() for name in ("row_tiers", "tier_starts"))
        return trellis_states(torch.arange(300), TrellisCodes(codes, rates, 8, spec.tier_nbytes, 300, *places))

    assert states() is not None
    tensors[short] = torch.full_like(tensors[short], value & 255 if short == "row_tiers" else value)
    if int(tensors[short][0]) == 0:
        states()  # other rows of the table
    else:
        with pytest.raises(ShapeError, match="do not form a table"):
            states()
    tensors[short] = tensors[short][:-1]
    with pytest.raises(ShapeError, match="do not form a table"):
        states()


@pytest.mark.parametrize(
    "fields",
    [
        {"tier_nbytes": (4, 4)}, {"tier_nbytes": (5, 4)}, {"tier_nbytes": (2, 3, 4, 5, 6), "tier_rows": (1,) * 5},
        {"tier_rows": (9,)}, {"tier_rows": (4, 4)}, {"tier_rows": (10, -1)}, {"tier_nbytes": [3, "4"]},
        {"tier_nbytes": 4}, {"tier_nbytes": [3, True]}, {"tier_nbytes": (4,)}, {"tier_rows": ()},
    ],
)  # fmt: skip
def test_invalid_tiers_are_refused(fields: dict[str, object]) -> None:
    base = {
        "kind": "trellis", "method": "trellis", "num_embeddings": 9, "embedding_dim": 16, "tier_nbytes": [3, 4],
        "tier_rows": [5, 4],
    }  # fmt: skip
    spec = spec_from_json(base)
    assert isinstance(spec, TrellisSpec) and spec.codes_nbytes == 31
    assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(SpecError):
        spec_from_json({**base, **fields})


def best_of_all(importance: Tensor, errors: Tensor, num_bytes: int, num_tiers: int) -> float:
    """The least error of any sizes of rows, with at most `num_tiers` of them: an exhaustive search."""
    best = float("inf")
    ordered = importance.sort().values

    def fill(start: int, sizes: list[int], left: int, error: float) -> None:
        nonlocal best
        if start == len(ordered):
            best = min(best, error)
            return
        for size in range(sizes[-1] if sizes else 1, len(errors)):
            if len({*sizes, size}) <= num_tiers and size * (len(ordered) - start) <= left:
                fill(start + 1, [*sizes, size], left - size, error + float(ordered[start] * errors[size]))

    fill(0, [], num_bytes, 0.0)
    return best / float(importance.sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tiers", [1, 2, 3])
def test_tiers_are_close_to_the_best_of_all(seed: int, num_tiers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randn(7, generator=generator, dtype=torch.float64).exp()
    errors, num_bytes = 0.5 ** torch.arange(6, dtype=torch.float64), 17
    found = allocate_tiers(RankedRows.of(importance), errors, num_bytes, 1, num_tiers)
    assert found is not None and len(found.nbytes) <= num_tiers
    assert sum(found.rows) == 7 and sum(a * b for a, b in zip(found.rows, found.nbytes, strict=True)) <= num_bytes
    best = best_of_all(importance, errors, num_bytes, num_tiers)
    assert best - 1e-9 <= found.error <= 1.25 * best  # a price for bytes reaches the convex hull only


def test_tiers_of_equal_rows_use_all_bytes() -> None:
    errors = errors_by_bytes(torch.ones(16), 16, 10)
    found = allocate_tiers(RankedRows.of(torch.ones(1000).double()), errors, 7321, 7, 4)
    assert found is not None and found.nbytes == (7, 8) and found.rows == (679, 321)
    assert allocate_tiers(RankedRows.of(torch.ones(1000).double()), errors, 6999, 7, 4) is None


@pytest.mark.parametrize("num_bytes", [3 * 100, 25 * 100, 10**6])
def test_no_row_has_more_bytes_than_there_are_errors_of(num_bytes: int) -> None:
    errors = torch.tensor([1.0, 0.4, 0.1, 0.02], dtype=torch.float64)
    found = allocate_tiers(RankedRows.of(torch.arange(1.0, 101.0).double()), errors, num_bytes, 1, 4)
    assert found is not None and (found.nbytes, found.rows) == ((3,), (100,))


def test_errors_by_bytes_are_those_of_the_rates() -> None:
    variances = torch.rand(24).square().double()
    errors = errors_by_bytes(variances, 24, 10)
    assert len(errors) == 25 and float(errors[0]) == 1 and (errors.diff() < 0).all()


@pytest.fixture
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3000, 24, generator=generator) * torch.linspace(2, 0.3, 24)


def compressed(rows: Tensor, **options: object) -> tuple[nn.Module, cqr.CompressedLayer]:
    model = nn.ModuleDict({"item": nn.Embedding.from_pretrained(rows.clone())})
    return model, cqr.compress_(model, method="trellis", tables=["item.weight"], **options)[0]  # type: ignore


def test_frequent_rows_get_more_bytes(rows: Tensor) -> None:
    counts = (100_000 / torch.arange(1, 3001)).long()
    one = compressed(rows, bits_per_dim=2.5, max_tiers=1, frequencies={"item.weight": counts})[1]
    several = compressed(rows, bits_per_dim=2.5, frequencies={"item.weight": counts})[1]
    assert isinstance(several.spec, TrellisSpec) and several.spec.num_tiers >= 3
    assert several.spec.nbytes <= rows.numel() * 2.5 / 8
    assert one.quality is not None and several.quality is not None
    before, after = one.quality.weighted_relative_mse, several.quality.weighted_relative_mse
    assert before is not None and after is not None and after < 0.6 * before


def test_tiers_fill_the_budget_of_rows_without_weights(rows: Tensor) -> None:
    one, several = (compressed(rows, bits_per_dim=2.55, max_tiers=tiers)[1] for tiers in (1, None))
    assert one.spec is not None and several.spec is not None and one.quality and several.quality
    assert one.spec.nbytes < several.spec.nbytes <= rows.numel() * 2.55 / 8
    assert several.quality.relative_mse < one.quality.relative_mse


def test_a_file_of_tiers_is_converted_loaded_and_checked(rows: Tensor, tmp_path: Path) -> None:
    torch.save({"item.weight": rows}, tmp_path / "a.pt")
    np.save(tmp_path / "counts.npy", 3000 // np.arange(1, 3001) + 1)
    path = tmp_path / "a.cqr.safetensors"
    command = ["convert", str(tmp_path / "a.pt"), "-o", str(path), "--method", "trellis", "--ratio", "12"]
    result = CliRunner().invoke(app, [*command, "--frequencies", str(tmp_path / "counts.npy"), "--seed", "4"])
    assert result.exit_code == 0, result.output
    model = nn.ModuleDict({"item": nn.Embedding(3000, 24)})
    cqr.load_compressed(model, path)
    spec = model["item"].spec
    assert spec.num_tiers > 1
    wanted = cqr.load_dense_state_dict(path)["item.weight"]
    assert torch.allclose(model["item"].weight[torch.arange(3000)], wanted, atol=1e-6)
    for short in ("row_tiers", "tier_starts"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        header = json.loads(metadata["cqr_compress"])
        header.pop("checksums", None)
        tensors = load_file(path)
        tensors[f"item.{short}"][0] ^= 1
        changed = tmp_path / "changed.safetensors"
        save_file(tensors, changed, {"format": "cqr_compress", "cqr_compress": json.dumps(header)})
        with pytest.raises(FormatError):
            cqr.load_dense_state_dict(changed)


def test_tiers_of_one_option_are_one_tier(rows: Tensor) -> None:
    counts = {"item.weight": torch.arange(3000)}
    assert compressed(rows, ratio=8, max_tiers=1, frequencies=counts)[1].spec.num_tiers == 1  # type: ignore
    two = compressed(rows, ratio=8, max_tiers=2, frequencies=counts)[1].spec
    assert isinstance(two, TrellisSpec) and two.num_tiers == 2
    with pytest.raises(SpecError):
        cqr.ConvertOptions(method="pq", max_tiers=2)


def test_rows_are_ranked_only_for_tiers(tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ranked(*_: object) -> Tensor:
        raise AssertionError("the rows of a large table are not ranked")

    monkeypatch.setattr("cqr_compress.planning.scan.ScannedTable.importance", ranked)
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="trellis", ratio=8, max_tiers=1, effort="fast")
    with pytest.raises(AssertionError, match="not ranked"):
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="trellis", ratio=8, effort="fast", force=True)


def test_equally_weighted_rows_have_about_as_many_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 64, generator=generator) * torch.logspace(-1.5, 1, 3000)[:, None]
    torch.save({"emb.weight": rows}, tmp_path / "a.pt")

    def smallest_share(**more: object) -> float:
        (found,) = cqr.convert(
            tmp_path / "a.pt", tmp_path / "s.safetensors", method="trellis", ratio=12, window=8, rotation="pca",
            effort="fast", force=True, **more,
        ).tables  # fmt: skip
        sizes = [int(size) for size in found.layout.split("B")[0].split("/")]
        return sizes[0] / sizes[-1]

    assert smallest_share() > 0.6
    assert smallest_share(frequencies={"emb.weight": torch.linspace(1, 100, 3000).square()}) < 0.6


def test_a_table_of_one_block_is_written(tmp_path: Path) -> None:
    weights = torch.arange(96, 0, -1).double() ** 2
    torch.save({"item_embedding.weight": torch.randn(96, 8)}, tmp_path / "m.pt")
    report = cqr.convert(
        tmp_path / "m.pt",
        tmp_path / "s.safetensors",
        tables=["item_embedding.weight"],
        frequencies={"item_embedding.weight": weights},
        method="trellis",
        ratio=4.5,
    )
    assert "/" in report.tables[0].layout.split("B")[0]
    assert cqr.load_dense_state_dict(tmp_path / "s.safetensors")["item_embedding.weight"].isfinite().all()
