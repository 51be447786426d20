"""A sweep that measures several sizes at once, or writes a folder, finds what one at a time finds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep import OPTIONS, TASK, D, N

import cqr_compress as cqr
from cqr_compress.commands import apart
from cqr_compress.commands.apart import call_apart, fitting_jobs
from cqr_compress.commands.sweep_report import SweepPoint
from cqr_compress.commands.sweep_run import SweepRun
from cqr_compress.errors import BudgetError, OutputExistsError, ProcessError, SpecError
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.progress import NoProgress
from cqr_compress.quantize.options import ConvertOptions

CPU = torch.device("cpu")


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    torch.save({"embedding.weight": torch.randn(N, D) * torch.linspace(0.2, 1.5, D)}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


class TwoWordsError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def act(word: str, folder: str) -> str:
    """Do what a word says, in another process."""
    if word == "refuse":
        raise BudgetError("too few bytes")
    if word == "two words":
        raise TwoWordsError("a", "b")
    if word == "exit":
        sys.exit("no data")
    if word == "kill":
        if (pid := os.fork()) == 0:  # a program that holds the pipe, and outlives its parent
            time.sleep(60)
            (Path(folder) / "ended").touch()
            os._exit(0)
        (Path(folder) / "pid").write_text(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait":
        (Path(folder) / "waits.partial").touch()
        try:
            time.sleep(120)
        finally:
            (Path(folder) / "waits.partial").unlink()
    warnings.warn("look", cqr.CqrCompressWarning, stacklevel=1)
    return f"{word} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another kind of system")
def test_calls_apart_return_results_errors_and_warnings(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    killed = tmp_path_factory.mktemp("killed")
    words = ["refuse", "warn", "two words", "exit", "kill", "wait"]
    found: dict[str, Any] = {}
    with pytest.warns(cqr.CqrCompressWarning, match="look") as caught:
        calls = call_apart(
            act, [(word, str(killed if word == "kill" else tmp_path)) for word in words], len(words)
        )
        for index, result in calls:
            found[words[index]] = result
            if len(found) == 5:
                break
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        calls.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())  # its clean-up was run
    assert found["warn"] == "warn 1 1" and caught[0].filename == __file__
    assert isinstance(found["refuse"], BudgetError) and str(found["refuse"]) == "too few bytes"
    assert [type(found[word]) for word in ("two words", "exit", "kill")] == [ProcessError] * 3
    assert "TwoWordsError: a b" in str(found["two words"]) and "sys.exit('no data')" in str(found["exit"])
    assert "SIGKILL: memory may have been short" in str(found["kill"])
    os.kill(int((killed / "pid").read_text()), signal.SIGKILL)
    assert not (killed / "ended").exists()  # nothing waited for it


def test_what_other_processes_cannot_get_is_refused_before_the_work(ckpt: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"ratios": (8, 16), "folder": tmp_path / "f", "jobs": 2}
    task = tmp_path / "task.py"
    task.write_text(TASK.format(metric="error", mode="min", ckpt=str(ckpt)))
    with pytest.raises(SpecError, match="cannot be pickled"):
        cqr.sweep(ckpt, task=lambda: load_task_file(task), **common)
    with pytest.raises(SpecError, match="cannot be pickled"):
        cqr.sweep(ckpt, task=load_task_file(task), **common)
    with pytest.raises(SpecError, match="jobs is 0"):
        cqr.sweep(ckpt, **common | {"jobs": 0})
    with pytest.raises(SpecError, match="is the output or in it"):
        cqr.sweep(ckpt, tmp_path / "f", max_loss=0.1, **common)
    assert not (tmp_path / "f").exists()
    script = tmp_path / "script.py"
    script.write_text(
        f"import cqr_compress as cqr\ncqr.sweep({str(ckpt)!r}, jobs=2, method='pq', ratios=(8, 16, 24))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "needs `if __name__ == '__main__':`" in done.stderr
    assert len(list((tmp_path / "m.sweep").glob("*x.safetensors"))) == 1  # the first one, and by the script itself


def test_as_many_sizes_run_at_once_as_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_peak_bytes", lambda: 1000)
    for free, jobs in ((8500, 4), (2500, 2), (10, 1), (None, 4)):
        monkeypatch.setattr(apart, "_free_bytes", lambda free=free: free)
        assert fitting_jobs(4, CPU) == jobs
    monkeypatch.undo()
    assert apart._peak_bytes() > 2**20 or os.name == "nt"
    free = apart._free_bytes()
    assert free is None or free > 2**20


def test_sizes_that_are_measured_at_once_are_those_of_one_at_a_time(ckpt: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(TASK.format(metric="error", mode="min", ckpt=str(ckpt)))
    one, two = (
        cqr.sweep(ckpt, task=task, ratios=(8, 16, 32), jobs=jobs, folder=tmp_path / f"{jobs}.sweep", **OPTIONS)
        for jobs in (1, 2)
    )
    for mine, theirs in zip(one.points, two.points, strict=True):
        assert Path(mine.file).read_bytes() == Path(theirs.file).read_bytes()
        assert (mine.ratio, mine.loss, mine.interval) == (theirs.ratio, theirs.loss, theirs.interval)


@pytest.mark.parametrize("jobs", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("limit", [1.2, 3.7, 4, 21, 64, 300, 5000])
def test_the_search_finds_the_same_size_whatever_the_jobs(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, limit: float
) -> None:
    calls: list[int] = []

    def measure(run: SweepRun, ratios: Sequence[float]) -> Iterator[tuple[float, SweepPoint | BudgetError]]:
        calls.append(len(ratios))
        for ratio in ratios:
            yield ratio, SweepPoint(
                ratio=ratio, file=f"{ratio:g}x.safetensors", file_bytes=int(1e6 / ratio), relative_mse=0.0,
                recall_at_10=1.0, metrics=None, loss=float(ratio > limit), interval=None, finetuned=False, seconds=1.0,
            )  # fmt: skip

    monkeypatch.setattr(SweepRun, "_measure", measure)
    selection: dict[str, Any] = dict.fromkeys(("tables", "exclude", "rules", "offsets", "frequencies"), ())
    run = SweepRun.prepare(
        ckpt, tmp_path / "s", ConvertOptions(), None, None, CPU, NoProgress(), selection, False, None, jobs
    )
    points = run.search((4.0, 8.0, 16.0, 32.0, 64.0), 0.5)
    allowed = [point.ratio for point in points if point.loss == 0]
    above = [point.ratio for point in points if point.loss]
    if limit < 4:
        assert not above or max([1.0, *allowed]) <= limit < min(above)
    elif limit > 2048:
        assert max(allowed) == 2048
    else:
        assert max(allowed) <= limit < min(above) and min(above) / max(allowed) < 2 ** (1.3 / 8)
    assert calls[0] == 1 and max(calls) <= jobs


def test_the_folder_of_a_model_is_written_with_the_chosen_size(
    tmp_path: Path, cli: Callable[..., Any], ckpt: Path
) -> None:
    model = tmp_path / "model"
    (model / "extra").mkdir(parents=True)
    ckpt.rename(model / "pytorch_model.bin")
    (model / "config.json").write_text('{"model_type": "bert", "torch_dtype": "float32"}')
    (model / "extra" / "vocab.txt").write_text("word\n")
    common = ("--max-loss", "30%", "--ratios", "4,8", "--method", "trellis", "--effort", "fast")
    small, sizes = tmp_path / "small", tmp_path / "sizes"
    done = cli("sweep", model, *common, "-o", small, "--folder", sizes)
    assert f"written to {small}" in done.stdout and "AutoModel.from_pretrained" in done.stdout
    written = (small / "model.safetensors").read_bytes()
    assert written in [file.read_bytes() for file in sizes.glob("*x.safetensors")]
    config = json.loads((small / "config.json").read_text())
    assert list(config["quantization_config"]["tables"]) == ["embedding.weight"]
    assert (small / "extra" / "vocab.txt").exists() and "Compressed embedding" in (small / "README.md").read_text()
    report = cqr.inspect(small / "model.report.json")
    assert isinstance(report, cqr.SizeReport) and report.file == str(small / "model.safetensors")
    with pytest.raises(OutputExistsError):
        cqr.sweep(model, small, max_loss=0.3)
    (model / "extra" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match="2 files of weights"):
        cqr.sweep(model, tmp_path / "other", max_loss=0.3)
    assert not (tmp_path / "model.sweep").exists()


def test_the_results_of_a_sweep_are_no_part_of_the_model(tmp_path: Path, ckpt: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    ckpt.rename(model / "model.bin")
    (model / "a.txt").write_text("a")
    for folder in (None, model / "sizes"):
        small = tmp_path / f"small{folder is None}"
        cqr.sweep(model, small, max_loss=0.9, ratios=(8,), folder=folder, **OPTIONS)
        assert sorted(path.name for path in small.iterdir()) == [
            "README.md", "a.txt", "model.report.json", "model.safetensors"
        ]  # fmt: skip
    assert (tmp_path / "model.sweep" / "sweep.json").exists()
