"""Fine-tune a compressed file on a task, from file to file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.checkpoint.compressed_file import CompressedCheckpoint, dump_header
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.size_report import report_path
from cqr_compress.checkpoint.streaming_writer import check_outputs
from cqr_compress.errors import OutputExistsError, SpecError
from cqr_compress.finetuning.code_updates import CodeChanges
from cqr_compress.finetuning.distill import OutputDistillation, RowDistillation
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.report import TuningReport
from cqr_compress.finetuning.resume_state import state_path
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_model import evaluate_task, load_model, own_device
from cqr_compress.finetuning.trainer import Trainer
from cqr_compress.finetuning.tuned_model import TunedModel
from cqr_compress.model.load import model_tensors
from cqr_compress.model.save import save_compressed
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.planning.frequencies import check_counts
from cqr_compress.planning.scan import source_rows
from cqr_compress.progress import Progress, Silent
from cqr_compress.table.quality import Quality, table_quality


def finetune(
    source: str | Path,
    output: str | Path,
    task: Task,
    options: FinetuneOptions | None = None,
    *,
    teacher: str | Path | None = None,
    evaluate_teacher: bool = True,
    device: torch.device | str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TuningReport:
    """Train the codebooks of a compressed file end to end, and write what is best on held-out data.

    The file is evaluated as it is before the first step, and whatever comes later has to be better than that, with
    values rounded as the file holds them: what is written is never worse by the task's metric than what was given.
    With more processes (torch.distributed is set up) every one calls this; the first one writes.

    Args:
        source: a compressed file.
        output: the safetensors file to write, with a report beside it.
        task: the model, its data and its metric.
        options: see `FinetuneOptions`.
        teacher: the dense checkpoint that was converted: rows are fitted to it anew, its metric is reported, and
            distillation pulls toward it.
        evaluate_teacher: whether to load the dense model for its figures.
        device: to train on; CUDA where there is one, if None.
        resume: go on from the state that an interrupted run left beside `output`, where there is one.
        force: replace existing output, and a state of an interrupted run.
        progress: told of the work.

    Returns:
        The report.

    Raises:
        CqrCompressError: see the subclasses in `errors`; nothing is left at `output`.
    """
    source, output, options = Path(source), Path(output), options or FinetuneOptions()
    teacher = None if teacher is None else Path(teacher)
    progress = (progress or Silent()) if distributed.rank() == 0 else Silent()
    chosen = own_device(device)
    if options.distill and teacher is None:
        raise SpecError(f"distill is {options.distill!r}: give the teacher, the dense checkpoint to learn from")
    state = state_path(output)
    if state.exists() and not (resume or force):
        raise OutputExistsError(
            f"{str(state)!r} is the state of an interrupted run: go on with --resume, or begin anew with --force"
        )
    force = force or (resume and state.exists())  # the output is then what the interrupted run wrote
    check_outputs([output, report_path(output)], force, [source, *([teacher] if teacher else [])])
    began = time.monotonic()
    with open_checkpoint(source) as checkpoint:
        opened = CompressedCheckpoint.of(checkpoint)
        model = load_model(task, source, options.seed, chosen)
        tuned = TunedModel.of(model, opened, options.train == "all")
        dense_model = None
        if teacher is not None and (evaluate_teacher or options.distill):
            dense_model = load_model(task, teacher, options.seed, chosen).eval().requires_grad_(False)
        dense = None
        if dense_model is not None and evaluate_teacher:
            dense = evaluate_task(task, dense_model, options.seed)
            progress.say(f"dense: {', '.join(f'{name} {value:.5g}' for name, value in dense.items())}")
        distillation = _distillation(task, tuned, opened, dense_model, options)
        if not options.distill:
            dense_model = None
        identity = _identity(options, opened, teacher, task)
        counts = _counts(task, tuned.tables)
        trainer = Trainer(
            task=task, tuned=tuned, options=options,
            changes=CodeChanges(model, tuned.tables, options, counts, progress),
            device=chosen, distillation=distillation, teacher=teacher, method=opened.header.get("method", ""),
            budgets={name: table.get("budget", 0) for name, table in opened.header["tables"].items()},
            state_file=state, identity=identity,
            progress=progress,
        )  # fmt: skip
        reason = trainer.run(resume)
        guard = trainer.guard
        report = TuningReport(
            task=task.name, metric=task.metric, mode=task.mode, dense=dense,
            before=guard.given.figures, after=guard.best_evaluation.figures,
            improved=guard.improved, verdict=_verdict(trainer, reason),
            best_step=guard.best_evaluation.step, steps=trainer.position.step,
            history=[asdict(evaluation) for evaluation in guard.history], log=trainer.log,
            options=options.to_json(), seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip
        progress.say(report.verdict)
        if distributed.rank() != 0:
            return report
        qualities = _qualities(tuned.tables, teacher, counts, progress)

    def change(header: dict[str, Any]) -> None:
        header["tuning"] = report.in_file()
        if guard.improved:  # the rows are others
            for name in tuned.tables:
                header["tables"][name]["quality"] = {}
        for name, quality in qualities.items():
            header["tables"][name]["quality"] = quality.to_json()

    size = save_compressed(model, output, source, force=force, change_header=change, progress=progress)
    if reason != "interrupted":
        state.unlink(missing_ok=True)
    return replace(report, size=size)


def _distillation(
    task: Task,
    tuned: TunedModel,
    opened: CompressedCheckpoint,
    teacher: nn.Module | None,
    options: FinetuneOptions,
) -> OutputDistillation | RowDistillation | None:
    if options.distill is None or teacher is None:
        return None
    if options.distill == "outputs":
        return OutputDistillation(task, teacher, tuned.model)
    places = model_tensors(teacher, opened)
    rows = {layer: places[name].tensor.detach() for name, layer in tuned.tables.items()}
    return RowDistillation(task, tuned.model, rows)


def _identity(
    options: FinetuneOptions, opened: CompressedCheckpoint, teacher: Path | None, task: Task
) -> dict[str, Any]:
    """What has to be equal in a run that goes on from a state."""
    free = ("save_every", "patience")
    settings = {name: value for name, value in options.to_json().items() if name not in free}
    return {
        "source": opened.checkpoint.path.name,
        "source_bytes": opened.checkpoint.file_bytes,
        "source_header": hashlib.sha256(dump_header(opened.header).encode()).hexdigest(),
        "teacher": None if teacher is None else teacher.name,
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
                found[name] = check_counts(name, torch.as_tensor(counts), layer.num_embeddings)
    return found


def _verdict(trainer: Trainer, reason: str) -> str:
    guard, metric = trainer.guard, trainer.task.metric
    before, best = guard.given.figures[metric], guard.best_evaluation
    after = best.figures[metric]
    if guard.improved:
        at = "a fit to the teacher's rows" if best.what == "refit" else f"step {best.step}"
        return f"{metric} {before:.5g} -> {after:.5g}, from {at}; training ended because {reason}"
    tried = [evaluation.figures[metric] for evaluation in guard.history[1:]]
    if not tried:
        return f"{metric} stays {before:.5g}: the weights as they were given are kept, as {reason}"
    closest = max(tried) if trainer.task.mode == "max" else min(tried)
    return (
        f"{metric} stays {before:.5g}: the weights as they were given are kept, as none of {len(tried)} later "
        f"evaluations was better (the best of them {closest:.5g}); training ended because {reason}"
    )


def _qualities(
    tables: Mapping[str, TableLayer], teacher: Path | None, counts: Mapping[str, Tensor], progress: Progress
) -> dict[str, Quality]:
    """Compare the rows with the teacher's."""
    if teacher is None:
        return {}
    found = {}
    with open_checkpoint(teacher) as checkpoint:
        for name, layer in tables.items():
            table = layer.table()
            scan = source_rows(checkpoint, name, table, counts.get(name), progress)
            found[name] = table_quality(scan.blocks(), table.decode, layer.num_embeddings, scan.weights)
    return found
