"""A task's loss says which tables and rows matter: bytes go where errors cost most."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import NonFiniteError, SpecError, TaskError
from cqr_compress.finetuning.sensitivity import Sensitivity, measure_sensitivity
from cqr_compress.progress import NoProgress

N, D = 400, 8


class Clicks(nn.Module):
    """A logistic model of two tables, of which the second has a tenth of the weight."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.strong_embedding = nn.Embedding(N, D, sparse=sparse)
        self.weak_embedding = nn.Embedding(N, D, sparse=sparse)
        self.direction = nn.Parameter(torch.randn(D) / D**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.strong_embedding(ids[:, 0]) + 0.1 * self.weak_embedding(ids[:, 1])) @ self.direction


def task_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]], reduction: str = "none") -> cqr.Task:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction=reduction)

    return cqr.Task(
        name="clicks", model=lambda: copy.deepcopy(model), train_batches=lambda epoch: batches, loss=loss,
        evaluate=lambda model: {"bce": float(torch.stack([loss(model, b).mean() for b in batches]).mean())},
        metric="bce", mode="min",
    )  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> tuple[nn.Module, cqr.Task, Path]:
    """A model, data that it explains perfectly, with ids from a skewed distribution, and its checkpoint."""
    model = Clicks()
    drawn = torch.rand(60_000, 2).square() * (N - 40)  # the last 40 ids do not occur
    ids = drawn.long()
    with torch.no_grad():
        labels = torch.bernoulli(model(ids).sigmoid())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    return model, task_of(model, list(zip(ids.split(500), labels.split(500), strict=True))), tmp_path / "m.pt"


def measured(task: cqr.Task, path: Path) -> Sensitivity:
    with open_checkpoint(path) as checkpoint:
        names = ["strong_embedding.weight", "weak_embedding.weight"]
        return measure_sensitivity(task, checkpoint, names, 0, "cpu", NoProgress())


def test_the_sensitivity_predicts_the_loss_under_noise(trained: tuple[nn.Module, cqr.Task, Path]) -> None:
    model, task, path = trained
    found = measured(task, path)
    batches = list(task.train_batches(0))

    def total(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sum(task.loss(model, batch).double().sum() for batch in batches))

    for name, scale in (("strong_embedding", 0.3), ("weak_embedding", 1.0)):
        counts, table = found.counts[f"{name}.weight"], getattr(model, name).weight.detach()
        rises, predicted = [], []
        for seed in range(40):
            noise = scale * torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
            noisy = copy.deepcopy(model)
            getattr(noisy, name).weight.data += noise
            opposite = copy.deepcopy(model)
            getattr(opposite, name).weight.data -= noise  # without the part of the first order
            rises.append((total(noisy) + total(opposite)) / 2 - total(model))
            predicted.append(float((counts * noise.square().sum(1)).sum()) / D / 2)
        assert sum(predicted) == pytest.approx(sum(rises), rel=0.3)
        weighted = (counts * noise.square().sum(1)).sum() / (counts * table.square().sum(1)).sum()
        assert found.importance[f"{name}.weight"] * float(weighted) / 2 == pytest.approx(predicted[-1], rel=1e-3)
    ratio = found.importance["strong_embedding.weight"] / found.importance["weak_embedding.weight"]
    assert 50 < ratio < 200  # the squares of 1 and a tenth


def test_rows_weigh_what_their_lookups_cost_and_rare_ones_are_not_free(
    trained: tuple[nn.Module, cqr.Task, Path],
) -> None:
    _, task, path = trained
    counts = measured(task, path).counts["strong_embedding.weight"]
    assert counts[:40].mean() > 2 * counts[300:340].mean()
    assert torch.allclose(counts[-40:], counts[-1]) and 0 < counts[-1] < counts[:360].mean()


def test_sparse_gradients_and_mean_losses_give_the_same_proportions(
    trained: tuple[nn.Module, cqr.Task, Path],
) -> None:
    model, task, path = trained
    batches, want = list(task.train_batches(0)), measured(task, path)
    for other in (task_of(Clicks(sparse=True), batches), task_of(model, batches, "mean")):
        got = measured(other, path)
        for name, counts in want.counts.items():
            torch.testing.assert_close(got.counts[name] / got.counts[name].mean(), counts / counts.mean())


def test_bytes_go_to_the_table_that_the_loss_is_sensitive_to(
    trained: tuple[nn.Module, cqr.Task, Path], tmp_path: Path
) -> None:
    _, task, path = trained
    options = cqr.ConvertOptions(method="trellis", file_ratio=3.5, effort="fast")
    plain = cqr.convert(path, tmp_path / "p.safetensors", options, tables=["*embedding*"])
    ours = cqr.convert(path, tmp_path / "t.safetensors", options, tables=["*embedding*"], task=task)
    assert ours.file_bytes_after <= plain.file_bytes_after * 1.05
    sizes = {t.name: t.bytes_after for t in ours.tables}
    assert sizes["strong_embedding.weight"] > 1.3 * sizes["weak_embedding.weight"]
    assert all("weighted by the sensitivity of the task's loss" in table.reason for table in ours.tables)
    found = cqr.evaluate([tmp_path / "p.safetensors", tmp_path / "t.safetensors"], original=path, task=task)
    assert found.dense is not None
    rises = [file.metrics["bce"] - found.dense["bce"] for file in found.files if file.metrics]
    assert rises[1] < 0.7 * rises[0]


def test_what_cannot_be_measured_is_told(trained: tuple[nn.Module, cqr.Task, Path]) -> None:
    model, task, path = trained
    batches = list(task.train_batches(0))
    with pytest.raises(SpecError, match="weight is 'task' without a task"):
        cqr.convert(path, weight="task", file_ratio=3, dry_run=True)

    def with_loss(loss: Callable[..., Any]) -> cqr.Task:
        return cqr.Task(
            name="x", model=lambda: copy.deepcopy(model), train_batches=lambda epoch: batches, loss=loss,
            evaluate=lambda model: {"x": 0.0}, metric="x",
        )  # fmt: skip

    with pytest.raises(SpecError, match="no gradient reached"):
        measured(with_loss(lambda model, batch: 0 * model(batch[0])), path)
    with pytest.raises(SpecError, match="no gradient reached"):
        measured(with_loss(lambda model, batch: model(batch[0]).detach()), path)
    for wrong in (1.5, None, torch.tensor(3)):
        with pytest.raises(TaskError, match="loss returned"):
            measured(with_loss(lambda model, batch, wrong=wrong: wrong), path)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        measured(with_loss(lambda model, batch: model(batch[0]) * float("inf")), path)
    with open_checkpoint(path) as checkpoint, pytest.raises(TaskError, match="has no parameter 'direction2'"):
        measure_sensitivity(task, checkpoint, ["direction2"], 0, "cpu", NoProgress())
