"""One budget for all tables of a DLRM against one ratio for each: test loss at the same bytes.

    python tests/benchmarks/size_plans.py --folder plans --ratios 8 16 32 --tune 16 [--every]

Clicks are drawn as those of `examples/dlrm_criteo.py`, with 26 tables of 3 to 1,000,000 rows. The dense model is
trained with each weight decay, up to `--epochs` epochs, and the best on validation data is kept. At each ratio the
first conversion has that ratio for every table (tables that no layout fits stay dense, the smallest ones first), and
the others get the bytes of its file as their `size`. Results are kept in `results.json`, and are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cqr_compress as cqr

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from dlrm_criteo import CARDINALITIES, DLRM, NUM_DENSE, NUM_IDS, Clicks, evaluate, losses, maker, shuffled

LARGEST, LARGE = 1_000_000, 200_000


def table_sizes() -> list[int]:
    """Rows of the tables: Criteo's, the largest one cut to a million and all others to 200,000."""
    largest = max(CARDINALITIES)
    return [min(size, LARGEST if size == largest else LARGE) for size in CARDINALITIES]


def draw(num_events: int, seed: int = 0) -> Clicks:
    """Draw events: ids follow Zipf's law, and clusters of ids and their products decide about clicks."""
    rng = np.random.default_rng(seed)
    sizes, clusters, dim = table_sizes(), 12, 4
    logits = np.full(num_events, -1.6)
    ids = np.empty((num_events, NUM_IDS), np.int32)
    total, squares = np.zeros((num_events, dim)), np.zeros(num_events)
    for field, size in enumerate(sizes):
        popularity = np.cumsum(1 / np.arange(1, size + 1) ** 1.05)
        drawn = np.searchsorted(popularity, rng.random(num_events) * popularity[-1]).clip(max=size - 1)
        names = rng.permutation(size)
        centers = rng.normal(size=(clusters, dim)) * 0.18
        row = centers[rng.integers(clusters, size=size)] + 0.04 * rng.normal(size=(size, dim))
        total += row[drawn]
        squares += (row[drawn] ** 2).sum(1)
        logits += (rng.normal(size=clusters) * 0.18)[rng.integers(clusters, size=size)][drawn]
        ids[:, field] = names[drawn]
    logits += ((total**2).sum(1) - squares) / 2
    dense = np.log1p(rng.lognormal(1.0, 1.4, size=(num_events, NUM_DENSE))).astype(np.float32)
    logits += (dense - 1.2) @ (rng.normal(size=NUM_DENSE) * 0.12)
    label = (rng.random(num_events) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return Clicks(*map(torch.from_numpy, (dense, ids, label)))


class Bench:
    """The data, the dense model, and what has been measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        clicks = draw(args.events)
        first, second = args.events * 7 // 10, args.events * 8 // 10
        parts = (slice(first), slice(first, second), slice(second, None))
        self.train, self.valid, self.test = (clicks.take(part) for part in parts)
        self.file = self.folder / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.dense = self.folder / "dense.pt"

    def keep(self, name: str, values: Any) -> None:
        self.results[name] = values
        self.file.write_text(json.dumps(self.results, indent=1))
        print(name, json.dumps(values), flush=True)

    def model(self) -> DLRM:
        return DLRM(table_sizes(), maker("full", 0, 0), self.args.dim)

    def train_dense(self) -> None:
        if "dense" in self.results:
            return
        best: tuple[float, dict[str, Tensor], Any] = (math.inf, {}, None)
        for decay in self.args.decays:
            torch.manual_seed(0)
            model = self.model()
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=decay)
            for epoch in range(1, self.args.epochs + 1):
                model.train()
                for batch in shuffled(self.train, 2048, "cpu"):
                    optimizer.zero_grad()
                    losses(model, batch).mean().backward()
                    optimizer.step()
                loss = evaluate(model, self.valid, "cpu")["bce"]
                print(f"decay {decay:g} epoch {epoch}: {loss:.5f}", flush=True)
                if loss < best[0]:
                    best = (loss, copy.deepcopy(model.state_dict()), (decay, epoch))
                else:
                    break
        torch.save(best[1], self.dense)
        model.load_state_dict(best[1])
        self.keep("dense", {"choice": best[2], **self.metrics(model), "bytes": self.dense.stat().st_size})

    def metrics(self, model: torch.nn.Module) -> dict[str, float]:
        return {
            "bce": evaluate(model, self.valid, "cpu")["bce"],
            "test_bce": evaluate(model, self.test, "cpu")["bce"],
        }

    def task(self) -> cqr.Task:
        def batches(epoch: int) -> Iterator[Clicks]:
            return shuffled(self.train, 2048, "cpu")

        return cqr.Task(
            name="clicks", model=self.model, train_batches=batches, loss=losses, evaluate=self.metrics,
            metric="bce", mode="min",
        )  # fmt: skip

    def convert(self, name: str, **options: Any) -> Path:
        """Convert and measure, once."""
        small = self.folder / f"{name.replace(' ', '-')}.safetensors"
        if name not in self.results:
            began = time.monotonic()
            report = cqr.convert(self.dense, small, force=True, tables=["emb_l.*"], effort="fast", **options)
            seconds = round(time.monotonic() - began, 1)
            model = self.model()
            cqr.load_compressed(model, small)
            sizes = {t.name.split(".")[1]: [t.bytes_after, t.layout, t.relative_mse] for t in report.tables}
            bytes_after = report.file_bytes_after
            self.keep(name, {"bytes": bytes_after, **self.metrics(model), "seconds": seconds, "tables": sizes})
        return small

    def equal(self, ratio: float, **options: Any) -> str:
        """One ratio for all tables, of which the smallest stay dense where no layout fits."""
        name = f"{ratio:g}x equal{' task' if options else ''}"
        if name in self.results:
            return name
        for rows in (0, 500, 1000, 2000, 5000, 10_000, 20_000, 90_000, 150_000):
            small = [f"emb_l.{i}.weight" for i, size in enumerate(table_sizes()) if size < rows]
            try:
                self.convert(name, ratio=ratio, exclude=small, **options)
            except cqr.CqrCompressError as e:
                print(name, rows, str(e)[:100], flush=True)
                continue
            return name
        raise SystemExit(f"no table fits at {ratio:g}x")

    def run(self) -> None:
        self.train_dense()
        for ratio in self.args.ratios:
            name = self.equal(ratio)
            size = self.results[name]["bytes"]
            self.convert(f"{ratio:g}x task", size=size, task=self.task())
            if self.args.every:
                self.convert(f"{ratio:g}x energy", size=size)
                self.equal(ratio, task=self.task())
            if ratio in self.args.tune:
                for each in (name, f"{ratio:g}x task"):
                    self.tune(each)

    def tune(self, name: str) -> None:
        if f"{name}, tuned" in self.results:
            return
        small = self.folder / f"{name.replace(' ', '-')}.safetensors"
        report = cqr.finetune(
            small, small.with_suffix(".tuned.safetensors"), self.task(), original=self.dense, force=True,
            epochs=self.args.tune_epochs, learning_rate=self.args.learning_rate,
        )  # fmt: skip
        assert report.size is not None
        tuned = {**report.after, "bytes": report.size.file_bytes_after, "seconds": report.seconds}
        self.keep(f"{name}, tuned", tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--events", type=int, default=600_000)
    parser.add_argument("--decays", type=float, nargs="+", default=[0, 1e-6, 1e-5])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--ratios", type=float, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--tune", type=float, nargs="*", default=[])
    parser.add_argument("--every", action="store_true", help="also by energy, and equal ratios with weighted rows")
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    bench = Bench(parser.parse_args())
    bench.run()
    dense = bench.results["dense"]["test_bce"]
    print(f"\ndense: test loss {dense:.5f}, {bench.results['dense']['bytes']:,} bytes\n")
    print("| plan | bytes | test loss | above dense |")
    print("|---|---|---|---|")
    for name, values in bench.results.items():
        if name != "dense":
            rise = 100 * (values["test_bce"] / dense - 1)
            print(f"| {name} | {values['bytes']:,} | {values['test_bce']:.5f} | {rise:+.3f}% |")


if __name__ == "__main__":
    main()
