"""Rules set the options of single tables: what a rule names is what happens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cqr_compress as cqr
from cqr_compress.errors import CheckpointError, SpecError, TableNotFoundError
from cqr_compress.planning.rules import read_rules
from cqr_compress.quantize.options import ConvertOptions

Run = Callable[..., Any]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Three tables, one of few rows, and a linear layer."""
    state = {
        "emb_l.0.weight": torch.randn(1500, 16),
        "emb_l.1.weight": torch.randn(40, 16),
        "user_embedding.weight": torch.randn(1500, 16),
        "out.weight": torch.randn(64, 64),
    }
    torch.save(state, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def methods(report: cqr.SizeReport) -> dict[str, str]:
    return {table.name: f"{table.method} {table.layout}" for table in report.tables}


PQ = {"method": "pq", "num_columns": 4, "n_bits": 4}


def test_each_table_gets_what_its_rule_says(tables: Path, tmp_path: Path) -> None:
    rules = ["emb_l.0=int8", "re:user=keep", "emb_l.1=pq,num_columns=2,n_bits=3", "out*=int4"]
    report = cqr.convert(tables, tmp_path / "s.safetensors", method="trellis", ratio=8, rules=rules)
    assert methods(report) == {
        "emb_l.0.weight": "int8 8b per value",
        "emb_l.1.weight": "pq 2x3b",  # however few rows it has
        "out.weight": "int4 4b per value",  # which is no table by itself
    }
    assert [(item.name, "rule 're:user=keep'" in item.reason) for item in report.left_dense] == [
        ("user_embedding.weight", True)
    ]


def test_a_rule_of_a_glob_holds_for_tables_that_were_found_and_the_first_rule_wins(tables: Path) -> None:
    report = cqr.convert(tables, rules={"emb_l.0.*": "keep", "*": PQ}, dry_run=True, min_rows=0)
    assert methods(report) == {"emb_l.1.weight": "pq 4x4b", "user_embedding.weight": "pq 4x4b"}


def test_options_of_another_method_are_not_taken_over(tables: Path) -> None:
    report = cqr.convert(tables, **PQ, rotation="pca", rules={"user*": "int8"}, dry_run=True)
    assert methods(report) == {"emb_l.0.weight": "pq 4x4b pca", "user_embedding.weight": "int8 8b per value"}
    held = cqr.convert(tables, **PQ, rotation="pca", rules={"user*": "num_columns=8"}, dry_run=True)
    assert methods(held)["user_embedding.weight"] == "pq 8x4b pca"


def test_a_rule_of_a_ratio_replaces_the_budget(tables: Path) -> None:
    report = cqr.convert(
        tables, method="trellis", effort="fast", ratio=8, rules={"user*": {"ratio": 16}}, dry_run=True
    )
    ratios = {table.name: table.ratio_bytes for table in report.tables}
    assert 8 <= ratios["emb_l.0.weight"] < 9 and 16 <= ratios["user_embedding.weight"] < 17


def test_tables_of_rules_take_their_part_of_a_size(tables: Path, tmp_path: Path) -> None:
    rules = {"emb_l.0": "int8", "emb_l.1": "method=pq"}
    options = cqr.ConvertOptions(method="trellis", size=70_000, effort="fast")
    report = cqr.convert(tables, tmp_path / "s.safetensors", options, rules=rules)
    assert 0.98 * 70_000 < report.file_bytes_after <= 70_000
    found = methods(report)
    assert found["emb_l.0.weight"] == "int8 8b per value" and found["emb_l.1.weight"].startswith("pq")
    assert found["user_embedding.weight"].startswith("trellis")
    ratios = {table.name: table.ratio_bytes for table in report.tables}
    assert ratios["user_embedding.weight"] > 4  # int8 takes 30,000 bytes, out.weight 16,384


def test_a_live_model_takes_rules() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(1500, 16), "b": nn.Embedding(1500, 16), "c": nn.Embedding(30, 16)})
    done = cqr.compress_(model, **PQ, rules={"a": "int8", "b": "keep", "c": "int4"})
    assert {layer.name: layer.spec and layer.spec.method for layer in done} == {
        "a.weight": "int8",
        "c.weight": "int4",
    }
    assert type(model["b"]) is nn.Embedding


