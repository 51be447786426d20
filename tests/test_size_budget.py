"""Budgets of whole files are met from below, and bytes go where they save most error."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cqr_compress as cqr
from cqr_compress.errors import BudgetError, SpecError, TableNotFoundError
from cqr_compress.planning.allocate import RatePoint, allocate_bytes, lower_hull


@st.composite
def curves(draw: st.DrawFn) -> dict[str, list[RatePoint]]:
    """Points of up to three tables, the last one dense."""
    found = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        sizes = sorted(draw(st.sets(st.integers(1, 60), min_size=2, max_size=5)))
        errors = draw(st.lists(st.floats(0.01, 1), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
        found[name] = [*map(RatePoint, sizes[:-1], errors), RatePoint(sizes[-1], 0.0)]
    return found


@settings(deadline=None, max_examples=200)
@given(curves(), st.integers(0, 200))
def test_no_choice_of_points_has_less_error_by_the_same_bytes(
    points: dict[str, list[RatePoint]], budget: int
) -> None:
    importance = {name: float(i + 1) for i, name in enumerate(points)}
    given_bytes = allocate_bytes(points, importance, budget)
    hulls = {name: lower_hull(each) for name, each in points.items()}
    if given_bytes is None:
        assert sum(hull[0].nbytes for hull in hulls.values()) > budget
        return
    assert sum(given_bytes.values()) <= budget + 1e-6
    error, largest_step = 0.0, 0.0
    for name, hull in hulls.items():
        (least,) = [p.error for p in hull if p.nbytes <= given_bytes[name]][-1:]
        error += importance[name] * least
        steps = [importance[name] * (a.error - b.error) for a, b in itertools.pairwise(hull)]
        largest_step = max([largest_step, *steps])
    for choice in itertools.product(*hulls.values()):
        if sum(point.nbytes for point in choice) <= budget:
            other = sum(importance[name] * p.error for name, p in zip(hulls, choice, strict=True))
            assert error <= other + 2 * largest_step + 1e-9  # the last step may be cut, or a dense table left out


def test_a_hull_has_no_point_above_a_line_between_two_others() -> None:
    points = [RatePoint(1, 1.0), RatePoint(2, 0.9), RatePoint(3, 0.2), RatePoint(4, 0.3), RatePoint(10, 0.0)]
    assert lower_hull(points) == [RatePoint(1, 1.0), RatePoint(3, 0.2), RatePoint(10, 0.0)]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two tables of one size, of which one has 100 times the energy, and a small one."""
    torch.manual_seed(0)
    state = {
        "strong_embedding.weight": 3 * torch.randn(1000, 16),
        "weak_embedding.weight": 0.3 * torch.randn(1000, 16),
        "small_embedding.weight": torch.randn(40, 16),
        "out.weight": torch.randn(64, 64),
    }
    torch.save(state, tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.mark.parametrize("size", [34_000, "45kB"])
def test_a_file_has_nearly_the_size_that_was_asked_for(tables: Path, tmp_path: Path, size: int | str) -> None:
    options = cqr.ConvertOptions(method="trellis", size=size, effort="fast")
    plan = cqr.convert(tables, tmp_path / "s.safetensors", options, dry_run=True)
    report = cqr.convert(tables, tmp_path / "s.safetensors", options)
    wanted = 45_000 if size == "45kB" else 34_000
    on_disk = (tmp_path / "s.safetensors").stat().st_size
    assert 0.99 * wanted <= on_disk == report.file_bytes_after == plan.file_bytes_after <= wanted
    errors = {table.name: table.relative_mse for table in report.tables}
    assert errors["strong_embedding.weight"] < errors["weak_embedding.weight"] / 3
    for table in plan.tables:
        assert table.relative_mse == pytest.approx(errors[table.name], rel=0.1)


@pytest.mark.parametrize("asked", [{"num_columns": 8, "num_levels": 1}, {"method": "int8"}])
def test_layouts_and_integers_are_planned_too(tables: Path, tmp_path: Path, asked: dict[str, object]) -> None:
    options = cqr.ConvertOptions(size=80_000, effort="fast", **asked)  # type: ignore[arg-type]
    assert cqr.convert(tables, tmp_path / "s.safetensors", options).file_bytes_after <= 80_000


def test_a_size_of_a_method_without_codes_is_refused(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be estimated"):
        cqr.convert(tables, tmp_path / "s.safetensors", method="hash", size=50_000)


def test_equal_weights_give_equal_tables_equal_bytes(tables: Path, tmp_path: Path) -> None:
    report = cqr.convert(
        tables, tmp_path / "s.safetensors", method="trellis", file_ratio=4, weight="equal", effort="fast"
    )
    sizes = {table.name: table.bytes_after for table in report.tables}
    assert sizes["strong_embedding.weight"] == pytest.approx(sizes["weak_embedding.weight"], rel=0.1)
    model_bytes = report.model_bytes_before
    assert 0.99 * model_bytes / 4 <= report.file_bytes_after <= model_bytes / 4


@pytest.mark.parametrize(("size", "error"), [(10_000, BudgetError), (10**7, TableNotFoundError)])
def test_sizes_that_cannot_be_and_need_not_be_are_refused(
    tables: Path, tmp_path: Path, size: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        cqr.convert(tables, tmp_path / "s.safetensors", method="trellis", size=size, effort="fast")
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize(
    "fields", [{"size": "much"}, {"size": -5}, {"size": 1.5}, {"size": "9" * 400}, {"size": 9, "ratio": 4}]
)
def test_sizes_that_are_none_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="size"):
        cqr.ConvertOptions(**fields)  # type: ignore[arg-type]


def test_a_model_in_memory_has_no_file() -> None:
    model = torch.nn.ModuleDict({"item": torch.nn.Embedding(2000, 16)})
    with pytest.raises(SpecError, match="of a file"):
        cqr.compress_(model, size=50_000)


def test_a_size_may_be_that_of_the_smallest_rows(tmp_path: Path) -> None:
    state = {f"{name}_embedding.weight": torch.randn(2000, 32) for name in "ab"}
    torch.save(state, tmp_path / "m.pt")
    one = cqr.convert(tmp_path / "m.pt", effort="fast", ratio=70, dry_run=True)
    assert all(table.bytes_after < 2 * 2000 for table in one.tables)  # rows of a byte
    both = cqr.convert(tmp_path / "m.pt", effort="fast", size=one.file_bytes_after + 200, dry_run=True)
    assert both.file_bytes_after <= one.file_bytes_after + 200
