"""Pages of reports: what they say, that they are self-contained and the same at each writing, and how they display."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cqr_compress as cqr
from cqr_compress.commands.labels import read_labels, read_names
from cqr_compress.commands.nearest import nearest_rows
from cqr_compress.commands.page import check_page
from cqr_compress.errors import (
    CheckpointError,
    FormatError,
    OutputError,
    OutputExistsError,
    ShapeError,
    SpecError,
    TableNotFoundError,
)
from cqr_compress.pages.text import abbreviated, clean, number, percent, shorten, size, times

pytest.importorskip("matplotlib", reason="pages need cqr-compress[report]")
pytest.importorskip("jinja2", reason="pages need cqr-compress[report]")
from cqr_compress.pages.page import render_page, render_plots
from cqr_compress.pages.style import COLOURS, SERIES

Cli = Callable[..., subprocess.CompletedProcess[str]]
HOSTILE = "a</svg><script>alert('1')</script>$x_1$\u202e\x07"
Json = dict[str, Any]


def size_report(**changes: Any) -> Json:
    table = {
        "name": "item.weight", "shape": [3000, 16], "dtype": "float32", "method": "trellis", "layout": "2B pca",
        "bytes_before": 192_000, "bytes_after": 24_000, "ratio_bytes": 8.0, "ratio_parameters": 9.0,
        "rows_stored_apart": 0, "relative_mse": 0.01234, "mean_cosine": 0.9931, "recall_at_10": 0.8125,
        "aliases": ["tied.weight"], "reason": "least error on a sample", "weighted_relative_mse": 0.004321,
    }  # fmt: skip
    return {
        "kind": "size_report", "schema_version": 2, "file": "out/small.safetensors", "source": "ckpt.pt",
        "measured": True, "file_bytes_before": 300_000, "file_bytes_after": 61_000, "tables_bytes_before": 192_000,
        "tables_bytes_after": 24_000, "optimizer_bytes": 8_000, "unbuilt_objects": [],
        "left_dense": [{"name": "pos.weight", "shape": [50, 16], "reason": "50 rows are few"}], "tables": [table],
        "version": "9.9", "seed": 3, "tuning": None, "evaluation": None,
        "rest": {"dtype": "float16", "narrowed": {"float32": ["out.bias"]}, "kept": {"bn.var": "a running statistic"},
                 "bytes_before": 100_000, "bytes_after": 37_000},
        "rate_distortion": {"item.weight": {
            "trials": [["1B", 12_000, 0.09], ["2B", 24_000, 0.0125], ["3B", 36_000, 0.0]],
            "curve": [[12_000, 0.085], [24_000, 0.012], [48_000, 0.001]], "bound": [[12_000, 0.05], [48_000, 0.0005]],
        }},
    } | changes  # fmt: skip


def tuning_report() -> Json:
    stages = [(0, "as given", 0.71), (0, "refit", 0.725), (100, "reassigned", 0.73), (200, "trained", 0.7441)]
    history = [
        {"step": step, "epoch": 0, "stage": stage, "metrics": {"auc": auc, "logloss": 0.5}, "best": True}
        for step, stage, auc in stages
    ]
    return {
        "kind": "tuning_report", "schema_version": 2, "task": "dlrm", "metric": "auc", "mode": "max",
        "dense": {"auc": 0.75, "logloss": 0.49}, "before": history[0]["metrics"], "after": history[-1]["metrics"],
        "improved": True, "summary": "auc 0.71 -> 0.7441", "best_step": 200, "steps": 300, "history": history,
        "log": [], "options": {}, "seconds": 12.0, "size": size_report(rate_distortion=None),
    }  # fmt: skip


def evaluation_report(num_files: int = 1) -> Json:
    bands = [
        {
            "name": "half of all uses",
            "num_ids": 41,
            "relative_mse": 0.00345,
            "mean_cosine": 0.9912,
            "recall_at_10": None,
        },
        {"name": "never used", "num_ids": 200, "relative_mse": None, "mean_cosine": None, "recall_at_10": None},
    ]
    quality = {"relative_mse": 0.01234, "mean_cosine": 0.9931, "recall_at_10": 0.8125}
    files = [
        {"file": f"small{i}.safetensors", "file_bytes": 61_000 + i, "metrics": {"auc": 0.7333},
         "tables": [{"name": "item.weight", "quality": quality, "bands": bands}]}
        for i in range(num_files)
    ]  # fmt: skip
    return {"kind": "evaluation_report", "schema_version": 2, "original": "ckpt.pt", "dense_bytes": 300_000,
            "dense": {"auc": 0.75}, "task": "dlrm", "metric": "auc", "files": files}  # fmt: skip


def sweep_report(with_task: bool = True) -> Json:
    points = [
        {"ratio": ratio, "file_bytes": int(300_000 / ratio), "relative_mse": error, "recall_at_10": 0.9,
         "metrics": {"auc": 0.75 * (1 - loss)} if with_task else None, "loss": loss if with_task else 0.1,
         "interval": [loss - 0.002, loss + 0.002] if with_task else None, "finetuned": tuned, "seconds": 7.0}
        for ratio, error, loss, tuned in ((4.0, 0.004, 0.001, False), (8.0, 0.03, 0.02, False), (8.0, 0.035, 0.0075, True))
    ]  # fmt: skip
    return {"kind": "sweep_report", "schema_version": 1, "source": "ckpt.pt", "task": "dlrm" if with_task else None,
            "metric": "auc" if with_task else "recall@10", "mode": "max",
            "dense_bytes": 300_000, "dense": {"auc": 0.75} if with_task else None,
            "max_loss": 0.01 if with_task else None, "points": points, "chosen": 2,
            "report": size_report() if with_task else None, "infeasible": {} if with_task else {"64": "too small"}}  # fmt: skip


def checkpoint_report() -> Json:
    tables = [
        {"name": f"t{i}.weight", "shape": [1000 * i, 16], "dtype": "float32", "nbytes": 64_000 * i, "share": 0.1 * i,
         "confidence": 0.9, "reason": "nn.Embedding", "aliases": [], "zero_rows": 3, "duplicate_rows": 4,
         "nonfinite_rows": 0, "effective_rank": 11.5,
         "relative_mse_at_ratio": {"8": 0.011, "16": 0.09, "32": None}}
        for i in range(1, 9)
    ]  # fmt: skip
    return {"kind": "checkpoint_report", "schema_version": 2, "file": "ckpt.pt", "format": "torch", "file_bytes": 2_500_000,
            "num_tensors": 12, "optimizer_bytes": 0, "unbuilt_objects": [], "tables": tables, "others": [],
            "warnings": ["'t9.weight' contains NaN"]}  # fmt: skip


def folder_report() -> Json:
    reports = [size_report(rate_distortion=None) for _ in range(2)]
    return {"kind": "folder_report", "folder": "out", "source": "in", "measured": True, "reports": reports,
            "copied": ["config.json"], "left_out": []}  # fmt: skip


NEIGHBOURS = [{
    "table": "item.weight", "base": 3000, "num_rows": 3000,
    "queries": [{"id": 7, "label": HOSTILE, "before": [[1, "Heat", 0.91], [2, "Ran", 0.9]],
                 "after": [[2, "Ran", 0.88], [3, "Alien", 0.87]]}],
}]  # fmt: skip
REPORTS: dict[str, Callable[[], Json]] = {
    "size": size_report, "plan": lambda: size_report(measured=False, rate_distortion=None), "tuning": tuning_report,
    "evaluation": evaluation_report, "evaluations": lambda: evaluation_report(3), "sweep": sweep_report,
    "sweep without a task": lambda: sweep_report(False), "checkpoint": checkpoint_report, "folder": folder_report,
}  # fmt: skip
SAID = {
    "size": ["300", "61,000 bytes", "item.weight = tied.weight", "3,000 × 16", "trellis 2B pca", "0.01234", "0.004321",
             "0.9931", "0.8125", "least error on a sample", "pos.weight", "50 rows are few", "float16", "bn.var",
             "a running statistic", "rate-distortion bound", "tried", "measured", "chosen", "cqr.load_compressed(model, ",
             "9.9, seed 3", "292,000", "4.79×"],
    "plan": ["a plan", "estimated"],
    "tuning": ["0.75", "0.7441", "refit", "reassigned", "written", "dlrm", "given file → written file", "logloss"],
    "evaluation": ["0.7333", "0.003450", "half of all uses", "41 ids", "−2.2%"],
    "evaluations": ["small2.safetensors", "61,002"[:2], "3 compressed files", "0.8125"],
    "sweep": ["Allowed loss: 1.0% of auc", "0.75%", "8× ★", "0.55% to 0.95%", "allowed loss, to 0.7425", "fine-tuned"],
    "sweep without a task": ["relative MSE", "0.03500", "8×", "dense 1.0000", "10% worse than the dense model", "no file of 64×: too small"],
    "checkpoint": ["t8.weight", "3 smaller tables", "11", "nn.Embedding (confidence 0.90)", "contains NaN", "estimated"],
    "folder": ["AutoModel.from_pretrained", "&#39;out&#39;", "1 other file copied", "in small.safetensors"],
}  # fmt: skip


@functools.cache
def page_of(name: str) -> str:
    return render_page(REPORTS[name](), NEIGHBOURS)


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_says_what_the_report_says(name: str) -> None:
    shown = page_of(name).replace("\N{NO-BREAK SPACE}", " ")
    assert [text for text in SAID[name] if text not in shown] == []
    assert len(shown.encode()) < 120_000


def test_a_page_is_the_same_at_each_writing() -> None:
    assert page_of("evaluation") == render_page(json.loads(json.dumps(evaluation_report())), NEIGHBOURS)


class Parser(HTMLParser):
    """Collects tags, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(str(value))
            elif key in ("href", "src", "xlink:href"):
                self.references.append(str(value))
            else:
                self.references += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", str(value))]


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_refers_to_nothing_outside_it_and_its_ids_are_unique(name: str) -> None:
    page = page_of(name)
    parser = Parser()
    parser.feed(page)
    assert "http" not in page and "@import" not in page
    assert len(set(parser.ids)) == len(parser.ids)
    assert {ref for ref in parser.references if not ref.startswith("#")} <= {"data:,"}
    assert {ref[1:] for ref in parser.references if ref.startswith("#")} == set(parser.ids)
    assert parser.tags.count("script") == 1 and not {"img", "iframe", "object"} & set(parser.tags)


