"""What the benchmarks choose, they choose on the validation part, by one search for every method."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_tasks
    import search
    import sketches

    yield bench_tasks, search, sketches
    for name in ("bench_tasks", "search", "sketches"):
        sys.modules.pop(name)


def test_the_first_seed_chooses_the_weight_decay_and_the_others_keep_it(
    modules: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, search, _ = modules
    tried: list[Any] = []

    def train(decay: Any) -> Any:
        tried.append(decay)
        return search.Trained(-abs(decay.value - 1e-5), decay, "epoch 3 of 9")

    found = search.Search()
    assert [found.best(("cqr", 16), train) for _ in range(2)] == [search.Decay(1e-5)] * 2
    assert tried == [*search.GRID, search.Decay(1e-5)]
    assert {(d.value, d.decoupled) for d in search.GRID} >= {
        (0.0, False),
        (1e-6, False),
        (1e-5, False),
        (1e-4, False),
    }
    assert any(decay.decoupled for decay in search.GRID)
    assert "cqr 16: Adam 1e-05, epoch 3 of 9" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "hash", "cqr", "cqr-paper"])
def test_the_epoch_is_chosen_on_validation_and_not_on_the_test_part(modules: Any, method: str) -> None:
    bench_tasks, search, sketches = modules
    ids, label = torch.randint(40, (256, 2)), torch.randint(2, (256,)).float()
    valid, test = iter([0.5, 0.6, 0.9, 0.7, 0.8, 0.7]), iter([0.9, 0.5, 0.6, 0.7, 0.8, 0.95])
    task = bench_tasks.Task(
        lambda make: bench_tasks.GMF(make, 40, 40, 8), (ids, label), bench_tasks.logistic,
        lambda model: {"auc": next(valid), "test_auc": next(test)}, "auc", 64, 6, (),
    )  # fmt: skip
    trained = sketches.train(task, method, 8, 0, search.Decay(0.0))
    assert (trained.score, trained.result[1]["test_auc"], trained.when) == (0.9, 0.6, "epoch 3 of 6")
    assert replace(task, mode="min").score({"auc": 0.9}) == -0.9


def test_ratings_of_the_three_parts_are_all_different(modules: Any) -> None:
    bench_tasks, _, _ = modules
    user = torch.arange(6).repeat_interleave(5)
    ids = torch.stack([user, torch.arange(30)], 1)
    rest, test = bench_tasks.split_last((ids, user), 2)
    train, valid = bench_tasks.split_last(rest, 2)
    assert [len(part[0]) for part in (train, valid, test)] == [6, 12, 12]
    assert sorted(torch.cat([train[0], valid[0], test[0]])[:, 1].tolist()) == list(range(30))
