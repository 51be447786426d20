"""A sweep measures sizes against the user's own metric, chooses the smallest good one, and goes on after a stop."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress.commands import sweep_run
from cqr_compress.errors import BudgetError, CheckpointError, OutputExistsError, SpecError, TaskError
from cqr_compress.finetuning.paired import loss_interval, relative_loss
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.planning import size_budget

N, D = 1500, 16
OPTIONS: dict[str, Any] = {"method": "trellis", "effort": "fast"}
TASK = """
import torch
from torch import nn

metric, mode = "{metric}", "{mode}"

def model():
    return nn.ModuleDict({{"embedding": nn.Embedding(1500, 16)}})

def direction():
    return torch.randn(16, generator=torch.Generator().manual_seed(1))

def train_batches(epoch):
    ids = torch.randint(1500, (20, 128), generator=torch.Generator().manual_seed(epoch))
    noise = torch.Generator().manual_seed(1000 + epoch)
    return [(batch, table()[batch] @ direction() + 0.1 * torch.randn(128, generator=noise)) for batch in ids]

def table():
    return torch.load({ckpt!r})["embedding.weight"]

def loss(model, batch):
    return (model["embedding"](batch[0]) @ direction() - batch[1]).square()

def evaluate(model):
    values = model["embedding"].weight @ direction()
    errors = (values - table() @ direction()).square() + 1.0
    return {{"error": errors, "accuracy": float(1 / errors.mean())}}