def test_names_are_text_and_never_markup() -> None:
    report = size_report(source=HOSTILE, file=f"{HOSTILE}.safetensors")
    report["rate_distortion"] = {HOSTILE: report["rate_distortion"]["item.weight"]}
    report["tables"][0] |= {"name": HOSTILE, "reason": HOSTILE, "layout": HOSTILE, "method": HOSTILE}
    report["left_dense"][0] |= {"name": HOSTILE, "reason": HOSTILE}
    report["rest"]["kept"] = {HOSTILE: HOSTILE}
    tuning = tuning_report()
    tuning |= {"task": HOSTILE, "summary": HOSTILE, "metric": HOSTILE, "size": report}
    for metrics in (tuning["dense"], *(one["metrics"] for one in tuning["history"])):
        metrics[HOSTILE] = metrics.pop("auc")
    page = render_page(tuning, NEIGHBOURS)
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert "\u202e" not in page and "\x07" not in page
    assert "&lt;script&gt;alert" in page and "$x_1$" in page, "names are shown as they are"
    assert page.count("<svg") == page.count("</svg>")
    names = {"bytes", "rate-distortion-1-svg-script-alert-1-script-x-1-u202e-x07"}
    assert set(render_plots(report)) == {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}


def test_old_reports_and_reports_with_gaps_have_pages() -> None:
    report = size_report(rest=None, left_dense=[], rate_distortion=None)
    del report["rest"], report["rate_distortion"]
    report["tables"][0] |= dict.fromkeys(("relative_mse", "mean_cosine", "recall_at_10"))
    page = render_page(report)
    assert "Rate and distortion" not in page and "Other tensors in" not in page
    empty: Json = {"trials": [], "curve": [], "bound": []}
    gaps = [
        empty,
        {**empty, "bound": [[10, 0.5]]},
        {"trials": [["x", 0, 0.5], ["y", 10, None]]},
        {"curve": [[10, 0.5]]},
    ]
    report["tables"] = [{**report["tables"][0], "name": f"t{i}.weight"} for i in range(4)]
    page = render_page(report | {"rate_distortion": {f"t{i}.weight": gap for i, gap in enumerate(gaps)}})
    assert page.count("Chosen: trellis 2B pca") == 2, "a curve of nothing is left out"
    wild = tuning_report()
    wild["history"][2]["metrics"] = {"auc": float("nan"), "logloss": float("inf")}
    render_page(wild | {"dense": None, "size": None})
    render_page(sweep_report() | {"chosen": None, "report": None, "max_loss": None, "dense": None})
    with pytest.raises(FormatError, match="a report of kind 'x' has no page: give one of size_report"):
        render_page({"kind": "x"})


