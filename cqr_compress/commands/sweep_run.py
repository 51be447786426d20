"""One sweep: what all of its sizes share, the results so far, and the measuring of a size."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import atomic_file
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.apart import call_apart, fitting_jobs
from cqr_compress.commands.convert import convert
from cqr_compress.commands.finetune import finetune
from cqr_compress.commands.sweep_report import RECALL, SweepPoint, SweepReport
from cqr_compress.commands.sweep_state import STATE_FILE, held_point, identity_of, read_state
from cqr_compress.errors import BudgetError, ProcessError, SpecError, TaskError
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.paired import loss_interval, relative_loss
from cqr_compress.finetuning.sensitivity import Sensitivity, measure_sensitivity
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_model import evaluate_examples, load_model
from cqr_compress.planning.find import find_tables, with_table_names
from cqr_compress.planning.rules import read_rules
from cqr_compress.planning.size_budget import Curves
from cqr_compress.progress import NoProgress, Progress
from cqr_compress.quantize.options import ConvertOptions

DEFAULT_RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
_SMALLEST, _LARGEST = 1.5, 2048.0
_BISECTIONS = 3
_ROUNDED = 1.3  # ratios have three digits: the last bisection leaves nearly what it should
_log = logging.getLogger(__name__)


@dataclass
class SweepRun:
    """One sweep: what all of its sizes share, and the results so far."""

    source: Path
    folder: Path
    options: ConvertOptions
    task: Task | None
    finetune_options: FinetuneOptions | None
    device: torch.device
    progress: Progress
    selection: Mapping[str, Any]
    sensitivity: Sensitivity
    dense_bytes: int
    dense: dict[str, Tensor] | None
    state: dict[str, Any]
    make_task: Callable[[], Task] | None = None
    jobs: int = 1
    measured: Curves = field(default_factory=dict)
    knows_memory: bool = False

    @classmethod
    def prepare(
        cls, source: Path, folder: Path, options: ConvertOptions, task: Task | None,
        finetune_options: FinetuneOptions | None, device: torch.device, progress: Progress,
        selection: Mapping[str, Any], force: bool, make_task: Callable[[], Task] | None, jobs: int,
    ) -> SweepRun:  # fmt: skip
        """Open the folder, evaluate the dense model, and measure the sensitivity of its tables, once."""
        with open_checkpoint(source) as opened:
            checkpoint = with_table_names(opened)
            rules = read_rules(selection["rules"])
            candidates = find_tables(checkpoint, selection["tables"], selection["exclude"], rules)
            names = [c.name for c in candidates if c.selected and (c.named or c.shape[0] >= options.min_rows)]
            dense_bytes = max(opened.file_bytes - opened.optimizer_bytes, 0)
            of_files = {**selection, "rules": [rule.text for rule in rules]}  # a file of rules may change
            identity = identity_of(opened.path, opened.file_bytes, options, task, finetune_options, of_files)
            state = read_state(folder, identity, force)
            sensitivity = Sensitivity()
            if task is not None and names:
                try:
                    sensitivity = measure_sensitivity(task, checkpoint, names, options.seed, device, progress)
                except (SpecError, TaskError) as e:  # of tables that the training loss does not use, for instance
                    _log.info("tables are compared by their energy: %s", e)
        if options.weight is None and len(names) > 1:
            weight = "task" if sensitivity.counts else "energy"
            options = replace(options, weight=weight, ratio=DEFAULT_RATIOS[0])
        dense = None
        if task is not None:
            progress.start("evaluating the dense model", 0, "runs")
            dense = evaluate_examples(task, load_model(task, source, options.seed, device), options.seed)
            value = float(dense[task.metric].mean())
            if not value or not math.isfinite(value):
                raise TaskError(
                    f"{task.metric} of the dense model is {value:g}, which no loss can be relative to: give "
                    "another metric"
                )
        return cls(
            source, folder, options, task, finetune_options, device, progress, selection, sensitivity, dense_bytes,
            dense, state, make_task, jobs,
        )  # fmt: skip

    def ladder(self, ratios: Sequence[float]) -> list[SweepPoint]:
        """Measure all ratios; those that no layout fits are left out."""
        found = self.points(ratios, 0)
        return [point for ratio in ratios if (point := found[ratio]) is not None]

    def search(self, ratios: Sequence[float], max_loss: float) -> list[SweepPoint]:
        """Find the largest ratio whose loss is allowed, by the ladder and bisections between two of its steps.

        With several jobs, as many steps are measured at once, and the interval is cut into one part more.
        """
        tried: dict[float, SweepPoint | None] = {}
        low, high = 1.0, math.inf

        def narrow(several: Sequence[float], later: int) -> None:
            nonlocal low, high
            tried.update(self.points(several, later))
            for ratio in several:
                point = tried[ratio]
                if point is None or point.loss > max_loss:
                    high = ratio
                    return
                low = ratio

        steps = list(_steps(ratios))
        while steps and high == math.inf:
            several = min(self.jobs, len(ratios))
            now, steps = steps[:several], steps[several:]
            narrow(now, sum(ratio <= ratios[-1] for ratio in steps) + _BISECTIONS)
        searching = high < math.inf and (low > 1 or high > _SMALLEST)
        target = (high / low) ** (_ROUNDED / 2**_BISECTIONS) if searching else math.inf
        while high / low > target:
            several = min(self.jobs, 2**_BISECTIONS - 1)
            cuts = [low * (high / low) ** (i / (several + 1)) for i in range(1, several + 1)]
            inner = sorted({float(f"{cut:.3g}") for cut in cuts} - tried.keys())
            if not inner:
                break
            rounds = math.log(math.log(high / low) / math.log(target)) / math.log(several + 1)
            narrow(inner, several * (math.ceil(rounds) - 1))
        return sorted((p for p in tried.values() if p is not None), key=lambda point: point.ratio)

    def points(self, ratios: Sequence[float], later: int) -> dict[float, SweepPoint | None]:
        """Return sizes, from the results so far or measured; None for one that no layout fits.

        The first one is measured alone: its memory tells how many can be measured at once.

        Args:
            ratios: of the sizes.
            later: number of sizes that will follow, for the time left.
        """
        found, missing = dict[float, SweepPoint | None](), list[float]()
        for ratio in ratios:
            name = f"{ratio:g}x"
            held = held_point(self.folder, self.state, name)
            if held is None and name not in self.state["infeasible"]:
                missing.append(ratio)
            else:
                found[ratio] = held
        if missing:
            self._write_state()  # so that a sweep that is stopped in its first size is one
        while missing:
            now = missing if self.knows_memory and self.jobs > 1 else missing[:1]
            missing = missing[len(now) :]
            for left, (ratio, result) in zip(range(len(now) - 1, -1, -1), self._measure(now), strict=True):
                found[ratio] = self._recorded(ratio, result, left + len(missing) + later)
            if not self.knows_memory and self.jobs > 1 and found[now[0]] is not None:
                self.knows_memory = True
                fitting = fitting_jobs(self.jobs, self.device)
                if fitting < self.jobs:
                    _log.info("memory is left for %d sizes at once", fitting)
                    self.jobs = fitting
        return found

    def _measure(self, ratios: Sequence[float]) -> Iterator[tuple[float, SweepPoint | BudgetError]]:
        """Measure sizes, several in processes of their own."""
        if len(ratios) == 1:
            try:
                yield ratios[0], self.measured_point(ratios[0], self.progress)
            except BudgetError as e:
                yield ratios[0], e
            return
        self.progress.start(f"measuring {', '.join(f'{ratio:g}x' for ratio in ratios)}", len(ratios), "sizes")
        alone = replace(self, task=None, progress=NoProgress())
        for index, result in call_apart(_measured_apart, [(alone, ratio) for ratio in ratios], self.jobs):
            if isinstance(result, ProcessError):
                raise ProcessError(f"{ratios[index]:g}x: {result}")
            if isinstance(result, Exception) and not isinstance(result, BudgetError):
                raise result
            self.progress.advance()
            yield ratios[index], result

    def _recorded(self, ratio: float, result: SweepPoint | BudgetError, left: int) -> SweepPoint | None:
        """Write a result to the folder."""
        name = f"{ratio:g}x"
        if isinstance(result, BudgetError):
            self.state["infeasible"][name] = str(result).split("\n")[0]
            self._write_state()
            _log.info("%s: no layout fits", name)
            return None
        self.state["points"][name] = {**asdict(result), "file": Path(result.file).name}
        self._write_state()
        _log.info("%s", self._line(result, left))
        return result

    def measured_point(self, ratio: float, progress: Progress) -> SweepPoint:
        """Convert, fine-tune and evaluate.

        Raises:
            BudgetError: no layout fits.
        """
        began, file = time.monotonic(), self.folder / f"{ratio:g}x.safetensors"
        progress = _Prefixed(progress, f"{ratio:g}x: ")
        options = replace(self.options, ratio=ratio)
        task = self.sensitivity if self.sensitivity.counts else None
        report = convert(
            self.source, file, options, task=task, force=True, progress=progress, measured=self.measured,
            **self.selection,
        )  # fmt: skip
        examples = None
        if self.task is not None and self.finetune_options is not None:
            tuned = file.with_suffix(".tuned.safetensors")
            finetune(
                file, tuned, self.task, self.finetune_options, original=self.source, device=self.device,
                force=True, progress=progress,
            )  # fmt: skip
            file, report = tuned, read_report(tuned)
        if self.task is not None:
            progress.start("evaluating", 0, "runs")
            model = load_model(self.task, file, options.seed, self.device)
            examples = evaluate_examples(self.task, model, options.seed)
        metrics, loss, interval = self._loss(report, examples)
        return SweepPoint(
            ratio=ratio, file=str(file), file_bytes=report.file_bytes_after,
            relative_mse=_mean(report, lambda table: table.relative_mse),
            recall_at_10=_mean(report, lambda table: table.recall_at_10),
            metrics=metrics, loss=loss, interval=interval, finetuned=self.finetune_options is not None,
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip

    def _loss(
        self, report: SizeReport, examples: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, float] | None, float, tuple[float, float] | None]:
        """Compute the metrics, the loss compared with the dense model, and its interval."""
        if self.task is None or self.dense is None or examples is None:
            return None, 1 - _mean(report, lambda table: table.recall_at_10), None
        before, after = self.dense[self.task.metric], examples[self.task.metric]
        metrics = {name: float(values.mean()) for name, values in examples.items()}
        loss = relative_loss(float(before.mean()), float(after.mean()), self.task.mode)
        if not math.isfinite(loss):
            loss = math.inf
        paired = len(before) == len(after) > 1 and math.isfinite(loss)
        return metrics, loss, loss_interval(before, after, self.task.mode) if paired else None

    def report(self, points: list[SweepPoint], max_loss: float | None) -> SweepReport:
        """Summarize the points; the smallest file with an allowed loss is chosen."""
        allowed = [i for i, point in enumerate(points) if max_loss is not None and point.loss <= max_loss]
        chosen = min(allowed, key=lambda i: points[i].file_bytes, default=None)
        task = self.task
        return SweepReport(
            source=str(self.source), dense_bytes=self.dense_bytes, task=None if task is None else task.name,
            metric=RECALL if task is None else task.metric, mode="max" if task is None else task.mode,
            dense=None if self.dense is None else {name: float(v.mean()) for name, v in self.dense.items()},
            max_loss=max_loss, points=points, chosen=chosen, infeasible=self.state["infeasible"],
            report=None if chosen is None else read_report(Path(points[chosen].file)),
        )  # fmt: skip

    def _write_state(self) -> None:
        with atomic_file(self.folder / STATE_FILE) as file:
            file.write((json.dumps(self.state, indent=2) + "\n").encode())

    def _line(self, point: SweepPoint, left: int) -> str:
        metric = RECALL if self.task is None else self.task.metric
        value = point.recall_at_10 if point.metrics is None else point.metrics[metric]
        text = f"{point.ratio:g}x: {point.file_bytes:,} bytes, {metric} {value:.5g} ({-100 * point.loss:+.2f}%)"
        text += f", {point.seconds:.0f} s"
        if left:
            text += f"; about {left} to go, {point.seconds * math.ceil(left / self.jobs):.0f} s"
        return text


def _measured_apart(run: SweepRun, ratio: float) -> SweepPoint:
    """Measure one size of a sweep in a process of its own."""
    return replace(run, task=None if run.make_task is None else run.make_task()).measured_point(
        ratio, run.progress
    )


class _Prefixed:
    """A `Progress` whose stages name the size."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def start(self, label: str, total: int, unit: str) -> None:
        self._progress.start(self._prefix + label, total, unit)

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(amount)

    def status(self, text: str) -> None:
        self._progress.status(text)


def _steps(ratios: Sequence[float]) -> Iterable[float]:
    """Iterate over the ladder, and beyond it by factors of 2."""
    yield from ratios
    ratio = 2 * ratios[-1]
    while ratio <= _LARGEST:
        yield ratio
        ratio *= 2


def _mean(report: SizeReport, value: Callable[[Any], float | None]) -> float:
    """Average a figure of the tables, weighted by their bytes before."""
    total = sum((value(table) or 0.0) * table.bytes_before for table in report.tables)
    return float(total / max(report.tables_bytes_before, 1))


def read_report(file: Path) -> SizeReport:
    """Read the report of a compressed file."""
    return SizeReport.from_json(read_json(report_path(file)), str(report_path(file)))
