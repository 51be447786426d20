"""Fine-tune a compressed file on a task, from file to file."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import Destination
from cqr_compress.checkpoint.formats.open import files_of, open_checkpoint
from cqr_compress.checkpoint.header import Header
from cqr_compress.errors import OutputExistsError, SpecError
from cqr_compress.finetuning.code_updates import CodeUpdates
from cqr_compress.finetuning.distill import OutputDistillation, RowDistillation
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.report import TuningReport
from cqr_compress.finetuning.resume_state import state_path
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.finetuning.task_model import evaluate_task, load_model, own_device
from cqr_compress.finetuning.trainer import Trainer
from cqr_compress.finetuning.tuned_model import TunedModel
from cqr_compress.model.load import model_tensors
from cqr_compress.model.save import save_compressed
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.option_fields import merged
from cqr_compress.planning.frequencies import check_counts
from cqr_compress.planning.scan import source_rows
from cqr_compress.progress import NoProgress, Progress, shown
from cqr_compress.table.quality import Quality, table_quality

_log = logging.getLogger(__name__)


def finetune(
    source: str | Path,
    output: str | Path,
    task: Task | str | Path,
    options: FinetuneOptions | None = None,
    *,
    original: str | Path | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **option_fields: Any,
) -> TuningReport:
    """Train the codebooks of a compressed file end to end, and write the best weights on held-out data.

    The given weights are evaluated before the first step, and all evaluations use values rounded to the dtypes of
    the file: the written weights are never worse by the task's metric than the given ones.
    With several processes (torch.distributed is initialized) each process calls this; each one runs the model
    itself, without DistributedDataParallel or FSDP, gradients are summed over processes, and the first one writes.
    Without `original`, the report compares metrics with the given file only, not with the dense model.

    Args:
        source: a compressed file.
        output: the safetensors file to write, with a report next to it.
        task: the model, its data and its metric; or a task file, see `cqr-compress finetune --init-task`.
        options: see `FinetuneOptions`.
        original: the dense checkpoint that was converted: its rows are re-quantized under Fisher-weighted error,
            its metrics are reported, and it is the teacher of distillation.
        device: device to train on; if None, CUDA if available.
        resume: resume exactly from the state of an interrupted run next to `output`, if there is one.
        force: replace existing output, and a state of an interrupted run.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.
        **option_fields: fields of `FinetuneOptions`, such as `epochs=3`; they override those of `options`.

    Returns:
        The report.

    Raises:
        CqrCompressError: see the subclasses in `errors`. If it is raised during training, `output` is written with
            the best weights so far where they are better than the given ones, else nothing is.
    """
    source, output, options = Path(source), Path(output), merged(FinetuneOptions, options, option_fields)
    original = None if original is None else Path(original)
    task = task if isinstance(task, Task) else load_task_file(task)
    chosen = own_device(device)
    if options.distill and original is None:
        raise SpecError(
            f"distill is {options.distill!r} without an original: give the dense checkpoint to distill from"
        )
    state = state_path(output)
    if state.exists() and not (resume or force):
        raise OutputExistsError(
            f"{str(state)!r} is the state of an interrupted run: resume it with --resume, or start over with "
            "--force"
        )
    force = force or (resume and state.exists())  # an existing output is then that of the interrupted run
    Destination(path=output, force=force, reading=files_of(source, original)).check()
    first = distributed.rank() == 0
    with shown(progress if first else NoProgress()) as progress:
        run = _Run(source, task, options, original, chosen, state, progress)
        result = run.train(resume)
        report = result.report
        if first and (report.improved or result.failure is None):
            size = save_compressed(
                result.model, output, source, force=force, change_header=result.change_header, progress=progress
            )
            report = replace(report, size=size)
    if result.failure is not None:
        if report.size is not None:
            _log.warning("wrote the best weights so far to %s: %s", output, report.summary)
        raise result.failure
    if first and not result.interrupted:
        state.unlink(missing_ok=True)
    return report


@dataclass(frozen=True)
class _Result:
    """Result of a run: the model with the best weights, and what ended training.

    Attributes:
        report: the report, without the size.
        model: the model.
        change_header: maps the header of the given file to that of the output.
        interrupted: whether the run was interrupted and can be resumed.
        failure: the exception that ended training, or None.
    """

    report: TuningReport
    model: nn.Module
    change_header: Callable[[Header], Header]
    interrupted: bool
    failure: Exception | None


@dataclass(frozen=True)
class _Run:
    """A run of `finetune`, from the checked arguments to the trained model."""

    source: Path
    task: Task
    options: FinetuneOptions
    original: Path | None
    device: torch.device
    state_file: Path
    progress: Progress

    def train(self, resume: bool) -> _Result:
        """Train, and measure the quality of the tables."""
        began = time.monotonic()
        task, options = self.task, self.options
        with open_checkpoint(self.source) as checkpoint:
            opened = CompressedFile.from_checkpoint(checkpoint)
            model = load_model(task, self.source, options.seed, self.device)
            tuned = TunedModel.from_model(model, opened, options.trainable == "all")
            dense, distillation = self._dense_model(tuned, opened)
            counts = _counts(task, tuned.tables)
            trainer = Trainer(
                task=task, tuned=tuned, options=options,
                changes=CodeUpdates(model, tuned.tables, options, counts, self.progress),
                device=self.device, distillation=distillation, original=self.original,
                method=opened.header.method or "",
                budgets={name: table.budget or 0 for name, table in opened.header.tables.items()},
                state_file=self.state_file, identity=_identity(options, opened, self.original, task),
                progress=self.progress,
            )  # fmt: skip
            reason = trainer.run(resume)
            stopping = trainer.early_stopping
            report = TuningReport(
                task=task.name, metric=task.metric, mode=task.mode, dense=dense,
                before=stopping.given.metrics, after=stopping.best_evaluation.metrics,
                improved=stopping.improved, summary=_summary(trainer, reason),
                best_step=stopping.best_evaluation.step, steps=trainer.position.step,
                history=stopping.history, log=trainer.log,
                options=options.to_json(), seconds=round(time.monotonic() - began, 1),
            )  # fmt: skip
            if trainer.failure is None:
                distributed.log_on_first(report.summary)
            first = distributed.rank() == 0
            qualities = _qualities(tuned.tables, self.original, counts, self.progress) if first else {}

        def change(header: Header) -> Header:
            tables = dict(header.tables)
            for name in tuned.tables:
                quality = qualities.get(name, None if stopping.improved else tables[name].quality)
                tables[name] = replace(tables[name], quality=quality)
            return replace(header, tables=tables, tuning=report.in_file())

        return _Result(report, model, change, reason == "interrupted", trainer.failure)

    def _dense_model(
        self, tuned: TunedModel, opened: CompressedFile
    ) -> tuple[dict[str, float] | None, OutputDistillation | RowDistillation | None]:
        """Load the original if needed; return its metrics and the distillation loss, each None if not used."""
        task, options = self.task, self.options
        if self.original is None or not (options.evaluate_original or options.distill):
            return None, None
        model = load_model(task, self.original, options.seed, self.device).eval().requires_grad_(False)
        metrics = None
        if options.evaluate_original:
            metrics = evaluate_task(task, model, options.seed)
            distributed.log_on_first(
                f"dense: {', '.join(f'{name} {value:.5g}' for name, value in metrics.items())}"
            )
        return metrics, _distillation(task, tuned, opened, model, options)


def _distillation(
    task: Task,
    tuned: TunedModel,
    opened: CompressedFile,
    teacher: nn.Module,
    options: FinetuneOptions,
) -> OutputDistillation | RowDistillation | None:
    if options.distill is None:
        return None
    if options.distill == "outputs":
        return OutputDistillation(task, teacher, tuned.model)
    slots = model_tensors(teacher, opened)
    rows = {layer: slots[name].tensor.detach() for name, layer in tuned.tables.items()}
    return RowDistillation(task, tuned.model, rows)


def _identity(
    options: FinetuneOptions, opened: CompressedFile, original: Path | None, task: Task
) -> dict[str, Any]:
    """Return the settings that a resumed run has to share with the run that saved the state."""
    free = ("save_every", "patience", "evaluate_original")
    settings = {name: value for name, value in options.to_json().items() if name not in free}
    return {
        "source": opened.checkpoint.path.name,
        "source_bytes": opened.checkpoint.file_bytes,
        "source_header": hashlib.sha256(opened.header.dumps().encode()).hexdigest(),
        "original": None if original is None else original.name,
        "task": task.name,
        "metric": task.metric,
        "mode": task.mode,
        "processes": distributed.world_size(),
        **settings,
        **task.identity,
    }


def _counts(task: Task, tables: Mapping[str, TableLayer]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if task.frequencies is not None:
        for name, layer in tables.items():
            counts = task.frequencies(name)
            if counts is not None:
                found[name] = check_counts(name, torch.as_tensor(counts, device="cpu"), layer.num_embeddings)
    return found


def _summary(trainer: Trainer, reason: str) -> str:
    early_stopping, metric = trainer.early_stopping, trainer.task.metric
    before, best = early_stopping.given.metrics[metric], early_stopping.best_evaluation
    after = best.metrics[metric]
    if early_stopping.improved:
        stages = {"refit": "a fit to the original's rows", "reassigned": f"a reassignment at step {best.step}"}
        at = stages.get(best.stage, f"step {best.step}")
        return f"{metric} {before:.5g} -> {after:.5g}, from {at}; training ended: {reason}"
    later = [evaluation.metrics[metric] for evaluation in early_stopping.history[1:]]
    if not later:
        return f"{metric} stays {before:.5g}: the given weights are kept; training ended: {reason}"
    tried = [value for value in later if math.isfinite(value)] or [math.nan]
    closest = max(tried) if trainer.task.mode == "max" else min(tried)
    count = "the later evaluation" if len(later) == 1 else f"none of {len(later)} later evaluations"
    return (
        f"{metric} stays {before:.5g}: the given weights are kept, because {count} was "
        f"{'not ' if len(later) == 1 else ''}better ({closest:.5g}); training ended: {reason}"
    )


def _qualities(
    tables: Mapping[str, TableLayer], original: Path | None, counts: Mapping[str, Tensor], progress: Progress
) -> dict[str, Quality]:
    """Measure the quality of the tables' rows compared with the original's; empty without an original."""
    if original is None:
        return {}
    found = {}
    with open_checkpoint(original) as checkpoint:
        for name, layer in tables.items():
            table = layer.table()
            scan = source_rows(checkpoint, name, table, counts.get(name), progress)
            found[name] = table_quality(scan.blocks(), table.decode, layer.num_embeddings, scan.weights)
    return found