def test_charts_are_written_as_png_and_svg_in_the_same_bytes_each_time() -> None:
    report = tuning_report() | {"size": None}
    files = render_plots(report)
    assert files == render_plots(report)
    assert set(files) == {"fine-tuning.png", "fine-tuning.svg"}
    assert all(
        content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, content in files.items()
    )


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (None, 0.5, 1.0, 0.0123456, 3.2e-7, 123.456, float("nan"))] == [
        "–", "0.5000", "1.0000", "0.01235", "3.20×10⁻⁷", "123.46", "nan"
    ]  # fmt: skip
    assert [size(v).replace("\N{NO-BREAK SPACE}", " ") for v in (0, 1023, 1024, 15.63 * 2**20, 2**40)] == [
        "0 B", "1023 B", "1.00 KiB", "15.6 MiB", "1.00 TiB"
    ]  # fmt: skip
    assert (times(160, 10), times(12_345, 10), percent(0.0008), percent(-0.021), percent(0.5)) == (
        "16×", "1,234×", "0.08%", "−2.1%", "50%"
    )  # fmt: skip
    assert clean("a\ud800\n\u200fb") == r"a\ud800\n\u200fb" and shorten("model.embed.weight", 8) == "….weight"


def contrast(a: str, b: str) -> float:
    """Contrast of two colours by WCAG 2, section 1.4.3."""
    channels = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (a, b)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return float((high + 0.05) / (low + 0.05))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_the_contrast_that_accessibility_asks_for(scheme: int) -> None:
    colours = {name: both[scheme] for name, both in COLOURS.items()}
    text = ["ink", "muted", "accent", "warm", "rest", *SERIES]
    assert [name for name in text if contrast(colours[name], colours["surface"]) < 4.5] == []
    assert contrast(colours["ink"], colours["panel"]) > 4.5 and contrast(colours["faint"], colours["surface"]) > 3
    assert len(set(COLOURS.values())) == len(COLOURS), "a colour of a chart names one variable"


