"""The smallest table that is good enough is found, and what is not reached is told."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import cqr_compress as cqr
from cqr_compress.errors import CqrCompressWarning, SpecError, TableNotFoundError
from cqr_compress.quantize.rates import rate_distortion_bound


@pytest.fixture
def one(tmp_path: Path) -> Path:
    scales = torch.linspace(0.2, 2, 16)
    torch.save({"embedding.weight": torch.randn(2500, 16) * scales}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.mark.parametrize("error", [0.3, 0.03, 0.001])
def test_the_error_is_at_most_what_was_asked_for_and_not_much_less(
    one: Path, tmp_path: Path, error: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = cqr.convert(
            one, tmp_path / "s.safetensors", method="trellis", max_error=error, effort="fast", rotation="pca"
        )
    (table,) = report.tables
    assert table.relative_mse is not None and 0.85 * error <= table.relative_mse <= error
    assert f"an error of at most {error:g}" in table.reason
    # the bytes of another error would differ by far more
    bits = 8 * table.bytes_after / (2500 * 16)
    smaller = cqr.convert(
        one, method="trellis", bits_per_dim=0.8 * bits, effort="fast", rotation="pca", dry_run=True
    )
    assert smaller.tables[0].relative_mse > error


def test_the_recall_is_reached(one: Path, tmp_path: Path) -> None:
    report = cqr.convert(one, tmp_path / "s.safetensors", method="trellis", min_recall=0.7, effort="fast")
    (table,) = report.tables
    assert table.recall_at_10 is not None and 0.695 <= table.recall_at_10 <= 0.75


def test_a_live_model_takes_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(1500, 16))
    (done,) = cqr.compress_(model, method="trellis", effort="fast", max_error=0.1)
    assert done.quality is not None and 0.08 <= done.quality.relative_mse <= 0.1


def test_a_table_that_cannot_be_good_enough_stays_dense(one: Path) -> None:
    with pytest.raises(TableNotFoundError, match="no smaller size of pq has a recall@10 of at least 0.9999"):
        cqr.convert(one, method="pq", num_columns=8, min_recall=0.9999, dry_run=True)


def test_a_method_of_one_size_and_two_budgets_are_refused(one: Path) -> None:
    with pytest.raises(SpecError, match="int8 with these options has one size"):
        cqr.convert(one, method="int8", max_error=0.1, dry_run=True)
    with pytest.raises(SpecError, match="both set the budget"):
        cqr.convert(one, ratio=8, max_error=0.1, dry_run=True)
    with pytest.raises(SpecError, match="max_error is 2"):
        cqr.convert(one, max_error=2.0, dry_run=True)


def test_a_file_that_misses_its_quality_is_told(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cqr_compress.planning import quality_budget

    monkeypatch.setattr(quality_budget, "_ERROR_MARGIN", 1.3)
    with pytest.warns(CqrCompressWarning, match="has an error of 0.1[0-9]* instead of 0.1, which the trials"):
        cqr.convert(one, tmp_path / "s.safetensors", method="trellis", max_error=0.1, effort="fast")


def test_a_report_has_the_trials_the_measured_sizes_and_the_bound(one: Path, tmp_path: Path) -> None:
    report = cqr.convert(one, tmp_path / "s.safetensors", method="trellis", max_error=0.05, effort="fast")
    assert report.rate_distortion is not None
    points = report.rate_distortion["embedding.weight"]
    layouts = {layout: (nbytes, error) for layout, nbytes, error in points["trials"]}
    chosen = report.tables[0]
    assert layouts[f"{chosen.method} {chosen.layout}"][0] == chosen.bytes_after
    assert len(points["curve"]) >= 3 and points["curve"] == sorted(points["curve"])
    variances = torch.load(one)["embedding.weight"].var(0)
    for nbytes, error in points["bound"]:
        bits = 8 * nbytes / 2500
        assert error == pytest.approx(
            rate_distortion_bound(variances, float(variances.sum()), bits), rel=0.05, abs=1e-6
        )
    for nbytes, error in points["curve"]:
        assert error >= rate_distortion_bound(variances, float(variances.sum()), 8 * nbytes / 2500)
    again = cqr.inspect(tmp_path / "s.report.json")
    assert again.rate_distortion == report.rate_distortion


def test_the_bound_is_that_of_reverse_water_filling() -> None:
    variances = torch.tensor([4.0, 1.0, 0.25])
    assert rate_distortion_bound(variances, 5.25, 0) == pytest.approx(1)
    # one bit to the first: it has a quarter of its variance, the level 1
    assert rate_distortion_bound(variances, 5.25, 1) == pytest.approx((1 + 1 + 0.25) / 5.25)
    # level 0.25: two bits to the first, one to the second
    assert rate_distortion_bound(variances, 5.25, 3) == pytest.approx(0.75 / 5.25)
    assert rate_distortion_bound(torch.zeros(3), 1.0, 1) == 0.0
