"""The size that a sweep chooses for a loss of 1%, and the metric on test data that it has not seen.

    python tests/benchmarks/sweeps.py gmf --data ml-100k.inter --folder sweeps
    python tests/benchmarks/sweeps.py gmf --data ml-100k.inter --folder sweeps --finetune
    python tests/benchmarks/sweeps.py sasrec --data Beauty.txt --folder sweeps
    python tests/benchmarks/sweeps.py minilm --data FOLDER --folder sweeps

The dense models of gmf and sasrec are trained as those of `finetune.py`, with their weight decay searched on the
validation part, which the sweep uses, too. The metric of minilm is the rank correlation of the similarities of pairs
of sentences with those of the dense encoder, on half of the sentences; the test is on the other half. Each sweep ends
with its page, `page.html` in the folder of the task.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import bench_tasks
import torch
from finetune import Runs, tuning_task
from search import GRID, Decay, Search
from torch import Tensor, nn

import cqr_compress as cqr


def recommender(args: argparse.Namespace) -> tuple[Path, cqr.Task, list[str]]:
    """Train the dense model; return its checkpoint, the task and its tables."""
    task = bench_tasks.movielens(args.data) if args.task == "gmf" else bench_tasks.sasrec(args.data)
    decays = tuple(decay for decay in GRID if not args.decays or decay.value in args.decays)
    runs = Runs(task, args.folder, Search(decays))
    model, ckpt = runs.train_dense(0)
    return ckpt, tuning_task(task, model, 3e-4, Decay(0.0), everything=False), list(task.tables)


def encoder(args: argparse.Namespace) -> tuple[Path, cqr.Task, list[str]]:
    """The sentence encoder of a folder, and the similarities of its sentence vectors."""
    from sentence_vectors import SENTENCES, rank_correlation
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.data / "tokenizer.json"), pad_token="[PAD]")
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][:, :, None]
    held: list[Tensor] = []

    @torch.no_grad()
    def vectors(model: nn.Module) -> Tensor:
        hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def metrics(model: nn.Module) -> dict[str, float]:
        found = vectors(model)
        if not held:  # the dense model is the first one
            held.append(found)
        half = len(SENTENCES) // 2
        parts = {"rank": slice(half), "test_rank": slice(half, None)}
        return {name: rank_correlation(held[0][part], found[part]) for name, part in parts.items()}

    task = cqr.Task(
        name="pairs", model=lambda: AutoModel.from_config(AutoConfig.from_pretrained(args.data)),
        train_batches=lambda epoch: [0], loss=lambda model, batch: 0 * model(input_ids=tokens["input_ids"][:2])[0].sum(),
        evaluate=metrics, metric="rank",
    )  # fmt: skip
    return args.data, task, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("gmf", "sasrec", "minilm"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-loss", type=float, default=0.01)
    parser.add_argument("--decays", type=float, nargs="*")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--finetune", action="store_true")
    args = parser.parse_args()
    args.folder = args.folder / args.task
    args.folder.mkdir(parents=True, exist_ok=True)
    ckpt, task, tables = encoder(args) if args.task == "minilm" else recommender(args)
    began = time.monotonic()
    more: dict[str, Any] = {"finetune_options": cqr.FinetuneOptions()} if args.finetune else {}
    report = cqr.sweep(
        ckpt, args.folder / "small.safetensors", task=task, max_loss=args.max_loss, tables=tables,
        effort=args.effort,
        folder=args.folder / ("tuned" if args.finetune else "converted"), force=True, **more,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert report.dense is not None and report.chosen is not None
    test = f"test_{task.metric}"
    print("| ratio | bytes | validation | change | 95% interval | test | change |")
    print("|---|---|---|---|---|---|---|")
    print(f"| dense | {report.dense_bytes:,} | {report.dense[task.metric]:.4f} | | | {report.dense[test]:.4f} | |")
    for index, point in enumerate(report.points):
        assert point.metrics is not None
        mark = " (chosen)" if index == report.chosen else ""
        interval = (
            ""
            if point.interval is None
            else f"{-100 * point.interval[1]:+.2f} to {-100 * point.interval[0]:+.2f}%"
        )
        change = 100 * (point.metrics[test] / report.dense[test] - 1)
        print(
            f"| {point.ratio:g}x{mark} | {point.file_bytes:,} | {point.metrics[task.metric]:.4f} | "
            f"{-100 * point.loss:+.2f}% | {interval} | {point.metrics[test]:.4f} | {change:+.2f}% |"
        )
    page = args.folder / "page.html"
    cqr.write_page(report, page, original=ckpt, force=True)
    print(f"{seconds:.0f} s; {page.name}: {page.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
