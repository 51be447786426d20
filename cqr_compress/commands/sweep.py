"""Try a ladder of sizes, and choose the smallest file that is good enough by the user's own metric."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.compressed_writer import Destination, write_report
from cqr_compress.checkpoint.formats.open import files_of
from cqr_compress.checkpoint.output_files import atomic_file
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.apart import check_apart
from cqr_compress.commands.convert import default_output
from cqr_compress.commands.convert_folder import folder_weights, is_folder_conversion, write_folder
from cqr_compress.commands.sweep_report import SweepReport
from cqr_compress.commands.sweep_run import DEFAULT_RATIOS, SweepRun, read_report
from cqr_compress.errors import BudgetError, SpecError
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.finetuning.task_model import own_device
from cqr_compress.option_fields import merged
from cqr_compress.planning.fields import Offsets
from cqr_compress.planning.frequencies import Frequencies
from cqr_compress.planning.rules import Rules
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import BUDGETS, ConvertOptions


def sweep(
    source: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions | None = None,
    *,
    task: Task | Callable[[], Task] | str | Path | None = None,
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
    jobs: int = 1,
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
        output: the file to write, or for the folder of a model the folder, see `convert_folder`; nothing is
            written but the folder of the sweep if None. It requires `max_loss`.
        options: options of the conversions, without a budget.
        task: the model, its data and its metric; without a task, the metric is recall@10 of the rows, of which
            the model's own metric may differ. For several jobs, a file, a function of a module that makes it, or
            a task that can be pickled.
        max_loss: largest change of the metric for the worse, relative to the dense model: 0.01 is 1%.
        ratios: bytes of the tables before / after.
        finetune_options: fine-tune each file with these options; no fine-tuning if None.
        folder: folder of the results; the name of the source with the suffix `.sweep` if None.
        tables: see `convert`.
        exclude: see `convert`.
        rules: see `convert`.
        offsets: see `convert`.
        frequencies: see `convert`.
        device: device of the task; if None, CUDA if available.
        jobs: number of sizes to measure at once, in processes that share the threads; fewer if the first one
            leaves no memory for as many.
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
    ratios = _check(options, output, max_loss, ratios, task, finetune_options, jobs)
    is_folder = output is not None and is_folder_conversion(source, output)
    make_task = _maker(task)
    folder = _default_folder(source) if folder is None else Path(folder)
    if output is not None and (
        output.resolve() == folder.resolve() or output.resolve() in folder.resolve().parents
    ):
        raise SpecError(f"the folder of the sweep, {str(folder)!r}, is the output or in it: give another")
    if jobs > 1:
        selection = tables, exclude, rules, offsets, frequencies
        check_apart(make_task, options, finetune_options, selection)
    if output is not None and is_folder:
        folder_weights(source, output, force)
    elif output is not None:
        Destination(path=output, force=force, reading=files_of(source)).check()
    with shown(progress) as progress:
        run = SweepRun.prepare(
            source, folder, options, None if make_task is None else make_task(), finetune_options,
            own_device(device), progress,
            {"tables": tables, "exclude": exclude, "rules": rules, "offsets": offsets, "frequencies": frequencies},
            force, make_task, jobs,
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
        chosen, of_chosen = Path(points[report.chosen].file), report.report
        if is_folder and of_chosen is not None:
            (of_chosen,) = write_folder(source, chosen, of_chosen, output, force).reports
        else:
            of_chosen = _copy(chosen, output)
        return replace(report, output=str(output), report=of_chosen)


def _default_folder(source: Path) -> Path:
    if source.is_dir():  # beside it: what is in it belongs to the model
        return source.resolve().with_name(f"{source.resolve().name}.sweep")
    return default_output(source).with_suffix("").with_suffix(".sweep")


def _maker(task: Task | Callable[[], Task] | str | Path | None) -> Callable[[], Task] | None:
    """Return a function that makes the task, here or in another process."""
    if task is None:
        return None
    if isinstance(task, (str, Path)):
        return partial(load_task_file, task)
    return partial(_same, task) if isinstance(task, Task) else task


def _same(task: Task) -> Task:
    return task


def _check(
    options: ConvertOptions, output: Path | None, max_loss: float | None, ratios: Sequence[float], task: object,
    finetune_options: object, jobs: int,
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
    if jobs < 1:
        raise SpecError(f"jobs is {jobs!r}: give 1 or more")
    if not ratios or not all(1 < float(f"{ratio:g}") < math.inf for ratio in ratios):
        raise SpecError(f"ratios are {list(ratios)!r}: give numbers above 1")
    return sorted({float(f"{ratio:g}") for ratio in ratios})  # a file of the folder is named by these digits


def _copy(file: Path, output: Path) -> SizeReport:
    """Copy a file of the sweep and its report."""
    with file.open("rb") as held, atomic_file(output) as target:
        shutil.copyfileobj(held, target, 2**24)
    report = replace(read_report(file), file=str(output))
    write_report(report_path(output), report)
    return report
