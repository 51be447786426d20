"""A plan in a file gives the next checkpoint of a model the same layouts, without trials."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cqr_compress as cqr
from cqr_compress.errors import (
    CheckpointError,
    CqrCompressWarning,
    FormatError,
    OutputError,
    ShapeError,
    SpecError,
    TableNotFoundError,
)
from cqr_compress.planning import choose

Run = Callable[..., Any]
RULES = {"b_embedding": "pq,num_columns=4,n_bits=4", "c_embedding": "int8"}


def save(path: Path, seed: int = 0, rows: int = 1500, dim: int = 16, **more: torch.Tensor) -> Path:
    torch.manual_seed(seed)
    rows_of_a = torch.randn(rows, dim) * torch.linspace(0.1, 2, rows)[:, None]  # tiers have less error
    state = {
        "a_embedding.weight": rows_of_a,
        "b_embedding.weight": torch.randn(rows, dim),
        "c_embedding.weight": torch.randn(rows, dim),
        "tiny_embedding.weight": torch.randn(20, dim),
        **more,
    }
    torch.save(state, path)
    return path


def layouts(report: cqr.SizeReport) -> list[tuple[str, str, str]]:
    return [(table.name, table.method, table.layout) for table in report.tables]


def test_the_same_checkpoint_gets_the_same_file_and_the_next_one_the_same_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, plan = save(tmp_path / "m.pt"), tmp_path / "plan.json"
    made = cqr.convert(
        first, tmp_path / "s.safetensors", method="trellis", ratio=16, seed=3, rules=RULES, plan=plan,
        rest_dtype="float16",
    )  # fmt: skip
    assert made.tables[0].layout.count("/") >= 1, "the trellis has tiers"

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan needs no trial")

    monkeypatch.setattr(choose, "search", never)
    monkeypatch.setattr(choose, "trial_fit", never)
    monkeypatch.setattr(choose, "estimate", never)
    again = cqr.convert(first, tmp_path / "t.safetensors", plan=plan)
    assert layouts(again) == layouts(made) and again.rest == made.rest
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    second = save(tmp_path / "n.pt", seed=1, rows=1731)
    later = cqr.convert(second, tmp_path / "u.safetensors", plan=plan, method="trellis", ratio=16)
    assert layouts(later) == layouts(made)
    assert [t.shape for t in later.tables] == [(1731, 16)] * 3 and later.seed == 3
    assert later.file_bytes_after == (tmp_path / "u.safetensors").stat().st_size
    errors = {t.name: t.relative_mse for t in later.tables}
    for table in made.tables:
        assert errors[table.name] == pytest.approx(table.relative_mse, rel=0.15)
    reasons = {item.name: item.reason for item in later.left_dense}
    assert "min_rows" in reasons["tiny_embedding.weight"]


def test_a_dry_run_writes_a_plan_that_the_command_follows(tmp_path: Path, cli: Run) -> None:
    ckpt, plan = save(tmp_path / "m.pt"), tmp_path / "plan.json"
    first = cli("convert", ckpt, "--method", "int4", "--plan", plan, "--dry-run", "--json")
    values = json.loads(plan.read_text())
    assert values["options"] == {"method": "int4"} and len(values["tables"]) == 3
    second = cli("convert", ckpt, "--plan", plan, "--json", "-o", tmp_path / "s.safetensors")
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert one["file_bytes_after"] == two["file_bytes_after"]
    assert [t["layout"] for t in one["tables"]] == [t["layout"] for t in two["tables"]]


def test_what_does_not_match_a_plan_is_named(tmp_path: Path) -> None:
    ckpt, plan = save(tmp_path / "m.pt"), tmp_path / "plan.json"
    cqr.convert(ckpt, method="pq", num_columns=4, n_bits=8, plan=plan, dry_run=True)
    with pytest.raises(SpecError, match="was made with n_bits 8, and 4 is given"):
        cqr.convert(ckpt, n_bits=4, plan=plan, dry_run=True)
    with pytest.raises(SpecError, match="was made with ratio None, and 8.0 is given"):
        cqr.convert(ckpt, ratio=8.0, plan=plan, dry_run=True)
    with pytest.raises(SpecError, match="says which tables are compressed"):
        cqr.convert(ckpt, tables=["a*"], plan=plan, dry_run=True)
    with pytest.raises(ShapeError, match="has 24 dimensions, and 16 in the plan"):
        cqr.convert(save(tmp_path / "wide.pt", dim=24), plan=plan, dry_run=True)
    torch.save({"a_embedding.weight": torch.randn(1500, 16)}, tmp_path / "less.pt")
    with pytest.raises(TableNotFoundError, match="has no 'b_embedding.weight', a table of the plan"):
        cqr.convert(tmp_path / "less.pt", plan=plan, dry_run=True)
    more = save(tmp_path / "more.pt", **{"d_embedding.weight": torch.randn(1500, 16)})
    with pytest.warns(CqrCompressWarning, match="'d_embedding.weight' stays dense: it is not in the plan"):
        cqr.convert(more, plan=plan, dry_run=True)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    ckpt, plan = save(tmp_path / "m.pt"), tmp_path / "plan.json"
    cqr.convert(ckpt, method="int8", plan=plan, dry_run=True)
    good = json.loads(plan.read_text())
    table = next(iter(good["tables"]))
    damaged = {
        "not a plan: give": {"kind": "size_report"},
        "plan schema 9": {**good, "schema_version": 9},
        "damaged plan: KeyError": {k: v for k, v in good.items() if k != "tables"},
        "damaged plan: .*kind": {**good, "tables": {table: {**good["tables"][table], "spec": {"kind": "x"}}}},
        "damaged plan: ValueError: an effort": {
            **good,
            "tables": {table: {**good["tables"][table], "effort": {"kmeans_iterations": 10**12}}},
        },
        "damaged plan: TypeError": {**good, "options": {"colour": "red"}},
        "damaged plan: SpecError": {**good, "options": {"method": "magic"}},
    }
    fields: dict[str, dict[str, Any]] = {
        "ValueError: a budget is '12'": {"budget": "12"},
        "ValueError: a budget is -5": {"budget": -5},
        "ValueError: a budget is an integer of": {"budget": 10**99},
        "ValueError: an error is nan": {"error": float("nan")},
        "ValueError: an error is '0.5'": {"error": "0.5"},
        "TypeError: a reason is a dict": {"reason": {}},
        "SpecError: method 'pq' has no layout": {"spec": {**good["tables"][table]["spec"], "method": "pq"}},
        "SpecError: method 'int4' has no layout": {"spec": {**good["tables"][table]["spec"], "method": "int4"}},
        "SpecError: method 'auto' has no layout": {"spec": {**good["tables"][table]["spec"], "method": "auto"}},
        "SpecError: method 'x' is not one of": {"spec": {**good["tables"][table]["spec"], "method": "x"}},
    }
    for message, changes in fields.items():
        damaged[f"damaged plan: {message}"] = {**good, "tables": {table: {**good["tables"][table], **changes}}}
    for message, values in damaged.items():
        plan.write_text(json.dumps(values))
        with pytest.raises(FormatError, match=message):
            cqr.convert(ckpt, plan=plan, dry_run=True)
    plan.write_text("no JSON")
    with pytest.raises(CheckpointError, match="is not JSON"):
        cqr.convert(ckpt, plan=plan, dry_run=True)


def test_a_table_that_is_too_small_for_its_layout_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cqr.convert(save(tmp_path / "m.pt"), method="qr", ratio=16, plan=plan, dry_run=True)
    with pytest.raises(ShapeError, match="of 9000 rows cannot have its layout in the plan .* distinguish"):
        cqr.convert(save(tmp_path / "more.pt", rows=9000), plan=plan, dry_run=True)
    with pytest.raises(ShapeError, match="of 30 rows has 1,920 bytes, and .* in the layout of the plan"):
        cqr.convert(save(tmp_path / "few.pt", rows=30), plan=plan, dry_run=True)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pq", "num_columns": 4, "n_bits": 4},
        {"method": "rq", "num_levels": 2, "n_bits": 4},
        {"method": "prq", "num_columns": 2, "num_levels": 2, "n_bits": 4},
        {"method": "cqr", "num_columns": 2, "n_bits": 4, "helper": "hashed"},
        {"method": "cqr", "num_columns": 2, "n_bits": 4, "helper": "stored"},
        {"method": "hash", "ratio": 8},
        {"method": "int4"},
    ],
)
def test_layouts_of_all_methods_are_followed(tmp_path: Path, options: dict[str, Any]) -> None:
    ckpt, plan = save(tmp_path / "m.pt"), tmp_path / "plan.json"
    made = cqr.convert(ckpt, **options, plan=plan, dry_run=True)
    assert layouts(cqr.convert(ckpt, plan=plan, dry_run=True)) == layouts(made)


@pytest.mark.parametrize("name", ["s.safetensors", "s.report.json", "s.safetensors.index.json"])
def test_a_plan_is_no_part_of_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="is the plan and a part of the output"):
        cqr.convert(save(tmp_path / "m.pt"), tmp_path / "s.safetensors", method="int8", plan=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
