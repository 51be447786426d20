"""Try a ladder of sizes, and choose the smallest file that is good enough by the user's own metric."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.compressed_writer import Destination, write_report
from cqr_compress.checkpoint.formats.open import files_of, open_checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import atomic_file
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.convert import convert, default_output
from cqr_compress.commands.finetune import finetune
from cqr_compress.commands.sweep_report import RECALL, SweepPoint, SweepReport
from cqr_compress.commands.sweep_state import STATE_FILE, held_point, identity_of, read_state
from cqr_compress.errors import BudgetError, SpecError, TaskError
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.paired import loss_interval, relative_loss
from cqr_compress.finetuning.sensitivity import Sensitivity, measure_sensitivity
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.finetuning.task_model import evaluate_examples, load_model, own_device
from cqr_compress.option_fields import merged
from cqr_compress.planning.fields import Offsets
from cqr_compress.planning.find import find_tables, with_table_names
from cqr_compress.planning.frequencies import Frequencies
from cqr_compress.planning.rules import Rules, read_rules
from cqr_compress.planning.size_budget import Curves
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import BUDGETS, ConvertOptions

DEFAULT_RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
_SMALLEST, _LARGEST = 1.5, 2048.0
_BISECTIONS = 3
_log = logging.getLogger(__name__)


def sweep(
    source: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions | None = None,
    *,
    task: Task | str | Path | None = None,
    max_loss: float | None = None,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    finetune_options: FinetuneOptions | None = None,
    folder: str | Path | None = None,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Rules = (),
    offsets: Offsets = (),
    frequencies: Frequencies = (),
    device: torch.device | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **option_fields: Any,
) -> SweepReport:
    """Convert a checkpoint to several sizes, and measure what each costs.

        report = cqr.sweep("ckpt.pt", "small.safetensors", task="my_task.py", max_loss=0.01)

    Without `max_loss`, all ratios are tried. With it, they are tried from the smallest on until one loses more,
    and beyond the largest; three bisections follow, and the smallest file that loses no more is the output.
    Several tables share each ratio as their budget, by the sensitivity of the task or `weight`. All files and the
    results are kept in a folder; an interrupted sweep, or one with more ratios, measures only what is missing.

    Args:
        source: the dense checkpoint; anything `open_checkpoint` opens.
        output: the file to write; nothing is written but the folder if None. It requires `max_loss`.
        options: options of the conversions, without a budget.
        task: the model, its data and its metric; without a task, the metric is recall@10 of the rows, of which
            the model's own metric may differ.
        max_loss: largest change of the metric for the worse, relative to the dense model: 0.01 is 1%.
        ratios: bytes of the tables before / after.
        finetune_options: fine-tune each file with these options; no fine-tuning if None.
        folder: folder of the results; that of the source with the suffix `.sweep` if None.
        tables: see `convert`.
        exclude: see `convert`.
        rules: see `convert`.
        offsets: see `convert`.
        frequencies: see `convert`.
        device: device of the task; if None, CUDA if available.
        force: replace existing output, and the results of a sweep with other options.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.
        **option_fields: fields of `ConvertOptions`, such as `method="pq"`.

    Returns:
        The report.

    Raises:
        TaskError: a metric of the dense model that is 0 or not finite.
        SpecError: a budget in the options, an output without `max_loss`, or fine-tuning without a task.
        BudgetError: every size loses more than `max_loss`, and an output is asked for.
        CqrCompressError: see `convert`, `finetune` and `evaluate`.
    """
    source, options = Path(source), merged(ConvertOptions, options, option_fields)
    output = None if output is None else Path(output)
    ratios = _check(options, output, max_loss, ratios, task, finetune_options)
    if isinstance(task, (str, Path)):
        task = load_task_file(task)
    folder = default_output(source).with_suffix("").with_suffix(".sweep") if folder is None else Path(folder)
    if output is not None:
        Destination(path=output, force=force, reading=files_of(source)).check()
    with shown(progress) as progress:
        run = _Sweep.prepare(
            source, folder, options, task, finetune_options, own_device(device), progress,
            {"tables": tables, "exclude": exclude, "rules": rules, "offsets": offsets, "frequencies": frequencies},
            force,
        )  # fmt: skip
        points = run.ladder(ratios) if max_loss is None else run.search(ratios, max_loss)
        report = run.report(points, max_loss)
        if output is None:
            return report
        if report.chosen is None:
            least = min(points, key=lambda point: point.loss, default=None)
            found = "no size could be made" if least is None else (
                f"{least.ratio:.3g}x loses {100 * least.loss:.2f}%, the least of {len(points)} sizes"
            )  # fmt: skip
            raise BudgetError(f"no size of {str(source)!r} loses at most {100 * (max_loss or 0):g}%: {found}")
        return replace(report, output=str(output), report=_copy(Path(points[report.chosen].file), output))


def _check(
    options: ConvertOptions, output: Path | None, max_loss: float | None, ratios: Sequence[float], task: object,
    finetune_options: object,
) -> list[float]:  # fmt: skip
    """Check the arguments, and return the ratios in order."""
    if given := [name for name in BUDGETS if getattr(options, name) is not None]:
        raise SpecError(f"{given[0]} is given, and a sweep tries several ratios: give `ratios`")
    if output is not None and max_loss is None:
        raise SpecError("an output without max_loss: say how much of the metric may be lost, such as 0.01")
    if max_loss is not None and not 0 <= max_loss < 1:
        raise SpecError(f"max_loss is {max_loss!r}: give a share of the metric, such as 0.01")
    if finetune_options is not None and task is None:
        raise SpecError("fine-tuning without a task: give the task to train on")
    if not ratios or not all(1 < float(f"{ratio:g}") < math.inf for ratio in ratios):
        raise SpecError(f"ratios are {list(ratios)!r}: give numbers above 1")
    return sorted({float(f"{ratio:g}") for ratio in ratios})  # a file of the folder is named by these digits


@dataclass
class _Sweep:
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
    measured: Curves = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, source: Path, folder: Path, options: ConvertOptions, task: Task | None,
        finetune_options: FinetuneOptions | None, device: torch.device, progress: Progress,
        selection: Mapping[str, Any], force: bool,
    ) -> _Sweep:  # fmt: skip
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
            dense, state,
        )  # fmt: skip

    def ladder(self, ratios: Sequence[float]) -> list[SweepPoint]:
        """Measure all ratios; those that no layout fits are left out."""
        points = [self.point(ratio, left) for ratio, left in zip(ratios, range(len(ratios), 0, -1), strict=True)]
        return [point for point in points if point is not None]

    def search(self, ratios: Sequence[float], max_loss: float) -> list[SweepPoint]:
        """Find the largest ratio whose loss is allowed, by the ladder and bisections between two of its steps."""
        tried: dict[float, SweepPoint | None] = {}

        def holds(ratio: float) -> bool:
            tried[ratio] = found = self.point(ratio, None)
            return found is not None and found.loss <= max_loss

        low, high = 1.0, math.inf
        for ratio in _steps(ratios):
            if holds(ratio):
                low = ratio
            else:
                high = ratio
                break
        for _ in range(_BISECTIONS if high < math.inf and (low > 1 or high > _SMALLEST) else 0):
            middle = float(f"{math.sqrt(low * high):.3g}")
            if middle in tried:
                break
            if holds(middle):
                low = middle
            else:
                high = middle
        return sorted((p for p in tried.values() if p is not None), key=lambda point: point.ratio)

    def point(self, ratio: float, left: int | None) -> SweepPoint | None:
        """Return one size, from the results so far or measured; None if no layout fits."""
        name = f"{ratio:g}x"
        if name in self.state["infeasible"]:
            return None
        held = held_point(self.folder, self.state, name)
        if held is not None:
            return held
        began = time.monotonic()
        self._write_state()  # so that a sweep that is stopped in its first size is one
        try:
            point = self._measured(ratio, self.folder / f"{name}.safetensors", began)
        except BudgetError as e:
            self.state["infeasible"][name] = str(e).split("\n")[0]
            self._write_state()
            _log.info("%s: no layout fits", name)
            return None
        self.state["points"][name] = {**asdict(point), "file": Path(point.file).name}
        self._write_state()
        _log.info("%s", self._line(point, left))
        return point

    def _measured(self, ratio: float, file: Path, began: float) -> SweepPoint:
        """Convert, fine-tune and evaluate."""
        progress = _Prefixed(self.progress, f"{ratio:g}x: ")
        options = replace(self.options, ratio=ratio)
        task = self.sensitivity if self.sensitivity.counts else None
        report = convert(
            self.source,
            file,
            options,
            task=task,
            force=True,
            progress=progress,
            measured=self.measured,
            **self.selection,
        )
        examples = None
        if self.task is not None and self.finetune_options is not None:
            tuned = file.with_suffix(".tuned.safetensors")
            finetune(
                file, tuned, self.task, self.finetune_options, original=self.source, device=self.device,
                force=True, progress=progress,
            )  # fmt: skip
            file, report = tuned, _read_report(tuned)
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
            report=None if chosen is None else _read_report(Path(points[chosen].file)),
        )  # fmt: skip

    def _write_state(self) -> None:
        with atomic_file(self.folder / STATE_FILE) as file:
            file.write((json.dumps(self.state, indent=2) + "\n").encode())

    def _line(self, point: SweepPoint, left: int | None) -> str:
        metric = RECALL if self.task is None else self.task.metric
        value = point.recall_at_10 if point.metrics is None else point.metrics[metric]
        text = f"{point.ratio:g}x: {point.file_bytes:,} bytes, {metric} {value:.5g} ({-100 * point.loss:+.2f}%)"
        text += f", {point.seconds:.0f} s"
        if left is not None and left > 1:
            text += f"; {left - 1} to go, about {point.seconds * (left - 1):.0f} s"
        return text


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


def _read_report(file: Path) -> SizeReport:
    return SizeReport.from_json(read_json(report_path(file)), str(report_path(file)))


def _copy(file: Path, output: Path) -> SizeReport:
    """Copy a file of the sweep and its report."""
    with file.open("rb") as held, atomic_file(output) as target:
        shutil.copyfileobj(held, target, 2**24)
    report = replace(_read_report(file), file=str(output))
    write_report(report_path(output), report)
    return report
