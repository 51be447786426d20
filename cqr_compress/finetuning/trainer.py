"""The training loop: evaluation from step 0, early stopping, exact resumption, one or several processes."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.errors import TaskError
from cqr_compress.finetuning.batches import Batches, Step
from cqr_compress.finetuning.code_updates import CodeUpdates
from cqr_compress.finetuning.distill import OutputDistillation, RowDistillation
from cqr_compress.finetuning.early_stopping import EarlyStopping
from cqr_compress.finetuning.fisher import measure_fisher
from cqr_compress.finetuning.fisher_fit import FisherFit
from cqr_compress.finetuning.latent_rows import ENCODE_EVERY, TrainedCodes
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.resume_state import Position, damaged_state, load_state, save_state
from cqr_compress.finetuning.rng import PASS, TRAINING, RandomStream
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_model import evaluate_task
from cqr_compress.finetuning.tuned_model import TunedModel
from cqr_compress.progress import Progress
from cqr_compress.table.spec import AnySpec

_SAVE_EVERY_S = 300.0
_STATUS_EVERY = 10
_LOWEST = 0.1
_REFITS = 2


@dataclass
class Trainer:
    """One run of fine-tuning.

    Attributes:
        task: task to train on.
        tuned: the model.
        options: options of fine-tuning.
        changes: updates of codes.
        device: device of the model.
        distillation: distillation loss to add, or None.
        original: the dense checkpoint whose rows are re-quantized, or None.
        method: method of the conversion.
        budgets: budget of each table in bytes.
        state_file: path of the saved state.
        identity: settings that a resumed run has to share with this one.
        progress: receives the progress of the work.
        early_stopping: the evaluations and the best weights.
        position: progress of the run, as saved in a state.
        log: lines that were logged.
        failure: the exception that ended training after the first evaluation, or None.
    """

    task: Task
    tuned: TunedModel
    options: FinetuneOptions
    changes: CodeUpdates
    device: torch.device
    distillation: OutputDistillation | RowDistillation | None
    original: Path | None
    method: str
    budgets: Mapping[str, int]
    state_file: Path
    identity: dict[str, Any]
    progress: Progress
    early_stopping: EarlyStopping = field(init=False)
    position: Position = field(default_factory=Position)
    log: list[str] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.early_stopping = EarlyStopping(self.task, self.options.patience)
        self._batches = Batches(
            self.task, self.options.gradient_accumulation_steps, self.options.seed, self.device
        )
        self._precision = _precision(self.options.precision, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._precision is torch.float16)
        self._saved = time.monotonic()
        self._loss = math.nan
        self._per_example = False
        self._codes = TrainedCodes({})

    def run(self, resume: bool) -> str:
        """Train the model, and restore the best weights at the end.

        Args:
            resume: resume from the state file, if there is one.

        Returns:
            The reason why training ended.

        Raises:
            TaskError: the task is invalid.
            StateError: the state cannot be resumed.
            Exception: any other of the task, before the given weights are evaluated; later ones end training and
                are `failure`.
        """
        RandomStream.seeded(self.options.seed, TRAINING, distributed.rank()).state.set()
        if resume and self.state_file.exists():
            self._load()
            self._log(f"resuming from step {self.position.step}")
        try:
            reason = self._train()
        except KeyboardInterrupt:
            if not self.early_stopping.history:
                raise
            reason = "interrupted"
        except Exception as e:
            if not self.early_stopping.history:
                raise
            reason, self.failure = "an error", e
        self._codes.end()
        assert self.early_stopping.best is not None
        self.tuned.restore(self.early_stopping.best)
        return reason

    def _train(self) -> str:
        options, position = self.options, self.position
        self.tuned.model.eval()
        with torch.no_grad():
            self._per_example = next(self._losses(0)()).ndim == 1
        self.changes.kind(self._per_example)  # raises before any work is done
        if not self.early_stopping.history:
            self._evaluate("as given")
            if self.original is not None and options.refit and self._per_example:
                self._refit(self.original)
            self._begin_codes()
            self._begin_optimizer()
        if self.early_stopping.exhausted:
            return self._patience()
        for epoch in range(position.epoch, options.epochs):
            if self._steps_are_done:  # the resumed state may already have reached max_steps
                return self._end_of_steps()
            if not position.codes_changed:
                self._change_codes(epoch)
            if position.steps_per_epoch is None:
                position.steps_per_epoch = self._batches.steps_per_epoch(epoch)
            left = None if position.steps_per_epoch is None else position.steps_per_epoch - position.step_of_epoch
            self.progress.start(f"epoch {epoch + 1} of {options.epochs}", left or 0, "steps")
            self.tuned.train_mode()
            for step in self._batches.steps(epoch, position.step_of_epoch):
                if not self._step(step):
                    return f"the loss is not finite after step {position.step}"
                if options.eval_every is not None and position.step % options.eval_every == 0:
                    self._evaluate("trained")
                    if self.early_stopping.exhausted:
                        return self._patience()
                    self._save()
                elif self._save_is_due():
                    self._save()
                if self._steps_are_done:
                    break
            if self._steps_are_done:
                return self._end_of_steps()
            position.steps_per_epoch = position.step_of_epoch
            position.epoch, position.step_of_epoch, position.codes_changed = epoch + 1, 0, False
            if options.eval_every is None or epoch + 1 == options.epochs:
                self._evaluate_once()
            if self.early_stopping.exhausted:
                return self._patience()
            self._save()
        return f"{options.epochs} epochs are done"

    @property
    def _steps_are_done(self) -> bool:
        return self.options.max_steps is not None and self.position.step >= self.options.max_steps

    def _end_of_steps(self) -> str:
        self._evaluate_once()
        return f"{self.options.max_steps} steps are done"

    def _evaluate_once(self) -> None:
        if self.early_stopping.history[-1].step != self.position.step:
            self._evaluate("trained")

    def _step(self, step: Step) -> bool:
        """Do one optimizer step; return False, without updating the parameters, if the loss is not finite."""
        position, parameters = self.position, self._parameters
        for group, base_lr in zip(self._optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * self.lr_factor()
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float32)
        for batch in step.batches:
            loss = self._loss_of(batch)
            if not loss.requires_grad:
                raise TaskError("loss returned a value without a gradient: it has to depend on the parameters")
            self._scaler.scale(loss / step.count).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / step.count
        _add_up_gradients(parameters)
        distributed.all_reduce_(total)
        position.step += 1
        position.step_of_epoch += 1
        if position.step % _STATUS_EVERY == 1 or self._scaler.is_enabled():
            self._loss = total.item()
            self.progress.status(f"loss {self._loss:.4f}, {self._best_so_far()}")
        self.progress.advance()
        if not self._scaler.is_enabled() and not bool(total.isfinite()):
            return False
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if position.step % ENCODE_EVERY == 0:
            self._codes.encode()
        return True

    def _loss_of(self, batch: Any) -> Tensor:
        """Compute the mean loss of a batch, including the weighted distillation loss."""
        enabled = self._precision is not torch.float32
        cast: Any = torch.autocast(self.device.type, self._precision) if enabled else nullcontext()
        with cast, torch.enable_grad():  # user code may have disabled gradients
            if self.distillation is None:
                return self.task.checked_losses(self.tuned.model, batch).mean()
            losses, extra = self.distillation.loss(batch)
            return losses.mean() + self.options.distill_weight * extra

    def lr_factor(self) -> float:
        """Return the learning rate relative to its base_lr: linear warm-up times cosine decay to a tenth."""
        position, options = self.position, self.options
        rise = min(1.0, (position.step + 1) / max(1, options.warmup_steps))
        per_epoch = position.steps_per_epoch
        total = None if per_epoch is None else per_epoch * options.epochs
        if options.max_steps is not None:
            total = min(options.max_steps, total or options.max_steps)
        part = 0.0 if total is None else min(1.0, position.step / total)
        return rise * (_LOWEST + (1 - _LOWEST) * (1 + math.cos(math.pi * part)) / 2)

    def _evaluate(self, stage: str) -> bool:
        """Evaluate with weights rounded to the dtypes of the file; store a snapshot if they are the best."""
        self._codes.encode()
        self.tuned.model.eval()
        with self.tuned.as_written():
            metrics = evaluate_task(self.task, self.tuned.model, self.options.seed)
            finite = self.tuned.is_finite
            better = self.early_stopping.offer(self.position.step, self.position.epoch, stage, metrics, finite)
            if better:
                self.early_stopping.best = self.tuned.snapshot()
        self.tuned.train_mode()
        shown = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        given = len(self.early_stopping.history) == 1
        note = "" if given else " (best)" if better else "" if finite else " (values that are not finite)"
        self._log(f"step {self.position.step}, {stage}: {shown}{note}")
        return better

    def _refit(self, original: Path) -> None:
        """Re-quantize the original's rows under Fisher-weighted error, and continue from the best weights."""
        tables = FisherFit.tables(self.tuned)
        if not tables:
            return
        layouts: dict[tuple[object, ...], AnySpec | None] = {}
        for round_ in range(1, _REFITS + 1):
            self.tuned.model.eval()
            fisher = measure_fisher(self.tuned.model, tables, self._losses(0), self.progress)
            better = False
            refit = FisherFit(
                self.tuned,
                original,
                fisher,
                self.changes.counts,
                self.method,
                self.budgets,
                self.progress,
                layouts,
            )
            for done in refit.candidates():
                self._log(f"{done}, round {round_}")
                better |= self._evaluate("refit")
            assert self.early_stopping.best is not None
            self.tuned.restore(self.early_stopping.best)
            if not better:  # the Fisher information at these weights has been measured already
                return

    def _change_codes(self, epoch: int) -> None:
        """Recluster or reassign codes at the beginning of an epoch, if due."""
        kind = self.changes.kind(self._per_example)
        if kind == "train":
            if not self.changes.is_due(epoch):
                self._codes.encode()
                self._codes.end()
        elif kind != "frozen" and self.changes.is_due(epoch) and not self.early_stopping.was_taken_back:
            before = None
            if self.changes.may_be_taken_back:
                self._evaluate_once()
                before = self.tuned.snapshot()
            self.tuned.model.eval()
            self._log(self.changes.change(kind, self._losses(epoch), self._optimizer))
            if before is not None:
                self._evaluate("reassigned")
                if self.early_stopping.was_taken_back:
                    self.tuned.restore(before)
                    self._log("the reassignment is taken back, and codes are frozen from now on")
        self.position.codes_changed = True

    def _begin_codes(self) -> None:
        """Begin to train the rows behind the codes, if asked for."""
        if self.changes.kind(self._per_example) == "train":
            self._codes = TrainedCodes.begin(self.changes.trainable_tables(), self.original)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer."""
        return [*self.tuned.parameters, *self._codes.parameters]

    def _losses(self, epoch: int) -> Callable[[], Iterator[Tensor]]:
        def losses() -> Iterator[Tensor]:
            stream = RandomStream.seeded(self.options.seed, PASS, epoch, distributed.rank())
            for batch in self._batches.mine(epoch, self.options.pass_batches):
                with stream.active():
                    losses = self.task.checked_losses(self.tuned.model, batch)
                yield losses

        return losses

    def _begin_optimizer(self) -> None:
        self._optimizer = self._make_optimizer()
        self.base_lrs = [group["lr"] for group in self._optimizer.param_groups]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.task.optimizer is None:
            options = self.options
            return torch.optim.AdamW(self._parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
        optimizer = self.task.optimizer(self._parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TaskError(
                f"optimizer returned a {type(optimizer).__name__}: it has to return a torch.optim.Optimizer"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TaskError(
                f"optimizer returned {type(optimizer).__name__}, whose steps need a closure: give "
                "one that needs none, such as torch.optim.AdamW"
            )
        return optimizer

    def _save_is_due(self) -> bool:
        if self.options.save_every is not None:
            return self.position.step % self.options.save_every == 0
        return distributed.world_size() == 1 and time.monotonic() - self._saved > _SAVE_EVERY_S

    def _save(self) -> None:
        self._saved = time.monotonic()
        parts = {
            "early_stopping": self.early_stopping.to_plain(),
            "tuned": self.tuned.snapshot(),
            "codes": self._codes.state(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "log": self.log,
            "per_example": self._per_example,
        }
        save_state(self.state_file, self.identity, self.position, parts)

    def _load(self) -> None:
        with damaged_state(self.state_file):
            self.position, state = load_state(self.state_file, self.identity)
            self.early_stopping.load_plain(state["early_stopping"])
            self.tuned.restore(state["tuned"])
            self._per_example = bool(state["per_example"])
        self._begin_codes()
        with damaged_state(self.state_file):
            self._codes.load(state["codes"])
        self._begin_optimizer()
        with damaged_state(self.state_file):
            self._optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            self.log = list(state["log"])

    def _log(self, line: str) -> None:
        if line:
            self.log.append(line)
            distributed.log_on_first(line)

    def _patience(self) -> str:
        return f"no improvement in {self.options.patience} evaluations"

    def _best_so_far(self) -> str:
        return f"best {self.task.metric} {self.early_stopping.best_evaluation.metrics[self.task.metric]:.5g}"


def _add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum gradients over all processes, in one flat tensor per dtype; a process without a batch adds zeros."""
    if distributed.world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
    for same in by_dtype.values():
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in same if parameter.grad is not None])
        distributed.all_reduce_(flat)
        for parameter, part in zip(same, torch.split(flat, [p.numel() for p in same]), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.view_as(parameter))


def _precision(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        asked = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
