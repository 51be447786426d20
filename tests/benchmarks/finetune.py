"""Dense, converted and tuned models side by side: five tasks, four ratios, three methods.

    python tests/benchmarks/finetune.py movielens --file ml-100k.inter
    python tests/benchmarks/finetune.py synthetic [--file s2k.npz]
    python tests/benchmarks/finetune.py frappe --file frappe.validation.libfm --test-file frappe.test.libfm
    python tests/benchmarks/finetune.py sasrec --file Beauty.txt
    python tests/benchmarks/finetune.py criteo

A dense model is trained, its epoch chosen on held-out data. Its checkpoint is converted at each ratio, the bytes of
all compressed tables and what belongs to them beside float32, and then fine-tuned twice: with the defaults, and with
`trainable="all", distill="outputs"` (bytes of the tables are the same). Everything is chosen on the validation part;
the metrics are of the test part, as means over seeds, changes beside the dense model with their spread. `--scratch`
trains CQR and the paper's CQR from scratch, at float16 codebooks with no more bytes than the ratio gives.

Models: GMF (movielens, synthetic), SASRec, DLRM without dense features (frappe) as in `sketches.py`; criteo is
`examples/dlrm_criteo.py` on data that it draws. SASRec's test item is the last of each user, ranked among all items
that the user has not had, and the one before is for validation. It is trained with a softmax over all items, which
nearly doubles the NDCG that one negative for each item gives; the second way distils this softmax, without dropout.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sketches
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress.clustering.cluster import clusterable_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

Figures = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """A task of `sketches`, with metrics on a validation and a test part.

    Attributes:
        task: model, training data and losses.
        metrics: of a model: the metric, and the same on the test part as "test_...".
        metric: that chooses.
        mode: "max" or "min".
        tables: to compress.
        full_table: makes a table of the dense model, with the values that it starts from.
        learning_rate: of the dense model, and of those from scratch.
        logits: that are distilled, or None.
        everything: more options where everything is trained.
    """

    task: sketches.Task
    metrics: Callable[[nn.Module], Figures]
    metric: str
    mode: str
    tables: list[str]
    full_table: sketches.MakeTable = sketches.full
    learning_rate: float = 1e-3
    logits: Callable[[nn.Module, sketches.Batch], Tensor] | None = None
    everything: Mapping[str, Any] = field(default_factory=dict)

    def is_better(self, a: float, b: float) -> bool:
        """Whether figure `a` is better than `b`; NaN is worse than any number."""
        if math.isnan(a) or math.isnan(b):
            return not math.isnan(a)
        return a > b if self.mode == "max" else a < b

    def tuning_task(self, arch: nn.Module, dropout: bool = True) -> cqr.Task:
        arch = copy.deepcopy(arch)
        for module in arch.modules() if not dropout else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        return cqr.Task(
            name="benchmark", model=lambda: copy.deepcopy(arch),
            train_batches=lambda epoch: self.task.batches(self.task.batch_size, True),
            loss=self.task.losses, logits=self.logits, evaluate=self.metrics, metric=self.metric, mode=self.mode,
        )  # fmt: skip


def split_last(batch: sketches.Batch, count: int) -> tuple[sketches.Batch, sketches.Batch]:
    """Hold out the last `count` examples of each user, of examples in the order of users and time."""
    user = batch[0][:, 0]
    last = torch.ones(len(user), dtype=torch.bool)
    last[:-count] = user[count:] != user[:-count]
    return tuple(t[~last] for t in batch), tuple(t[last] for t in batch)


def clicks(task: sketches.Task, valid: sketches.Batch, test: sketches.Batch, tables: list[str]) -> Bench:
    @torch.no_grad()
    def metrics(model: nn.Module) -> Figures:
        found: Figures = {}
        for name, (ids, label) in (("", valid), ("test_", test)):
            found[f"{name}auc"] = sketches.auc(sketches.predict(model, ids), label)
        return found

    return Bench(task, metrics, "auc", "max", tables)


def movielens(path: Path) -> Bench:
    """The last two ratings of each user are the test, the two before for validation."""
    task = sketches.movielens(path)
    train, valid = split_last(task.train, 2)
    return clicks(replace(task, train=train), valid, task.held_out, ["user.weight", "item.weight"])


def synthetic(path: Path | None) -> Bench:
    """The task's held-out ratings are the test, the last two of each user's others for validation."""
    task = sketches.synthetic(path, False)
    order = task.train[0][:, 0].argsort(stable=True)
    train, valid = split_last(tuple(part[order] for part in task.train), 2)
    return clicks(replace(task, train=train), valid, task.held_out, ["user.weight", "item.weight"])


def frappe(train: Path, test: Path) -> Bench:
    """A tenth of the training file, drawn at random, is for validation."""
    task = sketches.frappe(train, test)
    order = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(0))
    valid, rest = order[: len(order) // 10], order[len(order) // 10 :]
    parts = (tuple(t[which] for t in task.train) for which in (rest, valid))
    fitted, chosen = parts
    return clicks(replace(task, train=fitted), chosen, task.held_out, ["tables.0.weight"])


def sasrec(path: Path) -> Bench:
    lines, length = sketches.read_sequences(path), 20

    def metrics(model: nn.Module) -> Figures:
        found: Figures = {}
        for name, part in (("", [line[:-1] for line in lines]), ("test_", lines)):
            found[f"{name}ndcg@10"], found[f"{name}hr@10"] = sketches.rank_last(model, part, length)
        return found

    def logits(model: nn.Module, batch: sketches.Batch) -> Tensor:
        return model(batch[0])[batch[1] > 0] @ model.item.weight.T

    def softmax(model: nn.Module, batch: sketches.Batch) -> Tensor:
        return F.cross_entropy(logits(model, batch), batch[1][batch[1] > 0], reduction="none")

    task = replace(sketches.sasrec(path, held_out=2), losses=softmax, epochs=15)
    everything = {"learning_rate": 1e-3, "epochs": 4, "distill_weight": 10.0, "codes": "frozen"}
    return Bench(task, metrics, "ndcg@10", "max", ["item.weight"], logits=logits, everything=everything)


def criteo(folder: Path) -> Bench:
    """See `examples/dlrm_criteo.py`: 300,000 drawn events, 26 tables of up to 20,000 rows."""
    import dlrm_criteo as example

    file = folder / "train.txt"
    if not file.exists():
        example.generate(file, 300_000, 20_000, 0)
    data = example.read(file, 20_000)

    class Adapter(example.DLRM):
        def __init__(self, make: sketches.MakeTable) -> None:
            super().__init__(data.sizes, make)

    def losses(model: nn.Module, batch: sketches.Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2], reduction="none")

    def metrics(model: nn.Module) -> Figures:
        valid, test = (example.evaluate(model, part, "cpu") for part in (data.valid, data.test))
        return valid | {f"test_{name}": value for name, value in test.items()}

    train = (data.train.dense, data.train.ids, data.train.label)
    task = sketches.Task(Adapter, train, losses, lambda model: -metrics(model)["bce"], 2048, 4, (), "BCE")
    tables = [f"emb_l.{field}.weight" for field, rows in enumerate(data.sizes) if rows >= 900]
    return Bench(task, metrics, "bce", "min", tables, example.maker("full", 0, 0), learning_rate=2e-3)


# runs


def train(bench: Bench, make: sketches.MakeTable, seed: int, step_size: float = 0.3) -> tuple[nn.Module, Figures]:
    """Train from scratch; the epoch that is best on the validation part. Layers of CQR are clustered every epoch."""
    torch.manual_seed(seed)
    task = bench.task
    model = task.build(make)
    optimizer = torch.optim.AdamW(model.parameters(), lr=bench.learning_rate)
    steps, schedule = -(-len(task.train[0]) // task.batch_size), None
    if clusterable_layers(model):

        def losses() -> Iterator[Tensor]:
            for batch in task.batches(4 * task.batch_size, shuffled=False):
                yield task.losses(model, batch)

        schedule = cqr.ClusterSchedule.every_epoch(
            model,
            steps,
            task.epochs,
            optimizer=optimizer,
            losses=losses,
            options=cqr.ClusterOptions(step_size=step_size),
        )
    best: tuple[nn.Module, Figures] | None = None
    for _ in range(task.epochs):
        model.train()
        batches = list(task.batches(task.batch_size, shuffled=True))
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            task.losses(model, batch).mean().backward()
            optimizer.step()
            if i + 1 == len(batches):  # before the clustering that ends the epoch
                model.eval()
                with torch.no_grad():
                    found = bench.metrics(model)
                if best is None or bench.is_better(found[bench.metric], best[1][bench.metric]):
                    best = copy.deepcopy(model), found
            if schedule is not None:
                schedule.step()
    assert best is not None
    return best


def scratch(bench: Bench, method: str, budget: int, seed: int) -> tuple[int, Figures] | None:
    """Train tables of at most `budget` bytes from scratch, codebooks counted in float16."""
    for codewords in (2**power for power in range(12, 1, -1)):
        try:
            model = bench.task.build(sketches.maker(method, codewords, seed))
        except cqr.CqrCompressError:
            continue
        size = 0
        for layer in model.modules():
            if isinstance(layer, cqr.CompressedEmbedding):
                size += layer.nbytes - 2 * layer.num_parameters
        if size and size <= budget:
            step_size = 0.1 if len(bench.tables) > 10 else 0.3
            return size, train(bench, sketches.maker(method, codewords, seed), seed, step_size)[1]
    return None


def run(bench: Bench, args: argparse.Namespace, folder: Path) -> None:
    rows: dict[tuple[str, str, float], list[tuple[int, Figures]]] = {}
    names = [f"test_{name}" for name in (bench.metric, *(("hr@10",) if bench.metric == "ndcg@10" else ()))]
    names += ["test_auc"] if bench.metric == "bce" else []
    dense: list[Figures] = []
    print(f"{'ratio':>5} {'method':9} {'what':15} {'bytes':>9}  " + "  ".join(f"{n:>12} change" for n in names))
    for seed in args.seeds:
        model, metrics = train(bench, bench.full_table, seed)
        dense.append(metrics)
        ckpt = folder / f"dense-{seed}.pt"
        torch.save(model.state_dict(), ckpt)
        for ratio in args.ratios:
            for method in args.methods:
                try:
                    one_conversion(bench, model, ckpt, ratio, method, seed, args.ways, rows)
                except cqr.CqrCompressError as e:
                    print(f"{ratio:5g} {method:9} cannot be: {e}", flush=True)
        if args.scratch:
            for ratio in args.ratios:
                tuned = [
                    found[-1][0]
                    for (_, what, at), found in rows.items()
                    if what.startswith("tuned") and at == ratio
                ]
                budget = max(tuned, default=0)
                for method in ("cqr", "cqr-paper"):
                    made = scratch(bench, method, budget, seed)
                    if made is not None:
                        rows.setdefault((method, "from scratch", ratio), []).append(made)
        show_all(rows, dense, names, seed, bench)


def one_conversion(
    bench: Bench, model: nn.Module, ckpt: Path, ratio: float, method: str, seed: int, names: list[str],
    rows: dict[tuple[str, str, float], list[tuple[int, Figures]]],
) -> None:  # fmt: skip
    small = ckpt.with_suffix(f".{ratio:g}.{method}.safetensors")
    request = cqr.ConvertOptions(
        method=method, ratio=ratio, min_rows=900, seed=seed, helper="none" if method == "cqr" else None
    )
    report = cqr.convert(ckpt, small, request, tables=bench.tables, force=True)
    ways: Mapping[str, dict[str, Any]] = {
        "tuned": {},
        "tuned, all": {"trainable": "all", "distill": "outputs", **bench.everything},
    }
    for what in names:
        options, task = ways[what], bench.tuning_task(model, what == "tuned" or not bench.logits)
        began = time.monotonic()
        tuned = cqr.finetune(
            small, small.with_suffix(".tuned"), task, cqr.FinetuneOptions(seed=seed, **options), original=ckpt,
            evaluate_original=False, force=True,
        )  # fmt: skip
        assert tuned.size is not None
        if what == names[0]:
            size = sum(table.bytes_after for table in report.tables)
            rows.setdefault((method, "converted", ratio), []).append((size, tuned.before))
        size = sum(table.bytes_after for table in tuned.size.tables)
        rows.setdefault((method, what, ratio), []).append((size, tuned.after))
        layouts = sorted({table.layout for table in tuned.size.tables})
        print(
            f"  seed {seed} ratio {ratio:g} {method} {what}: {tuned.summary}; {', '.join(layouts)}; "
            f"{time.monotonic() - began:.0f} s", flush=True,
        )  # fmt: skip


def show_all(
    rows: dict[tuple[str, str, float], list[tuple[int, Figures]]], dense: list[Figures], names: list[str], seed: int,
    bench: Bench,
) -> None:  # fmt: skip
    print(f"after {len(dense)} seeds:")
    first = "  ".join(f"{statistics.mean(d[name] for d in dense):12.4f}       " for name in names)
    print(f"{'':5} {'dense':25} {'':9}  {first}")
    for (method, what, ratio), found in sorted(rows.items(), key=lambda item: (item[0][2], item[0][0])):
        cells = []
        for name in names:
            changes = [f[name] / d[name] - 1 for (_, f), d in zip(found, dense, strict=False)]
            spread = f" +-{statistics.stdev(changes):.2%}" if len(changes) > 1 else ""
            cells.append(
                f"{statistics.mean(f[name] for _, f in found):12.4f} {statistics.mean(changes):+.2%}{spread}"
            )
        size = statistics.mean(size for size, _ in found)
        print(f"{ratio:5g} {method:9} {what:15} {size:9,.0f}  {'  '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["movielens", "synthetic", "frappe", "sasrec", "criteo"])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--test-file", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=["pq", "rq", "cqr"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scratch", action="store_true")
    ways = ["tuned", "tuned, all"]
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = {
            "movielens": lambda: movielens(args.file),
            "synthetic": lambda: synthetic(args.file),
            "frappe": lambda: frappe(args.file, args.test_file),
            "sasrec": lambda: sasrec(args.file),
            "criteo": lambda: criteo(folder),
        }[args.task]()
        run(bench, args, folder)


if __name__ == "__main__":
    main()