def test_commands_write_pages_and_charts(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("id,name\n" + "".join(f"{i},Film number {i}\n" for i in range(3000)))
    np.save(tmp_path / "counts.npy", np.arange(3000))
    done = cli("convert", ckpt, "-o", "s.safetensors", "--method", "int8", "--html", "c.html", "--plots", "plots")
    assert "wrote c.html" in done.stderr and "wrote plots" in done.stderr
    assert {"bytes.png", "bytes.svg"} <= {path.name for path in (tmp_path / "plots").iterdir()}
    labels, counts = "item_embedding.weight=items.csv", "item_embedding.weight=counts.npy"
    cli(
        "evaluate",
        "s.safetensors",
        "--original",
        ckpt,
        "--html",
        "e.html",
        "--labels",
        labels,
        "--frequencies",
        counts,
    )
    cli("inspect", ckpt, "--quick", "--html", "i.html")
    cli("inspect", "s.safetensors", "--html", "s.html")
    pages = {name: (tmp_path / f"{name}.html").read_text() for name in "ceis"}
    assert re.search(r"(5[5-9]|60) of 60 neighbours are kept", pages["e"]) and "Film number 2" in pages["e"]
    assert all("half of all uses" in pages[name] for name in "es"), "inspect shows the evaluation"
    assert all("item_embedding.weight" in page for page in pages.values())
    before = set(tmp_path.iterdir())
    again = cli("inspect", ckpt, "--html", "i.html", code=1)
    assert "'i.html' already exists. Pass --force to replace it." in again.stderr
    cli("inspect", ckpt, "--quick", "--html", "i.html", "--force")
    assert "already has files" in cli("convert", ckpt, "-o", "t.safetensors", "--plots", "plots", code=1).stderr
    assert "ends with .html" in cli("convert", ckpt, "-o", "t.safetensors", "--html", "t.txt", code=1).stderr
    assert "--html" in cli("convert", ckpt, "-o", "t.safetensors", "--labels", "items.csv", code=2).stderr
    (tmp_path / "more.csv").write_text("id,name\n3000,None\n")
    before.add(tmp_path / "more.csv")
    asked = ("convert", ckpt, "-o", "t.safetensors", "--html", "t.html", "--labels", "more.csv")
    assert "names id 3000, but the largest table has 3000 rows" in cli(*asked, code=1).stderr.replace("\n", " ")
    both = ("evaluate", "s.safetensors", "s.safetensors", "--original", ckpt, "--labels", "items.csv")
    assert "compare one file" in cli(*both, "--html", "x.html", code=2).stderr.replace("\n", " ")
    assert set(tmp_path.iterdir()) == before, "refused before the work"


def test_a_missing_extra_is_named_before_the_work(
    cli: Cli, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = cli("convert", ckpt, "-o", "s.safetensors", "--html", "c.html", code=1)
    assert done.stderr == (
        "error: pages and plots need jinja2, which is not installed: pip install 'cqr-compress[report]'\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    cli("inspect", ckpt, "--quick")  # without pages, nothing is needed


def test_a_page_is_written_from_python_and_never_replaces_what_it_must_not(ckpt: Path, tmp_path: Path) -> None:
    report = cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    cqr.write_page(report, tmp_path / "p.html", plots=tmp_path / "plots")
    assert (tmp_path / "p.html").read_text() == render_page(report.to_json())
    with pytest.raises(OutputExistsError, match="already exists"):
        cqr.write_page(report, tmp_path / "p.html")
    (tmp_path / "link.html").symlink_to(ckpt)
    with pytest.raises(OutputError, match="the checkpoint itself"):
        check_page(tmp_path / "link.html", None, force=True, reading=[ckpt])
    with pytest.raises(OutputError, match="is a file: give a folder"):
        check_page(None, ckpt)
    with pytest.raises(OutputError, match="Create it first"):
        check_page(None, tmp_path / "no" / "plots")
    with pytest.raises(OutputError, match="is the page: give another folder"):
        check_page(tmp_path / "new.html", tmp_path / "new.html")


def test_neighbours_are_those_of_a_search_by_hand(ckpt: Path, tmp_path: Path, table: torch.Tensor) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="pq", num_columns=4, n_bits=4, tables=["item*"])
    (tmp_path / "names.txt").write_text("".join(f"word{i}\n" for i in range(2000)) + "[unused]\n")
    (found,) = nearest_rows(ckpt, tmp_path / "s.safetensors", tmp_path / "names.txt", num_queries=4, k=3)
    assert (found["table"], found["base"], found["num_rows"]) == ("item_embedding.weight", 2001, 3000)
    decoded = cqr.load_dense_state_dict(tmp_path / "s.safetensors")["item_embedding.weight"].float()
    for query in found["queries"]:
        for side, rows in (("before", table[:2001]), ("after", decoded[:2001])):
            cosines = torch.nn.functional.cosine_similarity(rows, rows[query["id"]][None])
            cosines[query["id"]] = -2
            assert [i for i, _, _ in query[side]] == cosines.topk(3).indices.tolist()
            assert [c for *_, c in query[side]] == pytest.approx(cosines.topk(3).values.tolist(), abs=1e-3)
    assert nearest_rows(ckpt, tmp_path / "s.safetensors") == [], "nothing is compared without names"


def test_word_vectors_bring_their_own_names(tmp_path: Path) -> None:
    rows = torch.randn(300, 8).tolist()
    lines = [f"word{i} {' '.join(f'{v:.4f}' for v in row)}" for i, row in enumerate(rows)]
    (tmp_path / "v.txt").write_text("\n".join(["300 8", *lines]) + "\n")
    report = cqr.convert(tmp_path / "v.txt", tmp_path / "v.safetensors", method="int8", min_rows=0)
    cqr.write_page(report, tmp_path / "p.html", original=tmp_path / "v.txt")
    page = (tmp_path / "p.html").read_text()
    assert "Nearest neighbours" in page and "word" in page and "cqr.load_vectors(" in page


def test_names_are_read_from_vocabularies_tokenizers_and_tables(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("[PAD]\nthe\nof\n")
    vocabulary = {"Ġthe": 0, "Ã©": 1, "Ã": 2}
    bpe = {
        "model": {"vocab": vocabulary},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 3, "content": "<s>"}],
    }
    (tmp_path / "b.json").write_text(json.dumps(bpe))
    (tmp_path / "u.json").write_text(json.dumps({"model": {"vocab": [["<s>", 0.0], ["▁the", -3.2]]}}))
    (tmp_path / "t.csv").write_text('id,name\n5,"Heat, 1995"\n7,Ran\n')
    read = {path.name: read_names(path) for path in tmp_path.iterdir()}
    assert read["v.txt"] == {0: "[PAD]", 1: "the", 2: "of"}
    assert read["b.json"] == {0: " the", 1: "é", 2: "Ã", 3: "<s>"}
    assert read["u.json"] == {0: "<s>", 1: "▁the"}
    assert read["t.csv"] == {5: "Heat, 1995", 7: "Ran"}
    tables = {"a": 8, "b": 3, "c": 8}
    assert set(read_labels([tmp_path / "v.txt", f"a={tmp_path / 't.csv'}"], tables)) == {"a", "b"}
    with pytest.raises(TableNotFoundError, match="it matches a, c"):
        read_labels(tmp_path / "t.csv", tables)
    with pytest.raises(ShapeError, match="names id 7, but 'b' has 3 rows"):
        read_labels(f"b={tmp_path / 't.csv'}", tables)
    with pytest.raises(SpecError, match=r"are read from .txt, .json, .csv files"):
        read_names(tmp_path / "x.yaml")
    (tmp_path / "bad.csv").write_text("id,name\nx,y\n")
    with pytest.raises(CheckpointError, match="cannot read names of ids"):
        read_names(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no names of ids"),
        ("a.csv", "id,name\n1,x\n2\n", "line 3 of .* has no name: give id,name"),
        ("a.json", "[]", "is JSON, but no tokenizer.json, and no object of ids by name"),
        ("a.json", '{"model": 5}', "is JSON, but no tokenizer.json, and no object of ids by name"),
        ("a.json", '{"x": 1e400}', "cannot read names of ids"),
        ("a.json", '{"model": {"vocab": [[]]}}', "cannot read names of ids"),
    ],
)
def test_files_without_names_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_names(tmp_path / name)


