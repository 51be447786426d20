"""Train tables of few parameters from scratch, beside full tables and their PQ and RQ: quality at equal parameters.

    python tests/benchmarks/sketches.py gmf-movielens --file ml-100k.inter
    python tests/benchmarks/sketches.py gmf-synthetic [--file s2k.npz]
    python tests/benchmarks/sketches.py dlrm-synthetic [--file s2k.npz]
    python tests/benchmarks/sketches.py dlrm-frappe --file frappe.validation.libfm --test-file frappe.test.libfm
    python tests/benchmarks/sketches.py sasrec --file Beauty.txt --ppd 128 --seeds 0

The experiment of "Clustering the Sketch" (arXiv:2210.05974) with GMF, the product of a user's and an item's row, and
with other models. "ppd" is parameters for each dimension of a table: codebook parameters / embedding_dim. Every
method has the same number of codebook parameters; bytes are float32 codebooks and packed pointers of all tables.
The weight decay and the epoch of every method are chosen on the validation part, by the same search, and the figure
is of the test part; PQ and RQ compress the tables of the full model that is chosen, and are not trained on. A table
with no more rows than ppd stays full for every method.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import bench_tasks
import torch
from bench_tasks import Figures, MakeTable, Task, full_table
from search import Decay, Search, Trained
from torch import nn

import cqr_compress as cqr
from cqr_compress import ClusterOptions, ClusterSchedule, CompressedEmbedding, CQREmbedding, sketch_table
from cqr_compress.clustering.cluster import clusterable_layers

PATIENCE = 5
"""Epochs without improvement, after the last clustering, that end a training."""

Model = tuple[nn.Module, Figures]


# methods


def maker(method: str, ppd: int, seed: int) -> MakeTable:
    """How a method makes a table; each table has hashes of its own."""

    def make(size: int, dim: int, index: int) -> nn.Module:
        own = 1000 * seed + index
        if method in ("full", "pq", "rq") or size <= ppd:
            return full_table(size, dim, own)
        if method == "cqr":
            return CQREmbedding(size, dim, codebook_size=ppd, seed=own)
        if method == "cqr-paper":
            return CQREmbedding(size, dim, codebook_size=ppd // 2, preset="paper", seed=own)
        halves = {"qr", "hash_embeddings", "qr_hybrid"}
        return CompressedEmbedding(
            sketch_table(method, size, dim, ppd // 2 if method in halves else ppd, seed=own)
        )

    return make


def schedule_of(method: str, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer) -> ClusterSchedule:
    steps = -(-len(task.train[0]) // task.batch_size)
    if method == "cqr-paper":  # after each of the first 6 of 10 epochs
        return ClusterSchedule.every_epoch(model, steps, task.epochs, codes_until=0.6, optimizer=optimizer)

    def losses() -> Iterator[torch.Tensor]:
        for batch in task.batches(4 * task.batch_size, shuffled=False):
            yield task.losses(model, batch)

    options = ClusterOptions(step_size=task.step_size)
    return ClusterSchedule.every_epoch(
        model, steps, task.epochs, optimizer=optimizer, losses=losses, options=options
    )


def train(task: Task, method: str, ppd: int, seed: int, decay: Decay) -> Trained[Model]:
    """Train from scratch; the model of the epoch that is best on the validation part, with its metrics."""
    torch.manual_seed(seed)
    model = task.build(task.full_table if method == "full" else maker(method, ppd, seed))
    optimizer = decay.optimizer(model.parameters(), task.learning_rate)
    schedule = None
    if method in ("cqr", "cqr-paper") and clusterable_layers(model):
        schedule = schedule_of(method, model, task, optimizer)
    settled = len(schedule.steps) if schedule else 0  # one clustering for each epoch
    best = Trained[Model](float("-inf"), (model, {}), "")
    best_epoch = 0
    for epoch in range(1, task.epochs + 1):
        model.train()
        batches = list(task.batches(task.batch_size, shuffled=True))
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            task.losses(model, batch).mean().backward()
            optimizer.step()
            if i + 1 == len(batches):  # before the clustering that ends the epoch
                model.eval()
                with torch.no_grad():
                    figures = task.metrics(model)
                if task.score(figures) > best.score or not best_epoch:
                    when = f"epoch {epoch} of {task.epochs}"
                    best, best_epoch = Trained(task.score(figures), (copy.deepcopy(model), figures), when), epoch
            if schedule is not None:
                schedule.step()
        if epoch >= max(best_epoch, settled) + PATIENCE:
            break
    return best


def compressed(task: Task, model: nn.Module, method: str, ppd: int) -> Model:
    """Quantize the tables of a trained full model."""
    levels = 1 if method == "pq" else 4
    bits = (ppd // levels).bit_length() - 1
    request = cqr.ConvertOptions(
        method=method, n_bits=bits, codebook_dtype="float32", min_rows=ppd + 1,
        num_columns=8 if method == "pq" else None, num_levels=None if method == "pq" else levels,
    )  # fmt: skip
    model = copy.deepcopy(model).eval()
    cqr.compress_(model, request)
    return model, task.metrics(model)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters and bytes of all tables."""
    parameters = size = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and "position" not in name:
            own = layer.num_parameters if isinstance(layer, CompressedEmbedding) else layer.weight.numel()
            parameters += own
            size += layer.nbytes if isinstance(layer, CompressedEmbedding) else own * 4
    return parameters, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "task", choices=["gmf-movielens", "gmf-synthetic", "dlrm-synthetic", "dlrm-frappe", "sasrec"]
    )
    parser.add_argument("--file", type=Path)
    parser.add_argument("--test-file", type=Path)
    parser.add_argument("--ppd", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=[
        "full", "hash", "qr", "qr_concat", "hash_embeddings", "ce", "cqr-paper", "cqr", "pq", "rq"
    ])  # fmt: skip
    args = parser.parse_args()
    task = {
        "gmf-movielens": lambda: bench_tasks.movielens(args.file),
        "gmf-synthetic": lambda: bench_tasks.synthetic(args.file),
        "dlrm-synthetic": lambda: bench_tasks.synthetic(args.file, dlrm=True),
        "dlrm-frappe": lambda: bench_tasks.frappe(args.file, args.test_file),
        "sasrec": lambda: bench_tasks.sasrec(args.file),
    }[args.task]()
    print(f"{args.task}: {task.metric} on the test part, seeds {args.seeds}; what was chosen with the first:")
    print(f"{'ppd':>5} {'method':16} {'parameters':>11} {'bytes':>9} {'mean':>7}  each seed           s")
    search = Search()
    dense: dict[int, Model] = {}
    for ppd in args.ppd or task.ppd:
        for method in args.methods:
            started, scores = time.perf_counter(), []
            try:
                for seed in args.seeds:
                    if method in ("full", "pq", "rq") and seed not in dense:
                        dense[seed] = search.best("full", partial(train, task, "full", 0, seed))
                    if method == "full":
                        model, figures = dense[seed]
                    elif method in ("pq", "rq"):
                        model, figures = compressed(task, dense[seed][0], method, ppd)
                    else:
                        model, figures = search.best((method, ppd), partial(train, task, method, ppd, seed))
                    scores.append(figures[f"test_{task.metric}"])
            except cqr.CqrCompressError as e:
                print(f"{ppd:5} {method:16} cannot be: {e}", flush=True)
                continue
            parameters, size = sizes(model)
            each = " ".join(f"{score:.4f}" for score in scores)
            took = (time.perf_counter() - started) / len(scores)
            print(f"{ppd:5} {method:16} {parameters:11,} {size:9,} {statistics.mean(scores):7.4f}  {each:18} {took:5.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
