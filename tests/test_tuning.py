"""Fine-tuning: what is written is never worse, runs go on exactly, and users see their own errors."""

import copy
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from warm_process import WarmPython

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.commands.finetune import finetune
from cqr_compress.errors import (
    CqrCompressWarning,
    OutputError,
    OutputExistsError,
    ShapeError,
    SpecError,
    StateError,
    TableNotFoundError,
    TaskError,
    UserCodeError,
)
from cqr_compress.finetuning.batches import Batches
from cqr_compress.finetuning.early_stopping import EarlyStopping
from cqr_compress.finetuning.fisher_fit import FisherFit
from cqr_compress.finetuning.resume_state import state_path
from cqr_compress.finetuning.rng import RandomState, RandomStream
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import TEMPLATE, load_task_file, write_template
from cqr_compress.finetuning.user_state import UserState
from cqr_compress.nn.embedding import CompressedEmbedding

Cli = Callable[..., subprocess.CompletedProcess[str]]
USERS, ITEMS, D = 300, 400, 16


class Ratings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user_embedding, self.item_embedding = nn.Embedding(USERS, D), nn.Embedding(ITEMS, D)
        self.out = nn.Linear(D, 1)
        self.dropout = nn.Dropout(0.1)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=0.3)
        nn.init.ones_(self.out.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.out(self.dropout(self.user_embedding(user) * self.item_embedding(item)))[:, 0]


def events(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tastes, appeals = torch.randn(USERS, 4, generator=generator), torch.randn(ITEMS, 4, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(USERS, (count,), generator=generator)
    item = torch.randint(ITEMS, (count,), generator=generator)
    chance = torch.sigmoid(2 * (tastes[user] * appeals[item]).sum(1))
    return user, item, torch.bernoulli(chance, generator=generator)


TRAINING, HELD_OUT = events(30_000, 1), events(4_000, 2)


def batches(epoch: int, size: int = 1000) -> Iterator[tuple[Tensor, ...]]:
    for part in torch.randperm(len(TRAINING[0])).split(size):
        yield tuple(values[part] for values in TRAINING)


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2], reduction="none")


def bce(model: nn.Module) -> dict[str, float]:
    return {"bce": loss(model, HELD_OUT).mean().item(), "half": 0.5}


def task(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "name": "ratings", "model": Ratings, "train_batches": batches, "loss": loss, "evaluate": bce, "metric": "bce",
        "mode": "min",
    }  # fmt: skip
    return Task(**{**given, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's checkpoint."""
    torch.manual_seed(0)
    model = Ratings()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(9):
        for batch in batches(epoch):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("dense") / "ckpt.pt"
    torch.save(model.state_dict(), path)
    return path


def compressed(dense: Path, folder: Path, **asked: Any) -> Path:
    path = folder / f"{'-'.join(map(str, asked.values()))}.safetensors"
    cqr.convert(dense, path, cqr.ConvertOptions(min_rows=0, **asked))
    return path


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    return compressed(dense, dense.parent, method="pq", num_columns=4, n_bits=4)


def measured(path: Path) -> float:
    model = Ratings()
    cqr.load_compressed(model, path)
    return bce(model.eval())["bce"]


def options(**changes: Any) -> cqr.FinetuneOptions:
    return cqr.FinetuneOptions(**{"epochs": 2, "learning_rate": 3e-3, "warmup_steps": 5, "patience": 9, **changes})


LAYOUTS: list[dict[str, Any]] = [
    {"method": "pq", "num_columns": 4, "n_bits": 4},
    {"method": "pq", "num_columns": 4, "n_bits": 4, "rotation": "opq"},
    {"method": "pq", "num_columns": 4, "n_bits": 4, "rotation": "opq", "rank": 8},
    {"method": "rq", "num_levels": 3, "n_bits": 4},
    {"method": "prq", "num_columns": 2, "num_levels": 2, "n_bits": 4},
    {"method": "cqr", "num_columns": 4, "n_bits": 4, "helper": "hashed"},
    {"method": "cqr", "num_columns": 4, "n_bits": 3, "helper": "stored"},
    {"method": "hash", "ratio": 8.0},
    {"method": "int4"},
    {"method": "trellis", "ratio": 20.0},
    {"method": "trellis", "ratio": 12.0, "rotation": "pca"},
]


@pytest.mark.parametrize("asked", LAYOUTS, ids=lambda asked: "-".join(map(str, asked.values())))
@pytest.mark.parametrize("original", [False, True])
def test_what_is_written_has_the_metric_that_the_report_says(
    asked: dict[str, Any], original: bool, dense: Path, tmp_path: Path
) -> None:
    given = compressed(dense, tmp_path, **asked)
    report = finetune(
        given, tmp_path / "out.safetensors", task(), options(epochs=1), original=dense if original else None
    )
    assert report.before["bce"] == pytest.approx(measured(given), abs=1e-6)
    assert report.after["bce"] == pytest.approx(measured(tmp_path / "out.safetensors"), abs=1e-6)
    assert report.improved == (report.after["bce"] < report.before["bce"])
    assert report.improved or asked["method"] == "int4"  # which leaves nothing to gain
    assert (report.dense is not None) == original
    assert report.size is not None
    assert report.size.tables_bytes_after <= cqr.inspect(given).tables_bytes_after  # type: ignore[union-attr]


def test_a_table_stays_as_it_was_given_where_no_layout_fits(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = FisherFit._layout

    def layout(self: FisherFit, key: tuple[object, ...], rows: Any, options: Any) -> Any:
        return None if key[1] == 0.5 else choose(self, key, rows, replace(options, ratio=30.0))

    given = compressed(dense, tmp_path, method="trellis", ratio=12.0)
    monkeypatch.setattr(FisherFit, "_layout", layout)
    report = finetune(given, tmp_path / "out.safetensors", task(), options(), original=dense)
    assert report.after["bce"] <= report.before["bce"]


def test_nothing_but_codebooks_changes(dense: Path, small: Path, tmp_path: Path) -> None:
    finetune(small, tmp_path / "out.safetensors", task(), options(codes="frozen"))
    before, after = Ratings(), Ratings()
    cqr.load_compressed(before, small)
    cqr.load_compressed(after, tmp_path / "out.safetensors")
    changed = {name for name, value in before.state_dict().items() if not value.equal(after.state_dict()[name])}
    assert changed == {"user_embedding.codebooks", "item_embedding.codebooks"}
    finetune(small, tmp_path / "all.safetensors", task(), options(trainable="all"))
    cqr.load_compressed(after, tmp_path / "all.safetensors")
    assert not before.out.weight.equal(after.out.weight)


def test_the_guard_returns_the_given_weights_where_training_overfits(small: Path, tmp_path: Path) -> None:
    few = tuple(values[:40] for values in TRAINING)
    overfit = task(train_batches=lambda epoch: [few] * 20)
    report = finetune(
        small, tmp_path / "out.safetensors", overfit, options(epochs=9, patience=2, learning_rate=0.1)
    )
    assert not report.improved and report.best_step == 0 and report.steps == 40
    assert all(e.metrics["bce"] > report.before["bce"] for e in report.history[1:])
    assert "the given weights are kept, because none of 2 later evaluations was better" in report.summary
    assert "no improvement in 2 evaluations" in report.summary
    assert measured(tmp_path / "out.safetensors") == measured(small)
    one, other = Ratings(), Ratings()
    cqr.load_compressed(one, small)
    cqr.load_compressed(other, tmp_path / "out.safetensors")
    for name, value in one.state_dict().items():
        assert value.equal(other.state_dict()[name]), name
    shown = cqr.inspect(tmp_path / "out.safetensors")
    assert shown.tuning is not None and shown.tuning["improved"] is False  # type: ignore[union-attr]


def test_figures_are_those_of_values_as_the_file_rounds_them(small: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def look(model: Any) -> dict[str, float]:
        seen.append(model.item_embedding.codebooks.detach().clone())
        return bce(model)

    finetune(small, tmp_path / "out.safetensors", task(evaluate=look), options())
    assert len(seen) >= 3 and all(books.equal(books.half().float()) for books in seen)


def test_a_fit_to_the_teacher_weighs_errors_by_the_loss(dense: Path, tmp_path: Path) -> None:
    """Half of the dimensions do not matter to the loss; a fit to the rows alone spends bits on them."""
    state = torch.load(dense)
    for name in ("user_embedding.weight", "item_embedding.weight"):
        state[name][:, 8:] += 3 * torch.randn(len(state[name]), 8, generator=torch.Generator().manual_seed(3))
    state["out.weight"][:, 8:] = 0
    torch.save(state, tmp_path / "noisy.pt")
    given = compressed(tmp_path / "noisy.pt", tmp_path, method="rq", num_levels=4, n_bits=4)
    report = finetune(
        given,
        tmp_path / "out.safetensors",
        task(),
        options(epochs=1, learning_rate=1e-9),
        original=tmp_path / "noisy.pt",
    )
    refitted = [e.metrics["bce"] for e in report.history if e.stage == "refit"]
    assert report.dense is not None
    lost, left = report.before["bce"] - report.dense["bce"], min(refitted) - report.dense["bce"]
    assert left < lost / 2
    without = finetune(
        given, tmp_path / "o2.safetensors", task(), options(refit=False, epochs=1), original=tmp_path / "noisy.pt"
    )
    assert all(e.stage != "refit" for e in without.history)


@pytest.fixture
def doubled(small: Path, tmp_path: Path) -> Path:
    """A file whose items are far from the original's."""
    model = Ratings()
    cqr.load_compressed(model, small)
    with torch.no_grad():
        model.item_embedding.codebooks.mul_(2.0)  # type: ignore[operator, union-attr]
    cqr.save_compressed(model, tmp_path / "doubled.safetensors", small)
    return tmp_path / "doubled.safetensors"


@pytest.mark.parametrize("distill", ["outputs", "rows"])
def test_distillation_pulls_toward_the_teacher(
    distill: str, dense: Path, small: Path, doubled: Path, tmp_path: Path
) -> None:
    silent = task(loss=lambda model, batch: loss(model, batch) * 0)
    chosen = options(distill=distill, codes="frozen", refit=False, epochs=6, learning_rate=2e-2)
    report = finetune(doubled, tmp_path / "o.safetensors", silent, chosen, original=dense)
    assert report.before["bce"] > 0.6 and measured(small) == pytest.approx(report.after["bce"], abs=0.02)


def test_distillation_of_logits_compares_softmaxes(dense: Path, doubled: Path, tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def logits(model: Any, batch: Any) -> Tensor:
        candidates = torch.randperm(len(model.item_embedding.weight))[:50]
        drawn.append(candidates)
        scores = model.user_embedding(batch[0]) @ model.item_embedding(candidates).T
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)  # a candidate that is left out

    def apart(model: Any) -> dict[str, float]:
        original = Ratings()
        original.load_state_dict(torch.load(dense))
        users, found = torch.arange(len(original.user_embedding.weight)), []
        for each in (original, model):
            table = each.item_embedding(torch.arange(len(each.item_embedding.weight)))
            found.append((each.user_embedding(users) @ table.T).log_softmax(1))
        return {"kl": float((found[0].exp() * (found[0] - found[1])).sum(1).mean())}

    chosen = options(distill="outputs", codes="frozen", refit=False, epochs=3, learning_rate=2e-2)
    silent = task(loss=lambda model, batch: loss(model, batch) * 0, logits=logits, evaluate=apart, metric="kl")
    report = finetune(doubled, tmp_path / "out.safetensors", silent, chosen, original=dense)
    assert report.dense is not None and report.dense["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < report.after["kl"] < 0.5 * report.before["kl"]
    assert all(a.equal(b) for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    assert len({tuple(t.tolist()) for t in drawn}) == len(drawn) // 2
    for shape in ((5,), (5, 1)):
        wrong = task(logits=lambda model, batch, shape=shape: torch.zeros(shape))
        with pytest.raises(
            TaskError, match="logits returned .*: it has to return scores of two or more candidates"
        ):
            finetune(doubled, tmp_path / "o.safetensors", wrong, chosen, original=dense)


def test_distillation_needs_a_teacher_and_a_call_of_the_model(dense: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="give the dense checkpoint"):
        finetune(small, tmp_path / "out.safetensors", task(), options(distill="rows"))
    inner = task(loss=lambda m, b: (m.user_embedding(b[0]) * m.item_embedding(b[1])).sum(1))
    with pytest.raises(TaskError, match=r"never calls model\(...\): define logits"):
        finetune(small, tmp_path / "o.safetensors", inner, options(distill="outputs", refit=False), original=dense)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_mean_loss_freezes_codes_by_default_and_is_refused_where_codes_change(
    small: Path, tmp_path: Path
) -> None:
    mean = task(loss=lambda model, batch: loss(model, batch).mean())
    report = finetune(small, tmp_path / "out.safetensors", mean, options())
    assert report.improved and not any("reassigned" in line for line in report.log)
    for codes in ("reassign", "recluster"):
        with pytest.raises(TaskError, match="reduction='none'"):
            finetune(small, tmp_path / "no.safetensors", mean, options(codes=codes))
    assert (
        finetune(
            small, tmp_path / "b.safetensors", mean, options(codes="recluster", gradient_informed=False)
        ).steps
        == 60
    )


def test_reassignments_move_no_more_ids_than_they_may(small: Path, tmp_path: Path) -> None:
    model = Ratings()
    cqr.load_compressed(model, small)
    model.float()
    before = model.item_embedding.codes.clone()  # type: ignore[operator]
    from cqr_compress.clustering.reassign import reassign_

    def losses() -> Iterator[Tensor]:
        for batch in batches(0):
            yield loss(model, batch)

    done = reassign_(model, losses, max_moved=0.05, options=cqr.ClusterOptions(step_size=1.0))
    moved = (before != model.item_embedding.codes).any(1).float().mean()  # type: ignore[union-attr]
    item = next(d for d in done if d.name == "item_embedding")
    assert 0 < float(moved) <= 4 * 0.05 and item.moved == pytest.approx(float(moved)) and item.wanted >= item.moved
    with pytest.raises(SpecError, match="max_moved"):
        reassign_(model, losses, max_moved=0.0)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "pq", "num_columns": 4, "n_bits": 4}, {"method": "trellis", "ratio": 16.0},
        {"method": "trellis", "ratio": 20.0, "rotation": "pca"}, {"method": "trellis", "ratio": 16.0, "window": 8},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)  # fmt: skip
def test_reassigned_codes_come_closer_to_where_rows_want_to_be(
    asked: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    from cqr_compress.clustering.reassign import reassign_

    model = Ratings()
    cqr.load_compressed(model, compressed(dense, tmp_path, **asked))
    model.float().eval()

    def losses() -> Iterator[Tensor]:
        for batch in batches(0):
            yield loss(model, batch)

    def total() -> float:
        with torch.no_grad():
            return sum(part.sum().item() for part in losses())

    before = total()
    done = reassign_(model, losses, max_moved=0.3, options=cqr.ClusterOptions(step_size=0.8))
    assert total() < before and all(d.moved > 0.01 for d in done)


@pytest.mark.parametrize("rotation", [None, "pca"])
def test_codes_of_trellises_in_float64_are_reassigned(dense: Path, tmp_path: Path, rotation: str | None) -> None:
    small = compressed(dense, tmp_path, method="trellis", ratio=8.0, rotation=rotation, codebook_dtype="float64")
    log = finetune(small, tmp_path / "out.safetensors", task(), options(epochs=1, codes="reassign")).log
    assert any(line.startswith("reassigned, ") for line in log)


# runs that go on


def tensors(path: Path, kind: type[nn.Module] = Ratings) -> dict[str, bytes]:
    model = kind()
    cqr.load_compressed(model, path)
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


class _KilledError(BaseException):
    """As a kill, it is caught by nobody."""


@pytest.fixture(scope="module")
def whole_run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[cqr.FinetuneOptions], Path]:
    """The file of a run that nothing stops, once for all tests."""
    folder = tmp_path_factory.mktemp("whole")

    def find(chosen: cqr.FinetuneOptions) -> Path:
        path = folder / f"{chosen.codes}.safetensors"
        if not path.exists():
            finetune(small, path, task(), chosen)
        return path

    return find


@pytest.mark.parametrize("codes", ["reassign", "recluster", "train", "frozen"])
@pytest.mark.parametrize("steps", [7, 30, 31, 50])
def test_a_killed_run_goes_on_to_the_same_file(
    codes: str, steps: int, small: Path, tmp_path: Path, whole_run: Callable[[cqr.FinetuneOptions], Path]
) -> None:
    chosen = options(codes=codes, save_every=3, epochs=2)
    whole = whole_run(chosen)
    count = 0

    def dies(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal count
        count += model.training
        if count > steps:
            raise _KilledError
        return loss(model, batch)

    out = tmp_path / "cut.safetensors"
    with pytest.raises(_KilledError):
        finetune(small, out, task(loss=dies), chosen)
    assert not out.exists() and state_path(out).exists()
    torch.rand(100)  # the state of generators in this process does not matter
    with pytest.raises(OutputExistsError, match="--resume"):
        finetune(small, out, task(), chosen)
    report = finetune(small, out, task(), chosen, resume=True)
    assert any("resuming from step" in line for line in report.log)
    assert tensors(out) == tensors(whole)
    assert not state_path(out).exists()


def test_a_run_with_other_settings_does_not_go_on(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def dies(model: nn.Module) -> dict[str, float]:
        if state_path(out).exists():
            raise _KilledError
        return bce(model)

    with pytest.raises(_KilledError):
        finetune(small, out, task(evaluate=dies), options())
    with pytest.raises(StateError, match=r"learning_rate was 0.003 and is 0.5"):
        finetune(small, out, task(), options(learning_rate=0.5), resume=True)
    state_path(out).write_bytes(b"torn")
    with pytest.raises(StateError, match="cannot be read"):
        finetune(small, out, task(), options(), resume=True)
    assert finetune(small, out, task(), options(learning_rate=0.5), force=True).improved


def test_a_run_that_goes_on_keeps_its_metric_its_task_and_its_last_step(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def dies(model: nn.Module) -> dict[str, float]:
        if state_path(out).exists():
            raise _KilledError
        return bce(model)

    chosen = options(max_steps=30, save_every=30, eval_every=40)
    with pytest.raises(_KilledError):
        finetune(small, out, task(evaluate=dies), chosen)
    with pytest.raises(StateError, match=r"metric was 'bce' and is 'half'; mode was 'min' and is 'max'"):
        finetune(small, out, task(metric="half", mode="max"), chosen, resume=True)
    with pytest.raises(StateError, match=r"lines was None and is 7.*omit --resume and pass --force"):
        finetune(small, out, task(identity={"lines": 7}), chosen, resume=True)
    report = finetune(small, out, task(), chosen, resume=True)
    assert report.steps == 30 and [e.step for e in report.history] == [0, 30]
    assert "30 steps are done" in report.summary


def test_resume_without_a_state_begins(small: Path, tmp_path: Path) -> None:
    assert finetune(small, tmp_path / "out.safetensors", task(), options(), resume=True).steps == 60


def test_an_interrupt_writes_the_best_so_far(small: Path, tmp_path: Path) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls == 45:
            raise KeyboardInterrupt
        return loss(model, batch)

    report = finetune(small, tmp_path / "out.safetensors", task(loss=interrupted), options())
    assert "interrupted" in report.summary and report.improved and report.best_step == 30
    assert measured(tmp_path / "out.safetensors") == pytest.approx(report.after["bce"], abs=1e-6)
    assert state_path(tmp_path / "out.safetensors").exists()
    with pytest.raises(OutputExistsError, match="--resume"):
        finetune(small, tmp_path / "out.safetensors", task(), options())
    report = finetune(small, tmp_path / "out.safetensors", task(), options(), resume=True)
    assert report.steps == 60 and not state_path(tmp_path / "out.safetensors").exists()
    with pytest.raises(OutputExistsError, match="--force"):
        finetune(small, tmp_path / "out.safetensors", task(), options(), resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(small: Path, tmp_path: Path) -> None:
    broken = task(loss=lambda m, b: loss(m, b) * (float("nan") if m.training else 1.0))
    report = finetune(small, tmp_path / "out.safetensors", broken, options())
    assert not report.improved and "the loss is not finite after step 1" in report.summary


def test_weights_that_are_not_finite_are_never_written(small: Path, tmp_path: Path) -> None:
    growing = iter(range(100))
    flattering = task(evaluate=lambda m: {"bce": 1.0 - next(growing)})
    broken = options(learning_rate=1e7, warmup_steps=1)  # values overflow float16
    report = finetune(small, tmp_path / "out.safetensors", flattering, broken)
    assert not report.improved and len(report.history) > 1
    assert any("values that are not finite" in line for line in report.log)
    assert tensors(tmp_path / "out.safetensors") == tensors(small)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_better(value: float) -> None:
    for mode in ("max", "min"):
        assert not task(mode=mode).is_better({"bce": value}, {"bce": 0.5})


@pytest.mark.parametrize("fails", ["no batches", "the user's code"])
def test_the_best_weights_are_written_before_a_late_error_is_raised(
    small: Path, tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    def late(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        if epoch and fails != "no batches":
            raise ValueError(fails)
        return iter(()) if epoch else batches(epoch)

    output = tmp_path / "out.safetensors"
    error, message = (
        (TaskError, "train_batches(1) returned no batch") if fails == "no batches" else (ValueError, fails)
    )
    with pytest.raises(error, match=re.escape(message)):
        finetune(small, output, task(train_batches=late), options())
    assert measured(output) < measured(small)
    assert "wrote the best weights so far" in caplog.text


def test_a_late_error_writes_nothing_where_nothing_is_better(small: Path, tmp_path: Path) -> None:
    growing = iter(range(100))
    worse = task(
        evaluate=lambda m: {"bce": float(next(growing))}, train_batches=lambda e: iter(() if e else batches(0))
    )
    with pytest.raises(TaskError):
        finetune(small, tmp_path / "out.safetensors", worse, options())
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out.report.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": lambda m, b: loss(m, b).detach()}, "without a gradient"),
        ({"loss": lambda m, b: loss(m, b).long()}, "torch.int64"),
        ({"loss": lambda m, b: loss(m, b) * 1j}, "torch.complex64"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    ],
)
def test_losses_and_optimizers_that_cannot_train_are_refused(
    small: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        finetune(small, tmp_path / "out.safetensors", task(**changes), options(codes="frozen"))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_task_that_disables_gradients_is_trained(small: Path, tmp_path: Path) -> None:
    def disabling(model: nn.Module) -> dict[str, float]:
        torch.set_grad_enabled(False)
        return bce(model)

    try:
        report = finetune(small, tmp_path / "out.safetensors", task(evaluate=disabling), options(codes="frozen"))
    finally:
        torch.set_grad_enabled(True)
    assert report.improved


@pytest.mark.parametrize(
    "lacks", ["identity", "position", "random", "early_stopping", "tuned", "optimizer", "log"]
)
def test_a_state_that_lacks_a_part_is_refused(small: Path, tmp_path: Path, lacks: str) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(TaskError):
        finetune(small, output, task(train_batches=lambda e: iter(() if e else batches(0))), options())
    state = torch.load(state_path(output))
    torch.save({name: value for name, value in state.items() if name != lacks}, state_path(output))
    with pytest.raises(StateError, match="damaged"):
        finetune(small, output, task(), options(), resume=True)


def test_steps_patience_and_evaluations_are_counted(small: Path, tmp_path: Path) -> None:
    report = finetune(small, tmp_path / "a.safetensors", task(), options(max_steps=33, eval_every=10))
    assert report.steps == 33 and [e.step for e in report.history] == [0, 10, 20, 30, 33]
    report = finetune(small, tmp_path / "b.safetensors", task(), options(gradient_accumulation_steps=4))
    assert report.steps == 2 * 8  # 30 batches an epoch
    worse = iter(range(100))
    report = finetune(
        small,
        tmp_path / "c.safetensors",
        task(evaluate=lambda m: {"bce": float(next(worse))}),
        options(patience=1),
    )
    assert report.steps == 30 and len(report.history) == 2


def test_accumulated_batches_are_one_larger_batch(small: Path, tmp_path: Path) -> None:
    chosen = options(epochs=1, codes="frozen")

    def calm() -> Ratings:
        model = Ratings()
        model.dropout.p = 0.0
        return model

    finetune(
        small,
        tmp_path / "a.safetensors",
        task(model=calm),
        options(epochs=1, codes="frozen", gradient_accumulation_steps=2),
    )
    larger = task(model=calm, train_batches=lambda epoch: batches(epoch, 2000))
    finetune(small, tmp_path / "b.safetensors", larger, chosen)
    assert measured(tmp_path / "a.safetensors") == pytest.approx(measured(tmp_path / "b.safetensors"), abs=1e-4)


def test_the_same_seed_gives_the_same_file(small: Path, dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name))
        finetune(small, tmp_path / f"{name}.safetensors", task(), options(seed=seed), original=dense)
    assert tensors(tmp_path / "a.safetensors") == tensors(tmp_path / "b.safetensors")
    assert tensors(tmp_path / "a.safetensors") != tensors(tmp_path / "c.safetensors")


def test_statistics_of_batches_rest_where_codebooks_alone_are_trained(dense: Path, tmp_path: Path) -> None:
    class Normed(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return self.out(self.norm(self.user_embedding(user) * self.item_embedding(item)))[:, 0]

    state = {**Normed().state_dict(), **torch.load(dense)}
    torch.save(state, tmp_path / "ckpt.pt")
    given = compressed(tmp_path / "ckpt.pt", tmp_path, method="pq", num_columns=4, n_bits=4)
    for train, moved in (("codebooks", False), ("all", True)):
        falling = itertools.count(0, -1)
        better = task(model=Normed, evaluate=lambda m, falling=falling: {"bce": float(next(falling))})
        finetune(given, tmp_path / f"{train}.safetensors", better, options(trainable=train))
        model = Normed()
        cqr.load_compressed(model, tmp_path / f"{train}.safetensors")
        assert bool((model.norm.running_mean != 0).any()) == moved  # type: ignore[union-attr]


def test_what_a_forward_writes_to_is_given_back_too(dense: Path, tmp_path: Path) -> None:
    class Counting(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(1, track_running_stats=True)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            self.seen += self.training
            x = self.user_embedding(user) * self.item_embedding(item)
            return self.out(self.norm(x[:, None])[:, 0])[:, 0] + self.seen / 1000

    torch.save({**Counting().state_dict(), **torch.load(dense)}, tmp_path / "ckpt.pt")
    given = compressed(tmp_path / "ckpt.pt", tmp_path, method="pq", num_columns=4, n_bits=4)
    out = tmp_path / "out.safetensors"
    for mode, seen in (("min", 0.0), ("max", 60.0)):  # rising metrics: the first ones, or the last ones are kept
        rising = itertools.count()
        either = task(model=Counting, evaluate=lambda m, rising=rising: {"bce": float(next(rising))}, mode=mode)
        report = finetune(given, out, either, options(), force=True)
        assert report.improved == (mode == "max")
        model = Counting()
        cqr.load_compressed(model, out)
        assert model.seen.item() == seen
        assert not model.norm.running_mean.any()  # type: ignore[union-attr]


def test_a_table_of_one_column_keeps_it_unless_it_is_rotated(dense: Path, tmp_path: Path) -> None:
    given = compressed(dense, tmp_path, method="pq", num_columns=1, n_bits=6)
    report = finetune(given, tmp_path / "out.safetensors", task(), options(max_steps=2), original=dense)
    fits = [line for line in report.log if line.startswith("re-quantized")]
    assert fits and all("1x" in line or "opq" in line for line in fits)
    assert fits[0].endswith("round 1") and fits[-1].endswith("round 2") and len(set(fits)) == len(fits)


def test_buffers_that_grow_or_come_in_a_forward_do_not_end_a_run(dense: Path, tmp_path: Path) -> None:
    class Caching(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            if self.training:
                self.seen = torch.zeros(1).expand(len(self.seen) + 1)
                self.register_buffer(f"cache{len(self.seen)}", torch.zeros(3), persistent=False)
            return super().forward(user, item)

    torch.save({**Caching().state_dict(), **torch.load(dense)}, tmp_path / "ckpt.pt")
    given = compressed(tmp_path / "ckpt.pt", tmp_path, method="pq", num_columns=4, n_bits=4)
    rising = itertools.count()
    worse = task(model=Caching, evaluate=lambda m: {"bce": float(next(rising))})
    report = finetune(given, tmp_path / "out.safetensors", worse, options(max_steps=5))
    assert not report.improved and tensors(tmp_path / "out.safetensors", Caching) == tensors(given, Caching)


def test_a_tied_head_that_the_checkpoint_leaves_out_is_filled(dense: Path, tmp_path: Path) -> None:
    class Tied(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, ITEMS, bias=False)
            self.head.weight = self.item_embedding.weight

        def load_state_dict(self, state: Any, strict: bool = True) -> None:  # type: ignore[override]
            super().load_state_dict(state, strict)

    given = compressed(dense, tmp_path, method="pq", num_columns=4, n_bits=4)
    report = finetune(given, tmp_path / "out.safetensors", task(model=Tied), options(max_steps=3), original=dense)
    assert report.dense is not None and report.dense["bce"] < report.before["bce"]


def test_dense_tensors_of_a_narrower_model_are_written_as_they_were(small: Path, tmp_path: Path) -> None:
    class Narrow(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.out.bfloat16()

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return self.out((self.user_embedding(user) * self.item_embedding(item)).bfloat16())[:, 0].float()

    finetune(small, tmp_path / "out.safetensors", task(model=Narrow), options(max_steps=2, codes="frozen"))
    assert tensors(tmp_path / "out.safetensors")["out.weight"] == tensors(small)["out.weight"]


def test_tables_that_the_loss_does_not_use_stay_as_they_are(dense: Path, small: Path, tmp_path: Path) -> None:
    class Extra(Ratings):
        def __init__(self) -> None:
            super().__init__()
            self.side_embedding = nn.Embedding(USERS, D)

    torch.save({**Extra().state_dict(), **torch.load(dense)}, tmp_path / "ckpt.pt")
    given = compressed(tmp_path / "ckpt.pt", tmp_path, method="pq", num_columns=4, n_bits=4)
    for codes in ("reassign", "recluster"):
        with pytest.warns(CqrCompressWarning, match="no gradient reached 'side_embedding'"):
            report = finetune(
                given, tmp_path / f"{codes}.safetensors", task(model=Extra), options(codes=codes),
                original=tmp_path / "ckpt.pt",
            )  # fmt: skip
        assert report.improved and any(codes in line for line in report.log)
        before, after = Extra(), Extra()
        cqr.load_compressed(before, given)
        cqr.load_compressed(after, tmp_path / f"{codes}.safetensors")
        assert before.side_embedding.weight[:].equal(after.side_embedding.weight[:])
    nothing = task(loss=lambda m, b: m.out.bias + 0 * b[2])
    with pytest.raises(SpecError, match="no gradient reached 'user_embedding.weight', 'item_embedding.weight'"):
        finetune(small, tmp_path / "n.safetensors", nothing, options(trainable="all"), original=dense)


def test_dense_tables_are_built_only_where_the_model_looks_at_its_values(
    dense: Path, small: Path, tmp_path: Path
) -> None:
    on_meta: list[bool] = []

    class Watched(Ratings):
        def __init__(self) -> None:
            super().__init__()
            on_meta.append(self.user_embedding.weight.is_meta)

    class Looking(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.scale = float(self.out.weight.abs().mean())

    class Keeping(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.start = self.out.weight.detach().clone()

    class Drawing(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.phase = torch.rand(1).item()

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return super().forward(user, item) + 10 * self.phase

    class Hiding(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = {"frozen": [nn.Linear(1, 1)]}

    again = [True, False]
    kinds = ((Watched, [True]), (Looking, again), (Keeping, again), (Drawing, again), (Hiding, again))
    drawn = finetune(small, tmp_path / "o.safetensors", task(model=Drawing), options(max_steps=3), original=dense)
    assert drawn.dense is not None and drawn.before["bce"] == pytest.approx(drawn.dense["bce"], rel=0.2)
    (tmp_path / "o.safetensors").unlink()
    for kind, expected in kinds:
        on_meta.clear()
        report = finetune(small, tmp_path / "o.safetensors", task(model=kind), options(max_steps=3), force=True)
        assert on_meta == expected and (
            kind is Drawing or report.before["bce"] == pytest.approx(measured(small), abs=1e-6)
        )
    on_meta.clear()
    found = cqr.evaluate([small], original=dense, task=task(model=Watched))
    assert on_meta == [False, True] and found.dense is not None


def test_what_does_not_fit_is_refused_before_the_work(dense: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(TaskError, match="metric is 'auc', but evaluate returned bce, half"):
        finetune(small, out, task(metric="auc"), options())
    with pytest.raises(TaskError, match="nan for the given weights"):
        finetune(small, out, task(evaluate=lambda m: {"bce": float("nan")}), options())
    with pytest.raises(TaskError, match=r"train_batches\(0\) returned no batch"):
        finetune(small, out, task(train_batches=lambda epoch: []), options())
    with pytest.raises(TaskError, match="return a torch.nn.Module"):
        finetune(small, out, task(model=lambda: 3), options())
    with pytest.raises(TaskError, match="mode is 'up'"):
        task(mode="up")
    with pytest.raises(TaskError, match=r"loss returned \(1000, 1\)"):
        finetune(small, out, task(loss=lambda m, b: loss(m, b)[:, None]), options())
    with pytest.raises(TableNotFoundError, match="reassign"):
        finetune(
            compressed(dense, tmp_path, method="rq", num_levels=2, n_bits=4),
            out,
            task(),
            options(codes="recluster"),
        )
    other = torch.load(dense)
    other["item_embedding.weight"] = torch.zeros(ITEMS + 1, D)
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ShapeError, match=r"\(401, 16\)"):
        finetune(small, out, task(), options(), original=tmp_path / "other.pt", evaluate_original=False)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(SpecError, match="no device"):
            finetune(small, out, task(), options(), device=device)
    for wrong in (
        {"epochs": 0},
        {"trainable": "none"},
        {"codes": "x"},
        {"learning_rate": 0.0},
        {"codes_until": 2.0},
    ):
        with pytest.raises(SpecError):
            options(**wrong)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_random_streams_do_not_disturb_each_other() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stream = RandomStream.seeded(1, 2)
    with stream.active():
        first = torch.rand(2)
    assert torch.rand(3).equal(expected)
    with stream.active():
        second = torch.rand(2)
    with RandomStream.seeded(1, 2).active():
        assert torch.rand(4).equal(torch.cat([first, second]))
    plain = RandomState.current().to_plain()
    wanted = torch.rand(2)
    RandomState.from_plain(plain).set()
    assert torch.rand(2).equal(wanted)


def test_the_data_are_the_same_whatever_the_model_draws() -> None:
    dealt = Batches(task(), 1, 3, torch.device("cpu"))
    one = [step.batches[0][0] for step in dealt.steps(1)]
    other = []
    for step in dealt.steps(1):
        torch.rand(7)
        other.append(step.batches[0][0])
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert [step.batches[0][0].tolist() for step in dealt.steps(1, skip=28)] == [b.tolist() for b in one[28:]]
    assert not one[0].equal(next(step.batches[0][0] for step in dealt.steps(2)))


# task files

TASK_FILE = """
import torch
from torch import nn
from ratings_model import Ratings, batches as train, loss, bce as evaluate

metric = "bce"
mode = "min"

def model():
    return Ratings()

def train_batches(epoch):
    return train(epoch)
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    source = Path(__file__).read_text().split("TRAINING, HELD_OUT")[0].split("class Ratings")[1]
    body = Path(__file__).read_text().split("TRAINING, HELD_OUT")[1].split("def task(")[0]
    head = (
        "from typing import Iterator\nimport torch\nfrom torch import Tensor, nn\nUSERS, ITEMS, D = 300, 400, 16\n"
    )
    (tmp_path / "ratings_model.py").write_text(f"{head}class Ratings{source}TRAINING, HELD_OUT{body}")
    sys.modules.pop("ratings_model", None)  # of another test in this process
    path = tmp_path / "my_task.py"
    path.write_text(TASK_FILE)
    return path


def test_the_command_line_tunes_by_a_task_file(
    cli: Cli, task_file: Path, dense: Path, small: Path, tmp_path: Path
) -> None:
    done = cli(
        "finetune", small, "--task", task_file, "--original", dense, "-o", "tuned.safetensors", "--epochs", 2,
        "--learning-rate", "3e-3",
    )  # fmt: skip
    assert "cqr.load_compressed(model, 'tuned.safetensors')" in done.stdout and "dense" in done.stdout
    assert "step 0, as given: bce" in done.stderr and "(best)" in done.stderr
    shown = cli("inspect", "tuned.safetensors").stdout
    assert "fine-tuned on my_task.py: dense" in shown
    report = json.loads((tmp_path / "tuned.report.json").read_text())
    assert report["tuning"]["improved"] and report["tuning"]["after"]["bce"] < report["tuning"]["before"]["bce"]
    printed = cli(
        "finetune", small, "--task", task_file, "-o", "b.safetensors", "--json",
        "--option", "max_steps=2", "--option", "step_size=0.2",
    )  # fmt: skip
    used = json.loads(printed.stdout)["options"]
    assert used["clustering"]["step_size"] == 0.2 and used["max_steps"] == 2
    cli("finetune", small, "--task", task_file, "-o", "tuned.safetensors", code=1)
    again = cli("evaluate", small, "tuned.safetensors", "--original", dense, "--task", task_file)
    assert f"{report['tuning']['after']['bce']:.5g}" in again.stdout
    assert "rows compared with the original's" in cli("inspect", "tuned.safetensors").stdout


def test_settings_that_a_task_file_changes_hold_for_its_own_code_only(
    cli: Cli, task_file: Path, small: Path, tmp_path: Path
) -> None:
    changes = """
import os
seen = []

def change():
    seen.append((os.getcwd() == "/", torch.get_default_dtype(), str(torch.get_default_device())))
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")

change()

def train_batches(epoch):
    change()
    with torch.device("cpu"):
        return list(train(epoch))

def model():
    change()
    with torch.device("cpu"):
        return Ratings().float()
"""

    def settings() -> tuple[object, ...]:
        return Path.cwd(), torch.get_default_dtype(), torch.get_default_device()

    before = settings()
    plain = ("finetune", small, "--epochs", 1, "--seed", 3, "--codes", "frozen", "--task")
    cli(*plain, task_file, "-o", "plain.safetensors")
    task_file.write_text(TASK_FILE + changes)
    cli(*plain, task_file, "-o", "out.safetensors")
    assert settings() == before
    seen = sys.modules["_cqr_compress_task_my_task"].seen
    assert seen[0][0] is False and set(seen[1:]) == {(True, torch.float64, "meta")}
    one, other = (cqr.load_dense_state_dict(tmp_path / f"{name}.safetensors") for name in ("plain", "out"))
    assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)


@pytest.fixture
def other_defaults() -> Iterator[Callable[[], None]]:
    """Change torch's default dtype and device; they are restored after the test."""

    def change() -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("asked", [*LAYOUTS, {"method": "int8"}, {"method": "qr", "ratio": 8}], ids=str)
def test_results_do_not_depend_on_the_default_dtype_and_device(
    dense: Path, tmp_path: Path, asked: dict[str, Any], other_defaults: Callable[[], None]
) -> None:
    state = torch.load(dense)

    def model() -> nn.Module:
        with torch.device("cpu"):
            made = Ratings().float()
        made.load_state_dict(state)
        return made

    def train_batches(epoch: int) -> list[tuple[Tensor, ...]]:
        with torch.device("cpu"):
            return list(itertools.islice(batches(epoch, 512), 6))

    def results(folder: Path) -> list[Tensor]:
        folder.mkdir()
        small, tuned, fitted, again = (
            folder / f"{name}.safetensors" for name in ("small", "tuned", "fit", "again")
        )
        cqr.convert(dense, small, min_rows=0, **asked)
        cqr.evaluate([small], original=dense)
        if asked == LAYOUTS[0]:
            cqr.inspect(dense)
        finetune(small, tuned, task(model=model, train_batches=train_batches), epochs=1, eval_every=3)
        cqr.refit(small, fitted, original=dense, refine_rounds=1)
        loaded, live = model(), model()
        cqr.load_compressed(loaded, tuned)
        scores = loaded.eval()(*HELD_OUT[:2])
        cqr.save_compressed(loaded, again)
        cqr.decompress_(loaded)
        cqr.compress_(live, min_rows=0, **asked)
        with cqr.init_empty_weights():
            empty = Ratings()
        cqr.load_compressed(empty, small)
        found = [scores, *loaded.state_dict().values(), *live.state_dict().values()]
        for path in (small, tuned, fitted, again):
            found += cqr.load_dense_state_dict(path).values()
            with open_checkpoint(path) as stored:
                found += (entry.stored.read() for entry in stored.entries.values())
        return found

    torch.manual_seed(0)
    expected = results(tmp_path / "plain")
    other_defaults()
    torch.manual_seed(0)
    found = results(tmp_path / "other")
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_removed_working_directory_of_a_user_is_left(tmp_path: Path) -> None:
    state, before = UserState(), Path.cwd()
    (tmp_path / "gone").mkdir()
    with state.active():
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
    assert Path.cwd() == before
    with state.active():
        assert Path.cwd() == before
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()  # between two calls of the user's code
    with state.active():
        assert Path.cwd() == before


def test_errors_in_a_task_file_are_shown_as_the_users_own(cli: Cli, small: Path, task_file: Path) -> None:
    def stderr(change: tuple[str, str]) -> str:
        task_file.write_text(TASK_FILE.replace(*change))
        done = cli("finetune", small, "--task", task_file, "-o", "x.safetensors", code=1)
        assert not (task_file.parent / "x.safetensors").exists()
        return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("step 0"))

    shown = stderr(("return train(epoch)", "yield from []\n    return missing"))
    assert shown.startswith("Traceback (most recent call last):\n  File") and "error:" not in shown
    assert "in train_batches\n    return missing" in shown and shown.endswith("name 'missing' is not defined")
    assert "cqr_compress/" not in shown
    shown = stderr(("def model():", "def model("))
    assert "SyntaxError" in shown and str(task_file) in shown and "cqr_compress/" not in shown
    shown = stderr(("return Ratings()", "return nn.Linear(3, 'x')"))
    assert "in model\n" in shown and "TypeError" in shown


def test_a_task_file_without_its_functions_says_which(tmp_path: Path) -> None:
    path = tmp_path / "t.py"
    path.write_text("def model(): ...\n")
    with pytest.raises(TaskError, match="does not define train_batches, loss, evaluate, metric"):
        load_task_file(path)
    with pytest.raises(TaskError, match="no such task file"):
        load_task_file(tmp_path / "none.py")


@pytest.mark.parametrize("length", ["raise OSError('no disk')", "return -1"])
def test_a_length_that_fails_is_the_users_own_error(small: Path, task_file: Path, cli: Cli, length: str) -> None:
    loader = f"class Loader(list):\n    def __len__(self):\n        {length}\n"
    source = task_file.read_text().replace("def train_batches(epoch):", "def examples(epoch):")
    task_file.write_text(f"{source}\n{loader}\ndef train_batches(epoch):\n    return Loader(examples(epoch))\n")
    output = task_file.with_name("out.safetensors")
    shown = cli("finetune", small, "--task", task_file, "-o", output, code=1).stderr
    assert "Traceback" in shown and "__len__" in shown and "weights are kept" not in shown
    assert shown.rstrip().endswith(("no disk", "should return >= 0")) and not output.exists()


def test_the_template_is_a_task_file(tmp_path: Path, cli: Cli) -> None:
    cli("finetune", "--init-task", "my_task.py")
    assert (tmp_path / "my_task.py").read_text() == TEMPLATE
    made = load_task_file(tmp_path / "my_task.py")
    assert (made.metric, made.mode) == ("auc", "max")
    with pytest.raises(UserCodeError, match="NotImplementedError"):
        made.model()
    with pytest.raises(OutputExistsError):
        write_template(tmp_path / "my_task.py")
    with pytest.raises(OutputError):
        write_template(tmp_path / "no" / "my_task.py")


def test_lengths_of_a_loader_are_known(tmp_path: Path) -> None:
    path = tmp_path / "t.py"
    path.write_text(
        "import torch\nmetric = 'x'\ndef model(): ...\ndef loss(m, b): ...\ndef evaluate(m): ...\n"
        "def train_batches(epoch): return torch.utils.data.DataLoader(range(10), batch_size=3)\n"
    )
    dealt = Batches(load_task_file(path), 1, 0, torch.device("cpu"))
    assert dealt.steps_per_epoch(0) == 4 and len(list(dealt.steps(0))) == 4


# processes


def torchrun(folder: Path, processes: int, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "cqr_compress", "finetune", *map(str, args)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done


def test_no_thread_outlives_the_processes_group(tmp_path: Path) -> None:
    script = tmp_path / "leave.py"
    script.write_text(
        """
import weakref
import torch
import torch.distributed as dist
from cqr_compress.distributed import all_reduce_, launched_processes, all_gather_object

with launched_processes(torch.device("cpu")):
    group = weakref.ref(dist.group.WORLD)
    weight = torch.ones(3, requires_grad=True)
    torch.optim.AdamW([weight]).zero_grad()
    import torch.distributed.nn.functional
    all_reduce_(weight.detach())
    assert all_gather_object(group() is not None) == [True, True]
assert group() is None
"""
    )
    two_processes(cold, tmp_path, script)


def cold(*args: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `python` in a process that has imported nothing."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def two_processes(python: Callable[..., subprocess.CompletedProcess[str]], folder: Path, *args: object) -> None:
    """Start two processes with what torchrun tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(rank: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **common, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
        return python(*args, cwd=folder, env=env)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(start, "01"):
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("codes", ["reassign", "recluster", "train"])
def test_two_processes_train_as_one_with_the_same_global_batch(
    codes: str, task_file: Path, dense: Path, small: Path, tmp_path: Path, cli: Cli, python: WarmPython
) -> None:
    model = (tmp_path / "ratings_model.py").read_text().replace("nn.Dropout(0.1)", "nn.Dropout(0.0)")
    (tmp_path / "ratings_model.py").write_text(model)
    spy = (
        TASK_FILE.replace(
            "from ratings_model import Ratings, batches as train, loss, bce as evaluate",
            "import os, hashlib\nfrom ratings_model import Ratings, batches as train, loss, bce",
        )
        + """
def evaluate(model):
    codes = b"".join(m.codes.numpy().tobytes() for m in (model.user_embedding, model.item_embedding))
    with open(f"codes-{os.environ.get('RANK', 'one')}.txt", "a") as file:
        file.write(hashlib.sha256(codes).hexdigest() + "\\n")
    return bce(model)
"""
    )
    task_file.write_text(spy)
    common = ["--task", task_file, "--epochs", 3, "--codes", codes, "--learning-rate", "3e-3", "--original", dense,
              "--option", "evaluate_original=false"]  # fmt: skip
    if codes == "reassign":
        torchrun(tmp_path, 2, small, "-o", "two.safetensors", *common)
    else:
        two_processes(python, tmp_path, "-m", "cqr_compress", "finetune", small, "-o", "two.safetensors", *common)
    cli("finetune", small, "-o", "one.safetensors", "--option", "gradient_accumulation_steps=2", *common)
    first, second = ((tmp_path / f"codes-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and len(set(first.split())) > 3
    assert measured(tmp_path / "two.safetensors") == pytest.approx(
        measured(tmp_path / "one.safetensors"), abs=5e-3
    )
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text())["tuning"] for name in ("one", "two")]
    assert reports[0]["steps"] == reports[1]["steps"] == 45


def test_a_run_that_was_killed_in_the_middle_of_an_epoch_ends_in_the_same_file(
    task_file: Path, small: Path, tmp_path: Path, cli: Cli, python: WarmPython
) -> None:
    """SIGKILL, not an exception: nothing of the first process has a chance to clean up."""
    task_file.write_text(
        TASK_FILE.replace(
            "return train(epoch)",
            "import os, pathlib, time\n"
            "    for index, batch in enumerate(train(epoch)):\n"
            "        if (epoch, index) == (1, 11) and 'STOP_HERE' in os.environ:\n"
            "            pathlib.Path('pid').write_text(str(os.getpid()))\n"
            "            pathlib.Path('pid').rename(os.environ['STOP_HERE'])\n"
            "            time.sleep(300)\n"
            "        yield batch",
        )
    )
    common = ["--task", task_file, "--epochs", 3, "--option", "save_every=4", "--learning-rate", "3e-3",
              "--codes", "frozen"]  # fmt: skip
    cli("finetune", small, "-o", "whole.safetensors", *common)
    command = ["-m", "cqr_compress", "finetune", small, "-o", "cut.safetensors", *common]
    stopped = tmp_path / "stopped"
    with ThreadPoolExecutor() as pool:
        process = pool.submit(python, *command, cwd=tmp_path, env={**os.environ, "STOP_HERE": str(stopped)})
        while not stopped.exists():
            assert not process.done(), process.result()
            time.sleep(0.01)
        os.kill(int(stopped.read_text()), signal.SIGKILL)
        assert process.result().returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "cut.resume.pt")["position"]["step_of_epoch"] in range(1, 11)
    assert not (tmp_path / "cut.safetensors").exists()
    cli("finetune", small, "-o", "cut.safetensors", *common, "--resume")
    assert tensors(tmp_path / "cut.safetensors") == tensors(tmp_path / "whole.safetensors")


# saving, from a model


def test_a_model_of_sketches_is_saved_and_loaded(tmp_path: Path) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = cqr.CQREmbedding(500, 16, codebook_size=16, preset="paper", seed=1)
            self.bag = cqr.CQREmbeddingBag(300, 16, codebook_size=16)
            self.head = nn.Linear(16, 500, bias=False)
            self.register_buffer("steps", torch.tensor(4))

    made = Made()
    made.item.cluster()  # draws hashes anew
    report = cqr.save_compressed(made, tmp_path / "m.safetensors")
    assert report.file_bytes_after == (tmp_path / "m.safetensors").stat().st_size
    assert report.tables_bytes_before == 800 * 16 * 4

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item, self.bag = nn.Embedding(500, 16), nn.EmbeddingBag(300, 16)
            self.head = nn.Linear(16, 500, bias=False)
            self.register_buffer("steps", torch.tensor(0))

    dense = Dense()
    cqr.load_compressed(dense, tmp_path / "m.safetensors")
    ids = torch.arange(300)
    assert dense.item(ids).equal(made.item(ids)) and dense.bag(ids[:, None]).equal(made.bag(ids[:, None]))
    assert dense.head.weight.equal(made.head.weight) and dense.steps == 4
    assert isinstance(dense.item, CompressedEmbedding)
    with pytest.raises(TableNotFoundError):
        cqr.save_compressed(nn.Linear(2, 2), tmp_path / "n.safetensors")
    with pytest.raises(OutputExistsError):
        cqr.save_compressed(made, tmp_path / "m.safetensors")


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(2000, 16), nn.Linear(16, 2000, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    cqr.compress_(model, ratio=8)
    cqr.save_compressed(model, tmp_path / "m.safetensors")
    other = Tied()
    cqr.load_compressed(other, tmp_path / "m.safetensors")
    h = torch.randn(3, 16)
    assert torch.allclose(other.head(h), model.head(h), atol=1e-6)


def test_saving_like_a_file_keeps_names_dtypes_and_what_the_model_lacks(
    ckpt: Path, model_state: dict[str, Tensor], tmp_path: Path
) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item_embedding, self.user_embedding = nn.Embedding(3000, 16), nn.Embedding(1500, 16)
            self.out = nn.Linear(16, 4, bias=True)

    small = tmp_path / "s.safetensors"
    cqr.convert(ckpt, small)
    model = Part()
    cqr.load_compressed(model, small, strict=False)
    model.float()
    with torch.no_grad():
        model.out.bias.fill_(2.0)
        model.item_embedding.codebooks.mul_(0.5)  # type: ignore[operator, union-attr]
    cqr.save_compressed(model, tmp_path / "o.safetensors", small)
    before, after = cqr.load_dense_state_dict(small), cqr.load_dense_state_dict(tmp_path / "o.safetensors")
    assert list(before) == list(after) and after["steps"] == 7 and after["out.bias"].eq(2).all()
    assert torch.allclose(
        after["item_embedding.weight"], before["item_embedding.weight"] / 2, rtol=1e-3, atol=1e-4
    )
    assert (tmp_path / "o.safetensors").stat().st_size == pytest.approx(small.stat().st_size, abs=64)
    fresh = Part()
    with pytest.raises(cqr.CqrCompressError, match="load"):
        cqr.save_compressed(fresh, tmp_path / "p.safetensors", small)
    with torch.no_grad():
        model.item_embedding.codebooks.mul_(1e9)  # type: ignore[operator, union-attr]
    with pytest.raises(cqr.CqrCompressError, match=r"outside the range of torch.float16"):
        cqr.save_compressed(model, tmp_path / "p.safetensors", small)
    assert not (tmp_path / "p.safetensors").exists()
    copy.deepcopy(model)


def test_a_reassignment_that_makes_held_out_data_worse_is_taken_back(dense: Path, tmp_path: Path) -> None:
    given = compressed(dense, tmp_path, method="trellis", ratio=16.0)
    changes: dict[str, Any] = {"epochs": 3, "codes_until": 1.0, "refit": False, "max_moved": 1.0}
    wild = finetune(
        given,
        tmp_path / "wild.safetensors",
        task(),
        options(**changes, clustering=cqr.ClusterOptions(step_size=1.0, prior_weight=1e-3)),
    )
    assert sum("reassigned, " in line for line in wild.log) == 1
    assert any("taken back" in line for line in wild.log)
    assert [e.stage for e in wild.history].count("reassigned") == 1


@pytest.mark.parametrize(
    ("stages", "taken_back"),
    [
        ([("as given", 1.0), ("reassigned", 0.9)], False), ([("as given", 1.0), ("reassigned", 1.1)], True),
        ([("as given", 1.0), ("reassigned", math.nan)], True),
        ([("as given", 1.0), ("refit", 0.5), ("refit", 0.9), ("reassigned", 0.7)], True),
        ([("as given", 1.0), ("refit", 2.0), ("reassigned", 1.5)], True),
        ([("as given", 1.0), ("refit", 2.0), ("reassigned", 0.9), ("trained", 1.0), ("reassigned", 0.95)], False),
    ],
)  # fmt: skip
def test_a_reassignment_is_compared_with_the_weights_before_it(
    stages: list[tuple[str, float]], taken_back: bool
) -> None:
    stopping = EarlyStopping(task(), patience=9)
    for stage, value in stages:
        stopping.offer(0, 0, stage, {"bce": value}, finite=True)
    assert stopping.was_taken_back == taken_back


def test_weights_are_evaluated_before_a_reassignment(dense: Path, tmp_path: Path) -> None:
    small = compressed(dense, tmp_path, method="trellis", ratio=16.0)
    report = finetune(small, tmp_path / "out.safetensors", task(), options(eval_every=20))
    steps = [(int(line.split()[1].strip(",")), line.split()[2]) for line in report.log if line.startswith("step ")]
    assert [step for step, stage in steps if stage == "reassigned:"] == [0, 30]
    assert (30, "trained:") in steps