def test_long_names_are_abbreviated() -> None:
    assert abbreviated("x" * 80) == "x" * 80 and abbreviated("a" + 99 * "b") == "a" + 78 * "b" + "…"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", function () {
  var found = [...document.querySelectorAll("svg text")].filter(e => e.getClientRects().length)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a);
  document.documentElement.dataset.found = JSON.stringify({
    width: document.documentElement.scrollWidth, inner: innerWidth, least: Math.min(...found, 99),
    back: getComputedStyle(document.body).backgroundColor, resources: performance.getEntriesByType("resource").length,
    buttons: document.querySelectorAll("button").length
  });
  parent.postMessage(document.documentElement.dataset.found, "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>
<script>addEventListener("message", function (e) { document.documentElement.dataset.found = e.data; });</script>"""


def displayed(folder: Path, page: str, phone: bool, dark: bool) -> tuple[Json, str]:
    """What a browser makes of a page with a script at its end, and what it logs."""
    (folder / "page.html").write_text(page.replace("</html>", f"{PROBE}</html>"))
    (folder / "frame.html").write_text(FRAME)
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--window-size=1280,900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000", "--dump-dom", str(folder / ("frame.html" if phone else "page.html")),
    ]  # fmt: skip
    done = subprocess.run([str(BROWSER), *arguments], capture_output=True, text=True, timeout=60)
    found = re.search(r'<html[^>]* data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"')), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(("phone", "dark"), [(False, False), (True, True)], ids=["desktop, light", "phone, dark"])
def test_a_browser_shows_pages_without_errors_or_sideways_scrolling(
    tmp_path: Path, phone: bool, dark: bool
) -> None:
    report = sweep_report()
    report["report"]["tables"][0]["name"] = "a.very.long.name.of.a.table." * 5 + HOSTILE
    report["report"]["tables"][0]["layout"] = "x" * 90
    report["report"]["evaluation"] = {**evaluation_report(), **evaluation_report()["files"][0]}
    seen, log = displayed(tmp_path, render_page(report, NEIGHBOURS), phone, dark)
    assert "CONSOLE" not in log, log
    assert seen["inner"] == (390 if phone else 1280) and seen["width"] <= seen["inner"]
    assert seen["least"] > 10, "letters of charts are legible"
    assert seen["back"] == ("rgb(19, 22, 25)" if dark else "rgb(254, 254, 254)")
    assert seen["resources"] == 0


@pytest.mark.parametrize(("weighted", "error"), [(0.004321, 0.004321), (None, 0.01234)])
def test_the_chosen_point_has_the_error_that_the_trials_have(
    monkeypatch: pytest.MonkeyPatch, weighted: float | None, error: float
) -> None:
    from cqr_compress.pages import size_sections

    drawn: list[Any] = []
    monkeypatch.setattr(size_sections, "draw_rate_distortion", lambda curves, chosen, width: drawn.append(chosen))
    report = size_report()
    report["tables"][0]["weighted_relative_mse"] = weighted
    section = size_sections.curves_section(report, "")
    assert section is not None
    section.charts[0].draw(700)
    assert drawn == [(24_000, error)]