def test_a_toml_file_has_rules(tables: Path, tmp_path: Path, cli: Run) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    file = tmp_path / "rules.toml"
    file.write_text('[rules]\n"emb_l.0.*" = "int8"\n"re:user" = { method = "pq", num_columns = 4, n_bits = 4 }\n')
    out = cli("convert", tables, "--rule", file, "--dry-run", "--method", "int4")
    assert "int8" in out.stdout and "pq 4x4b" in out.stdout
    found = read_rules(["emb_l.0=keep", str(file)])
    assert [rule.pattern for rule in found] == ["emb_l.0", "emb_l.0.*", "re:user"]  # in the order given
    file.write_text('rules = "int8"')
    with pytest.raises(SpecError, match="one table, \\[rules\\]"):
        read_rules(file)
    file.write_text("[rules")
    with pytest.raises(CheckpointError, match="not a TOML file"):
        read_rules(str(file))
    with pytest.raises(CheckpointError, match="no such file"):
        read_rules(tmp_path / "none.toml")
    file.write_text("[rules]\na = " + 3000 * "[" + 3000 * "]")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_rules(file)
    file.write_bytes(b"\xef\xbb\xbf[rules]\na = 'int8'\n")  # as editors of Windows save it
    assert [rule.pattern for rule in read_rules(file)] == ["a"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("emb_l.0", "is not PATTERN=ACTION: an action is keep, a method"),
        ("emb_l.0=int9", "is not PATTERN=ACTION"),
        ("emb_l.0=keep,ratio=8", "keeps tables dense: it can set nothing else"),
        ("emb_l.0=pq,method=rq", "sets method twice"),
        ("emb_l.0=ratio=x", "ratio is 'x': give a number"),
        ("emb_l.0=int8,num_columns=4", "rule 'emb_l.0=int8,num_columns=4': method 'int8' takes no num_columns"),
        ({"a": {"size": 100}}, "sets size, which is of the whole file"),
        ({"a": {"colour": 1}}, "sets colour, which is no option"),
        ({"a": 8}, "rule 'a' has"),
        ({"emb_l.0": {"n_bits": "many"}}, "n_bits is 'many'"),
        ("emb_l.0=exact_rows=x", "rule 'emb_l.0=exact_rows=x': exact_rows is 'x': give whole numbers"),
        ({"emb_l.0": {"exact_rows": [0, "1"]}}, "exact_rows is .*: give ids of rows"),
        ({"emb_l.0": {"keep": False}}, "has keep among settings"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_hold_is_named(tables: Path, rule: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cqr.convert(tables, rules=[rule] if isinstance(rule, str) else rule, dry_run=True)


def test_a_rule_of_an_excluded_table_is_an_error(tables: Path) -> None:
    with pytest.raises(
        SpecError, match="rule 'emb_l.0=int8' is of tables that are excluded, such as 'emb_l.0.wei"
    ):
        cqr.convert(tables, rules=["emb_l.0=int8"], exclude=["emb_l.0"], dry_run=True)
    report = cqr.convert(tables, rules=["emb_l*=int8"], exclude=["emb_l.0"], method="int4", dry_run=True)
    assert methods(report)["emb_l.1.weight"].startswith("int8")


def test_a_rule_without_a_table_is_an_error(tables: Path) -> None:
    with pytest.raises(TableNotFoundError, match="'item' matches no 2-D"):
        cqr.convert(tables, rules={"item": "int8"}, dry_run=True)


def test_patterns_may_contain_equal_signs() -> None:
    (rule,) = read_rules(["re:a(?=b)=pq,ratio=8"])
    assert rule.pattern == "re:a(?=b)" and rule.options(ConvertOptions()).ratio == 8.0


def test_a_rule_may_keep_a_row_exact(tables: Path) -> None:
    report = cqr.convert(tables, method="int8", rules=["emb_l.0=exact_rows=-1"], dry_run=True)
    assert [table.rows_stored_apart for table in report.tables] == [1, 0]
