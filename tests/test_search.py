"""The search among layouts: what it tries, what it finds, and what it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cqr_compress as cqr
from cqr_compress.checkpoint.base import TensorEntry
from cqr_compress.model.compress import _InMemory
from cqr_compress.planning.choose import TablePlan, plan_table
from cqr_compress.planning.scan import scan_table
from cqr_compress.planning.search import worth_trying
from cqr_compress.planning.trial_fit import estimate_error
from cqr_compress.progress import NoProgress
from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.layouts import budget_bytes
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.spec import CodebookSpec

Cli = Callable[..., subprocess.CompletedProcess[str]]


class Recorder(NoProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.texts: list[str] = []
        self.done = 0

    def start(self, label: str, total: int, unit: str) -> None:
        self.stages.append((label, total))
        self.done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def status(self, text: str) -> None:
        self.texts.append(text)


def plan(rows: Tensor, recorder: Recorder | None = None, **fields: object) -> TablePlan:
    options = ConvertOptions(**fields)  # type: ignore[arg-type]
    scan = scan_table(TensorEntry("emb.weight", _InMemory(rows)), (), "error", 0, options.max_sample)
    return plan_table(scan, options, recorder)


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_auto_is_no_worse_than_any_single_method(table: Tensor, ratio: int) -> None:
    def error(method: str, **fields: object) -> float:
        model = torch.nn.ModuleDict({"emb": torch.nn.Embedding.from_pretrained(table[:1500].clone())})
        try:
            (layer,) = cqr.compress_(model, method=method, ratio=ratio, **fields)
        except cqr.CqrCompressError:
            return float("inf")
        assert layer.quality is not None
        return layer.quality.relative_mse

    others = {method: error(method) for method in ("pq", "rq", "prq", "cqr")}
    others["opq"] = error("pq", rotation="opq")
    assert error("auto") <= 1.01 * min(others.values()), others


def test_trials_are_counted_and_the_best_one_is_shown(table: Tensor) -> None:
    recorder = Recorder()
    found = plan(table, recorder, method="auto", ratio=16)
    assert {label for label, _ in recorder.stages} == {"choosing a layout for emb.weight"}
    assert recorder.done == recorder.stages[-1][1] and sum(total for _, total in recorder.stages) > 20
    assert all(re.fullmatch(r"best 0\.\d+ \((\d+x.*b|[\d/]+B).*\)", text) for text in recorder.texts)
    assert found.error is not None and f"({found.error:.4f} relative)" in found.reason


def test_more_effort_tries_more_and_finds_no_less(table: Tensor) -> None:
    recorders = {effort: Recorder() for effort in ("fast", "normal", "max")}
    found = {
        effort: plan(table[:1100], recorder, ratio=16, effort=effort) for effort, recorder in recorders.items()
    }
    counts = [recorder.done for recorder in recorders.values()]
    assert counts == sorted(set(counts))
    errors = [one.error for one in found.values() if one.error is not None]
    assert len(errors) == 3 and errors[-1] < 1.02 * errors[0]
    with pytest.raises(cqr.CqrCompressError, match="effort is 'much'"):
        ConvertOptions(effort="much")


def test_layouts_that_their_codebooks_leave_few_codes_are_not_tried() -> None:
    rows = torch.randn(30_000, 384, generator=torch.Generator().manual_seed(0))
    options = ConvertOptions(method="pq", ratio=8)
    scan = scan_table(TensorEntry("emb.weight", _InMemory(rows)), (), "error", 0, options.max_sample)
    budget = budget_bytes(scan.facts, options)
    assert budget is not None
    fitting = [spec for spec in method_of("pq").layouts(options, scan.facts) if spec.nbytes <= budget]
    tried = worth_trying(fitting)
    sizes = {spec.codebook_size for spec in tried if isinstance(spec, CodebookSpec)}
    assert 1 <= len(tried) < 8 and max(sizes) <= 1024
    assert any(isinstance(spec, CodebookSpec) and spec.codebook_size == 4096 for spec in fitting)


@pytest.mark.parametrize("method", ["auto", "pq"])
def test_a_rank_that_is_given_is_tried_for_many_dimensions(method: str) -> None:
    rows = torch.randn(1500, 160, generator=torch.Generator().manual_seed(0))
    rotation = "opq" if method == "pq" else None
    found = plan(rows, method=method, rotation=rotation, rank=80, ratio=16.0, effort="fast", refine_rounds=0).spec
    assert isinstance(found, CodebookSpec) and found.rank == 80


def test_a_dry_run_prints_the_estimated_error(cli: Cli, few_rows: Path, tmp_path: Path) -> None:
    planned = cqr.convert(few_rows, tmp_path / "s.safetensors", ratio=16, effort="fast", dry_run=True)
    measured = cqr.convert(few_rows, tmp_path / "s.safetensors", ratio=16, effort="fast")
    for before, after in zip(planned.tables, measured.tables, strict=True):
        assert before.relative_mse is not None and after.relative_mse is not None
        assert before.relative_mse == pytest.approx(after.relative_mse, rel=0.15)
    only = cqr.convert(few_rows, tmp_path / "s.safetensors", method="pq", num_columns=4, n_bits=4, dry_run=True)
    assert all(table.relative_mse is not None and 0 < table.relative_mse < 1 for table in only.tables)
    arguments = ("-o", "t.safetensors", "--method", "pq", "--num-columns", "4", "--n-bits", "4", "--dry-run")
    shown = cli("convert", "ckpt.pt", *arguments).stdout
    assert f"{only.tables[0].relative_mse:.4f}" in shown and "predicted, nothing written" in shown


@pytest.mark.parametrize(("method", "num_columns", "num_levels"), [("pq", 2, 1), ("prq", 2, 3)])
def test_an_estimate_from_few_rows_is_the_error_of_a_fit_to_all(
    method: str, num_columns: int, num_levels: int
) -> None:
    scan = scan_table(TensorEntry("emb.weight", _InMemory(torch.randn(24_000, 16))))
    spec = CodebookSpec(
        method=method, num_embeddings=24_000, embedding_dim=16, num_columns=num_columns, num_levels=num_levels,
        codebook_size=64, code_sources=("stored",) * num_levels,
    )  # fmt: skip
    effort = FitEffort(kmeans_iterations=10, refine_rounds=2, restarts=1)
    few, all_ = (estimate_error(scan, spec, effort, num_rows) for num_rows in (1500, 24_000))
    assert few == pytest.approx(all_, rel=0.04)
