"""Dense, converted and tuned models side by side: five tasks, four ratios, three methods.

    python tests/benchmarks/finetune.py movielens --file ml-100k.inter
    python tests/benchmarks/finetune.py synthetic [--file s2k.npz]
    python tests/benchmarks/finetune.py frappe --file frappe.validation.libfm --test-file frappe.test.libfm
    python tests/benchmarks/finetune.py sasrec --file Beauty.txt
    python tests/benchmarks/finetune.py criteo

A dense model is trained. Its checkpoint is converted at each ratio, the bytes of all compressed tables and what
belongs to them beside float32, and then fine-tuned: with the defaults, or with `--ways "tuned, all"`, which is
`trainable="all", distill="outputs"` (bytes of the tables are the same). `--scratch` trains CQR and the paper's CQR
from scratch, at float16 codebooks with no more bytes than the ratio gives. The weight decay and the epoch of the dense
model, of each fine-tuning and of each training from scratch are chosen on the validation part, by the same search
(`search.py`); the metrics are of the test part, as means over seeds, changes beside the dense model with their spread.

Models: GMF (movielens, synthetic), SASRec, DLRM without dense features (frappe) as in `sketches.py`; criteo is
`examples/dlrm_criteo.py` on data that it draws. SASRec's test item is the last of each user, ranked among all items
that the user has not had, and the one before is for validation. It is trained with a softmax over all items, which
nearly doubles the NDCG that one negative for each item gives; the second way distils this softmax, without dropout.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_tasks
import sketches
import torch
from bench_tasks import Figures, Task
from search import GRID, Decay, Search, Trained
from torch import nn

import cqr_compress as cqr

Row = tuple[int, Figures]
"""Bytes of the tables, and metrics."""
WAYS = ("tuned", "tuned, all")


@dataclass
class Runs:
    """What has been measured.

    Attributes:
        task: the task.
        folder: for files.
        search: the choices so far.
        dense: metrics of the dense model, for each seed.
        rows: by method, stage and ratio, for each seed.
    """

    task: Task
    folder: Path
    search: Search = field(default_factory=Search)
    dense: list[Figures] = field(default_factory=list)
    rows: dict[tuple[str, str, float], list[Row]] = field(default_factory=dict)

    def add(self, method: str, stage: str, ratio: float, size: int, figures: Figures) -> None:
        self.rows.setdefault((method, stage, ratio), []).append((size, figures))

    def train_dense(self, seed: int) -> tuple[nn.Module, Path]:
        ckpt = self.folder / f"dense-{seed}.pt"
        if ckpt.exists():
            model = self.task.build(self.task.full_table)
            model.load_state_dict(torch.load(ckpt, weights_only=True))
            figures = self.task.metrics(model)
        else:
            model, figures = self.search.best("dense", partial(sketches.train, self.task, "full", 0, seed))
            torch.save(model.state_dict(), ckpt)
        self.dense.append(figures)
        return model, ckpt

    def convert_and_tune(
        self, model: nn.Module, ckpt: Path, ratio: float, method: str, seed: int, ways: list[str]
    ) -> None:
        small = ckpt.with_suffix(f".{ratio:g}.{method}.safetensors")
        request = cqr.ConvertOptions(
            method=method, ratio=ratio, min_rows=900, seed=seed, helper="none" if method == "cqr" else None
        )
        report = cqr.convert(ckpt, small, request, tables=list(self.task.tables), force=True)
        refit, before = requantize(self.task, model, small, ckpt, seed)
        self.add(method, "converted", ratio, sum(table.bytes_after for table in report.tables), before)
        for way in ways:
            tuned = self.search.best(
                (way, method, ratio), partial(tune, self.task, model, refit, ckpt, seed, way == "tuned, all")
            )
            assert tuned.size is not None
            self.add(method, way, ratio, sum(table.bytes_after for table in tuned.size.tables), tuned.after)

    def train_from_scratch(self, method: str, ratio: float, seed: int) -> None:
        """Train tables from scratch in at most the bytes of the largest fine-tuned ones."""
        tuned = [found[-1][0] for (_, way, at), found in self.rows.items() if way in WAYS and at == ratio]
        for codewords in (2**power for power in range(12, 1, -1)):
            try:
                model = self.task.build(sketches.maker(method, codewords, seed))
            except cqr.CqrCompressError:
                continue
            size = 0
            for layer in model.modules():
                if isinstance(layer, cqr.CompressedEmbedding):
                    size += layer.nbytes - 2 * layer.num_parameters  # codebooks in float16
            if 0 < size <= max(tuned, default=0):
                _, figures = self.search.best(
                    ("from scratch", method, ratio), partial(sketches.train, self.task, method, codewords, seed)
                )
                self.add(method, "from scratch", ratio, size, figures)
                return


def requantize(task: Task, model: nn.Module, small: Path, ckpt: Path, seed: int) -> tuple[Path, Figures]:
    """Do what fine-tuning does before it trains, once for all weight decays: the file, and the metrics before."""
    refit = small.with_suffix(".refit.safetensors")
    options = cqr.FinetuneOptions(seed=seed, max_steps=1)
    tuning = tuning_task(task, model, options.learning_rate, Decay(0.0), everything=False)
    report = cqr.finetune(small, refit, tuning, options, original=ckpt, evaluate_original=False, force=True)
    return refit, report.before


def tune(
    task: Task, model: nn.Module, refit: Path, ckpt: Path, seed: int, everything: bool, decay: Decay
) -> Trained[cqr.TuningReport]:
    """Train a re-quantized file with a weight decay."""
    settings: dict[str, Any] = {"trainable": "all", "distill": "outputs", **task.everything} if everything else {}
    options = cqr.FinetuneOptions(seed=seed, refit=False, **settings)
    report = cqr.finetune(
        refit, refit.with_suffix(".tuned.safetensors"), tuning_task(task, model, options.learning_rate, decay, everything),
        options, original=ckpt, evaluate_original=False, force=True,
    )  # fmt: skip
    return Trained(task.score(report.after), report, f"step {report.best_step} of {report.steps}")


def tuning_task(task: Task, model: nn.Module, learning_rate: float, decay: Decay, everything: bool) -> cqr.Task:
    arch = copy.deepcopy(model)
    for module in arch.modules() if everything and task.logits else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return cqr.Task(
        name="benchmark", model=lambda: copy.deepcopy(arch),
        train_batches=lambda epoch: task.batches(task.batch_size, shuffled=True), loss=task.losses,
        logits=task.logits, evaluate=task.metrics, metric=task.metric, mode=task.mode,
        optimizer=lambda parameters: decay.optimizer(parameters, learning_rate),
    )  # fmt: skip


def run(task: Task, args: argparse.Namespace, folder: Path) -> None:
    runs = Runs(task, folder, Search(tuple(args.decays)))
    names = [f"test_{name}" for name in (task.metric, *(("hr@10",) if task.metric == "ndcg@10" else ()))]
    names += ["test_auc"] if task.metric == "bce" else []
    print("what was chosen with the first seed, and is kept for the others:")
    for seed in args.seeds:
        model, ckpt = runs.train_dense(seed)
        for ratio in args.ratios:
            for method in args.methods:
                try:
                    runs.convert_and_tune(model, ckpt, ratio, method, seed, args.ways)
                except cqr.CqrCompressError as e:
                    print(f"{ratio:5g} {method:9} cannot be: {e}", flush=True)
            for method in ("cqr", "cqr-paper") if args.scratch else ():
                runs.train_from_scratch(method, ratio, seed)
        show(runs, names)


def show(runs: Runs, names: list[str]) -> None:
    print(f"after {len(runs.dense)} seeds:")
    print(f"{'ratio':>5} {'method':9} {'what':15} {'bytes':>9}  " + "  ".join(f"{n:>12} change" for n in names))
    first = "  ".join(f"{statistics.mean(d[name] for d in runs.dense):12.4f}       " for name in names)
    print(f"{'':5} {'dense':25} {'':9}  {first}")
    for (method, what, ratio), found in sorted(runs.rows.items(), key=lambda item: (item[0][2], item[0][0])):
        cells = []
        for name in names:
            changes = [f[name] / d[name] - 1 for (_, f), d in zip(found, runs.dense, strict=False)]
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
    parser.add_argument("--methods", nargs="*", default=["pq", "rq", "cqr"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--decays", type=Decay.parse, nargs="+", default=GRID, help="0.1 (Adam) or AdamW:0.1")
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument(
        "--device", default="cpu", help="cuda trains sasrec there; the other tasks are for the CPU"
    )
    parser.add_argument("--folder", type=Path, help="keeps the dense models, which are then not trained again")
    parser.add_argument("--ways", nargs="+", default=["tuned"], choices=WAYS)
    args = parser.parse_args()
    torch.set_default_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        make: dict[str, Callable[[], Task]] = {
            "movielens": lambda: bench_tasks.movielens(args.file),
            "synthetic": lambda: bench_tasks.synthetic(args.file),
            "frappe": lambda: bench_tasks.frappe(args.file, args.test_file),
            "sasrec": lambda: bench_tasks.sasrec(args.file),
            "criteo": lambda: bench_tasks.criteo(folder),
        }
        run(make[args.task](), args, folder)


if __name__ == "__main__":
    main()