"""


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save({"embedding.weight": torch.randn(N, D) * torch.linspace(0.2, 1.5, D)}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def task_file(ckpt: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    def write(metric: str, mode: str) -> Path:
        path = tmp_path / f"task_{metric}.py"
        path.write_text(TASK.format(metric=metric, mode=mode, ckpt=str(ckpt)))
        return path

    return write


def test_without_a_task_the_metric_is_the_recall_of_the_rows(ckpt: Path, tmp_path: Path) -> None:
    report = cqr.sweep(ckpt, ratios=(16, 4, 8), **OPTIONS)
    assert [point.ratio for point in report.points] == [4, 8, 16] and report.task is None
    for point in report.points:
        held = cqr.inspect(point.file)
        assert isinstance(held, cqr.SizeReport) and held.file_bytes_after == point.file_bytes
        assert point.loss == pytest.approx(1 - held.tables[0].recall_at_10)
        assert point.relative_mse == held.tables[0].relative_mse and point.interval is None
    losses = [point.loss for point in report.points]
    assert losses == sorted(losses) and report.chosen is None
    assert (tmp_path / "m.sweep" / "sweep.json").exists()


def test_the_smallest_file_with_an_allowed_loss_is_found_and_copied(ckpt: Path, tmp_path: Path) -> None:
    report = cqr.sweep(ckpt, tmp_path / "s.safetensors", max_loss=0.2, ratios=(4, 16), **OPTIONS)
    assert report.chosen is not None and len(report.points) >= 4  # two steps of the ladder and bisections
    allowed = [point for point in report.points if point.loss <= 0.2]
    best = report.points[report.chosen]
    assert best.file_bytes == min(point.file_bytes for point in allowed)
    above = min(point.ratio for point in report.points if point.loss > 0.2)
    assert best.ratio < above < 1.25 * best.ratio
    assert (tmp_path / "s.safetensors").read_bytes() == Path(best.file).read_bytes()
    held = cqr.inspect(tmp_path / "s.report.json")
    assert held == report.report and held.file == str(tmp_path / "s.safetensors")


@pytest.mark.parametrize(("metric", "mode"), [("error", "min"), ("accuracy", "max")])
def test_the_loss_is_that_of_the_task(
    ckpt: Path, task_file: Callable[[str, str], Path], metric: str, mode: str
) -> None:
    task = task_file(metric, mode)
    report = cqr.sweep(ckpt, task=task, ratios=(8, 32), **OPTIONS)
    assert report.dense == {"error": 1.0, "accuracy": 1.0} and report.metric == metric
    found = cqr.evaluate([point.file for point in report.points], original=ckpt, task=task)
    for point, one in zip(report.points, found.files, strict=True):
        assert one.metrics is not None and point.metrics == pytest.approx(one.metrics, rel=1e-6)
        worse = one.metrics[metric] - 1 if mode == "min" else 1 - one.metrics[metric]
        assert point.loss == pytest.approx(worse, rel=1e-5) and point.loss > 0
        if metric == "error":  # which has a value for each example
            assert point.interval is not None and point.interval[0] < point.loss < point.interval[1]
        else:
            assert point.interval is None
    assert report.points[0].loss < report.points[1].loss


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_metric_that_no_loss_is_relative_to_is_named(
    ckpt: Path, task_file: Callable[[str, str], Path], value: float
) -> None:
    task = dataclasses.replace(load_task_file(task_file("error", "min")), evaluate=lambda model: {"error": value})
    with pytest.raises(TaskError, match="error of the dense model is .*: give another metric"):
        cqr.sweep(ckpt, task=task, ratios=(8,), **OPTIONS)
    assert not list(ckpt.with_suffix(".sweep").iterdir())


def test_metrics_that_only_some_models_have_are_left_out(ckpt: Path, cli: Callable[..., Any]) -> None:
    task = ckpt.with_name("task.py")
    text = TASK.format(metric="error", mode="min", ckpt=str(ckpt))
    task.write_text(text + "\n_evaluate, _names = evaluate, iter('abc')\n\n\ndef evaluate(model):\n"
                    "    return _evaluate(model) | {next(_names): 1.0}\n")  # fmt: skip
    done = cli("sweep", ckpt, "--task", task, "--method", "trellis", "--effort", "fast", "--ratios", "8")
    assert "accuracy" in done.stdout


def test_fine_tuned_files_are_measured(ckpt: Path, task_file: Callable[[str, str], Path]) -> None:
    options = cqr.FinetuneOptions(epochs=1, codes="frozen")
    task = task_file("error", "min")
    plain = cqr.sweep(ckpt, task=task, ratios=(32,), **OPTIONS)
    tuned = cqr.sweep(
        ckpt, task=task, ratios=(32,), finetune_options=options, folder=ckpt.with_suffix(".t"), **OPTIONS
    )
    assert tuned.points[0].finetuned and tuned.points[0].file.endswith("32x.tuned.safetensors")
    assert tuned.points[0].loss < plain.points[0].loss


def test_several_tables_share_the_bytes(tmp_path: Path) -> None:
    state = {"a_embedding.weight": 3 * torch.randn(N, D), "b_embedding.weight": 0.3 * torch.randn(N, D)}
    torch.save(state, tmp_path / "m.pt")
    report = cqr.sweep(tmp_path / "m.pt", ratios=(8,), **OPTIONS)
    held = cqr.inspect(report.points[0].file)
    assert isinstance(held, cqr.SizeReport)
    sizes = {table.name: table.bytes_after for table in held.tables}
    assert sizes["a_embedding.weight"] > 1.3 * sizes["b_embedding.weight"]
    assert 0.97 < sum(sizes.values()) * 8 / (2 * N * D * 4) <= 1


def test_the_tables_are_measured_once_for_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(
        {"a_embedding.weight": torch.randn(N, D), "b_embedding.weight": torch.randn(N, D)}, tmp_path / "m.pt"
    )
    measure, measured = size_budget.measure_sizes, []

    def counted(scan: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(scan.entry.name)
        return measure(scan, *args, **kwargs)

    monkeypatch.setattr(size_budget, "measure_sizes", counted)
    cqr.sweep(tmp_path / "m.pt", ratios=(8, 16), **OPTIONS)
    assert measured == ["a_embedding.weight", "b_embedding.weight"]


def test_a_sweep_that_was_stopped_measures_what_is_missing(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []
    convert = sweep_run.convert

    def counted(source: Any, output: Path, *args: Any, **kwargs: Any) -> Any:
        converted.append(Path(output).name)
        if len(converted) == 2:
            raise KeyboardInterrupt
        return convert(source, output, *args, **kwargs)

    monkeypatch.setattr(sweep_run, "convert", counted)
    with pytest.raises(KeyboardInterrupt):
        cqr.sweep(ckpt, ratios=(4, 8), **OPTIONS)
    report = cqr.sweep(ckpt, ratios=(4, 8, 16), **OPTIONS)
    assert converted == ["4x.safetensors", "8x.safetensors", "8x.safetensors", "16x.safetensors"]
    assert [point.ratio for point in report.points] == [4, 8, 16]
    again = cqr.sweep(ckpt, ratios=(4, 8, 16), **OPTIONS)
    assert again == report and len(converted) == 4


def test_results_of_another_sweep_are_not_taken(ckpt: Path, tmp_path: Path) -> None:
    cqr.sweep(ckpt, ratios=(8,), **OPTIONS)
    with pytest.raises(OutputExistsError, match="has a sweep that differs in options: give another --folder"):
        cqr.sweep(ckpt, ratios=(8,), **OPTIONS, seed=1)
    report = cqr.sweep(ckpt, ratios=(8,), **OPTIONS, seed=1, force=True)
    held = cqr.inspect(report.points[0].file)
    assert isinstance(held, cqr.SizeReport) and held.seed == 1
    torch.save({"embedding.weight": torch.randn(N, D)}, ckpt)
    with pytest.raises(OutputExistsError, match="differs in modified"):
        cqr.sweep(ckpt, ratios=(8,), **OPTIONS, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="exists, and no sweep made it"):
        cqr.sweep(ckpt, ratios=(8,), folder=tmp_path / "other", **OPTIONS)
    (tmp_path / "other" / "sweep.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not the state of a sweep"):
        cqr.sweep(ckpt, ratios=(8,), folder=tmp_path / "other", **OPTIONS)


def test_other_counts_are_another_sweep(ckpt: Path, tmp_path: Path) -> None:
    counts, offsets = tmp_path / "counts.npy", {"embedding.weight": [0, 500]}
    for place in range(2):
        np.save(counts, np.arange(N) + place)
        given = {"frequencies": counts, "offsets": offsets}
        if place:
            with pytest.raises(OutputExistsError, match="differs in selection"):
                cqr.sweep(ckpt, ratios=(8,), **given, **OPTIONS)
        else:
            assert len(cqr.sweep(ckpt, ratios=(8,), **given, **OPTIONS).points) == 1
            with pytest.raises(OutputExistsError, match="differs in selection"):
                cqr.sweep(ckpt, ratios=(8,), frequencies=counts, offsets={"embedding.weight": [0, 501]}, **OPTIONS)


def test_offsets_of_many_fields_are_no_name_of_a_file(ckpt: Path) -> None:
    offsets = [f"embedding.weight={','.join(map(str, range(0, N, 4)))}"]
    assert len(cqr.sweep(ckpt, ratios=(8,), offsets=offsets, **OPTIONS).points) == 1


def test_a_sweep_that_was_stopped_in_its_first_size_goes_on(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "_mean", stopped)  # after the file was written
    with pytest.raises(KeyboardInterrupt):
        cqr.sweep(ckpt, ratios=(8,), **OPTIONS)
    monkeypatch.undo()
    assert len(cqr.sweep(ckpt, ratios=(8,), **OPTIONS, seed=1).points) == 1  # there is no result to be replaced


def test_files_that_are_no_longer_those_measured_are_made_again(ckpt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m.sweep"
    first = cqr.sweep(ckpt, ratios=(4, 8), **OPTIONS)
    file = folder / "8x.safetensors"
    content = file.read_bytes()
    changes: list[Callable[[], object]] = [
        lambda: file.write_bytes(content[:5000]),
        (folder / "8x.report.json").unlink,
        file.unlink,
    ]
    for change in changes:
        change()
        again = cqr.sweep(ckpt, tmp_path / "s.safetensors", max_loss=0.2, ratios=(4, 8), force=True, **OPTIONS)
        assert file.read_bytes() == content and again.points[1].loss == first.points[1].loss


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file", "../secret.safetensors"), ("file", "/etc/passwd"), ("file", 5), ("file", "4x.safetensors"),
        ("ratio", "8"), ("ratio", 3), ("file_bytes", "1"), ("loss", None), ("loss", 10**400), ("interval", 5),
        ("interval", [1]), ("metrics", {"auc": 1}), ("seconds", "x"), ("finetuned", "no"), ("extra", 1),
    ],
)  # fmt: skip
def test_damaged_results_are_refused(ckpt: Path, tmp_path: Path, name: str, value: Any) -> None:
    point = {
        "ratio": 8.0, "file": "8x.safetensors", "file_bytes": 100, "relative_mse": 0.1, "recall_at_10": 0.9,
        "metrics": None, "loss": 0.1, "interval": None, "finetuned": False, "seconds": 1.0,
    }  # fmt: skip
    state = {"kind": "sweep_state", "identity": {"task": None}, "points": {"8x": point}, "infeasible": {}}
    (tmp_path / "m.sweep").mkdir()
    file = tmp_path / "m.sweep" / "sweep.json"
    file.write_text(json.dumps(state))
    with pytest.raises(OutputExistsError, match="has a sweep that differs in source"):
        cqr.sweep(ckpt, ratios=(8,), **OPTIONS)
    file.write_text(json.dumps({**state, "points": {"8x": {**point, name: value}}}))
    with pytest.raises(CheckpointError, match="sweep.json' is damaged: .*Error: .* give another --folder"):
        cqr.sweep(ckpt, ratios=(8,), **OPTIONS)
    for wrong in (
        {"points": {"8x": 5}},
        {"points": []},
        {"infeasible": []},
        {"infeasible": {"8x": 5}},
        {"identity": 5},
    ):
        file.write_text(json.dumps({**state, **wrong}))
        with pytest.raises(CheckpointError, match="is damaged"):
            cqr.sweep(ckpt, ratios=(8,), **OPTIONS)


def test_ratios_that_are_equal_in_six_digits_are_one(ckpt: Path) -> None:
    assert [point.ratio for point in cqr.sweep(ckpt, ratios=(8, 8.0000001), **OPTIONS).points] == [8]
    with pytest.raises(SpecError, match="give numbers above 1"):
        cqr.sweep(ckpt, ratios=(1.0000001,))


def test_a_file_of_rules_that_changed_is_another_sweep(ckpt: Path, tmp_path: Path) -> None:
    pytest.importorskip("tomllib", reason="it is new in Python 3.11")
    rules = tmp_path / "rules.toml"
    rules.write_text('[rules]\n"embedding" = "n_bits=4"\n')
    options: dict[str, Any] = {"method": "pq", "ratios": (8,), "rules": [rules]}
    first = cqr.sweep(ckpt, **options)
    assert cqr.sweep(ckpt, **options) == first
    rules.write_text('[rules]\n"embedding" = "n_bits=6"\n')
    with pytest.raises(OutputExistsError, match="differs in selection"):
        cqr.sweep(ckpt, **options)


def test_what_cannot_be_swept_is_told(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="ratio is given, and a sweep tries several"):
        cqr.sweep(ckpt, ratio=8)
    with pytest.raises(SpecError, match="an output without max_loss"):
        cqr.sweep(ckpt, tmp_path / "s.safetensors")
    with pytest.raises(SpecError, match="fine-tuning without a task"):
        cqr.sweep(ckpt, finetune_options=cqr.FinetuneOptions())
    with pytest.raises(SpecError, match="max_loss is 1.5"):
        cqr.sweep(ckpt, max_loss=1.5)
    with pytest.raises(SpecError, match="ratios are"):
        cqr.sweep(ckpt, ratios=(0.5,))
    with pytest.raises(BudgetError, match="loses at most 0%: .*x loses .*%, the least of"):
        cqr.sweep(ckpt, tmp_path / "s.safetensors", max_loss=0.0, ratios=(8,), **OPTIONS)
    assert not (tmp_path / "s.safetensors").exists()


def test_a_ratio_that_no_layout_fits_is_listed(ckpt: Path) -> None:
    report = cqr.sweep(ckpt, ratios=(8, 1000), **OPTIONS)
    assert [point.ratio for point in report.points] == [8]
    assert "cannot compress" in report.infeasible["1000x"]


def test_the_command_prints_the_sizes_and_marks_the_chosen_one(
    ckpt: Path, task_file: Callable[[str, str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    task = task_file("error", "min")
    common = ("--task", task, "--method", "trellis", "--effort", "fast", "--ratios", "4,32")
    done = cli("sweep", ckpt, *common, "--max-loss", "1%", "-o", tmp_path / "s.safetensors")
    assert "* the smallest file that loses at most 1%, written to" in done.stdout
    assert "cqr.load_compressed(model" in done.stdout and (tmp_path / "s.safetensors").exists()
    assert "dense" in done.stdout and "95% interval" in done.stdout
    values = json.loads(cli("sweep", ckpt, *common, "--json").stdout)
    assert values["kind"] == "sweep_report" and len(values["points"]) == 2
    assert "error: --max-loss" in cli("sweep", ckpt, "--max-loss", "much", code=2).stderr.replace(
        "Invalid value", "error"
    )
    rows = cli("sweep", ckpt, "--ratios", "8", "--method", "int8", "--folder", tmp_path / "f", "--force")
    assert "the model's own metric may differ" in rows.stdout and "8x: cannot compress" in rows.stdout


def test_the_interval_covers_the_loss_of_all_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        dense = 1 + torch.rand(400, generator=generator)
        values = dense - 0.02 + 0.2 * torch.randn(400, generator=generator)
        low, high = loss_interval(dense, values, "max", seed)
        covered += low <= 0.02 / 1.5 <= high
    assert 88 <= covered <= 100
    assert relative_loss(2.0, 1.5, "max") == 0.25 and relative_loss(2.0, 1.5, "min") == -0.25
    equal = torch.rand(50)
    assert loss_interval(equal, equal, "max") == (0.0, 0.0)


def test_metrics_of_examples_are_their_means() -> None:
    def task(found: Any) -> cqr.Task:
        return cqr.Task(
            name="x", model=nn.Identity, train_batches=lambda epoch: [], loss=lambda m, b: torch.zeros(1),
            evaluate=lambda model: {"x": found}, metric="x",
        )  # fmt: skip

    values: list[Tensor | list[float] | float] = [torch.tensor([1.0, 2.0]), [1.0, 2.0], 1.5]
    assert [task(copy.copy(found)).measure(nn.Identity()) for found in values] == [{"x": 1.5}] * 3
    for wrong in ("1.5", [], ["a"], None):
        with pytest.raises(TaskError, match="have to be numbers"):
            task(wrong).measure(nn.Identity())


def test_a_built_in_task_sweeps_a_dense_checkpoint(tmp_path: Path, cli: Callable[..., Any]) -> None:
    users, items = torch.randn(N, D), torch.randn(N, D)
    torch.save({"user_embedding.weight": users, "item_embedding.weight": items}, tmp_path / "m.pt")
    ids = torch.randint(N, (4000, 2))
    clicks = torch.bernoulli((users[ids[:, 0]] * items[ids[:, 1]]).sum(1).sigmoid()).long()
    rows = [f"{user},{item},{click}" for (user, item), click in zip(ids.tolist(), clicks.tolist(), strict=True)]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,label", *rows]))
    task = ("--task", "gmf", "--train-file", "clicks.csv", "--effort", "fast", "--method", "trellis")
    done = cli("sweep", "m.pt", *task, "--ratios", "8,16", "--html", "page.html")
    assert "gmf" in done.stdout and done.stdout.count("x") > 2 and (tmp_path / "page.html").exists()
    converted = cli("convert", "m.pt", *task, "--ratio", "16", "--weight", "task", "--json")
    values = json.loads(converted.stdout)
    assert all("sensitivity of the task's loss" in table["reason"] for table in values["tables"])
    assert values["tables_bytes_after"] <= 2 * N * D * 4 / 16
