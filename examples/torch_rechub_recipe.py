"""torch-rechub: train DeepFM, compress its checkpoint, fine-tune it, with torch-rechub's own trainer and AUC.

    python3 -m venv env && env/bin/pip install . torch-rechub \
        && env/bin/python examples/torch_rechub_recipe.py u.data [--ratios 8 16]

The file has lines of user, item, rating and time, separated by tabs: `u.data` of MovieLens-100k, or RecBole's
`.inter` with its heading. Ratings of 4 and 5 are positive and 3 is left out. torch-rechub splits them at random:
80% are trained on, a tenth chooses among weights, and a tenth is for the test. The last line is a model that never
had a full table: it is trained from the start with `CQREmbedding` as torch-rechub's initializer of tables, and a
hook of the optimizer reclusters it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before torch is imported: no bars of torch-rechub

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_rechub.basic.features import SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models.ranking import DeepFM
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

import cqr_compress as cqr

MIN_ROWS = 500  # smaller tables stay dense
DENSE = RandomNormal(0, 0.01)


class Recipe:
    """The data in torch-rechub's loaders, models, and a trainer that evaluates any of them."""

    def __init__(self, ratings: np.ndarray, args: argparse.Namespace) -> None:
        self.args = args
        self.sizes = {"user": int(ratings[:, 0].max()) + 1, "item": int(ratings[:, 1].max()) + 1}
        features = {"user": ratings[:, 0].astype(np.int64), "item": ratings[:, 1].astype(np.int64)}
        torch.manual_seed(args.seed)
        self.train, self.valid, self.test = DataGenerator(
            features, (ratings[:, 2] >= 4).astype(np.float32)
        ).generate_dataloader(split_ratio=[0.8, 0.1], batch_size=args.batch_size)
        self.trainer = self.new_trainer(self.model(), "dense")

    def model(self, initializer: Any = DENSE) -> Any:
        """DeepFM. A feature keeps the table that it made, so each model gets features of its own."""
        fields = [SparseFeature(n, size, self.args.dim, initializer=initializer) for n, size in self.sizes.items()]
        return DeepFM(fields, fields, {"dims": [64], "dropout": 0.2})

    def new_trainer(self, model: nn.Module, name: str, patience: int = 1) -> CTRTrainer:
        """A trainer, with a folder for its model.pth; it takes the best weights where it stops early."""
        folder = self.args.folder / name
        folder.mkdir(exist_ok=True)
        parameters = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
        return CTRTrainer(
            model, optimizer_params=parameters, n_epoch=self.args.epochs, earlystop_patience=patience,
            model_path=str(folder),
        )  # fmt: skip

    def evaluate_file(self, path: Path) -> float:
        """AUC on the test of a compressed file, loaded into torch-rechub's own model."""
        model = self.model()
        cqr.load_compressed(model, path)
        return float(self.trainer.evaluate(model, self.test))

    def task(self) -> cqr.Task:
        """For fine-tuning: torch-rechub's batches and AUC; its models return probabilities."""
        return cqr.Task(
            name="torch-rechub-deepfm",
            model=self.model,
            train_batches=lambda epoch: self.train,
            loss=losses_of,
            evaluate=lambda model: {"auc": self.trainer.evaluate(model, self.valid)},
            metric="auc",
        )


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss of each example of a batch."""
    features, label = batch
    return F.binary_cross_entropy(model(features), label, reduction="none")


def read(path: Path) -> Any:
    """Rows of user, item and rating, without those of 3."""
    with path.open() as file:
        heading = not file.readline().split("\t")[0].isdecimal()
    rows = np.loadtxt(path, delimiter="\t", skiprows=int(heading), usecols=(0, 1, 2))
    return rows[rows[:, 2] != 3]


def train_from_the_start(recipe: Recipe, codebook_size: int) -> tuple[nn.Module, float]:
    """Train a model whose tables are sketches from the first step on; the model, and its AUC on the test."""

    def sketch(rows: int, dim: int, padding_idx: int | None) -> nn.Module:
        return cqr.CQREmbedding(rows, dim, padding_idx, codebook_size=codebook_size, seed=1)

    model = recipe.model(sketch)
    trainer = recipe.new_trainer(model, "from-the-start", patience=3)

    def losses() -> Iterator[Tensor]:
        """A pass over the training data, for clustering."""
        for batch in recipe.train:
            yield losses_of(model, batch)

    schedule = cqr.ClusterSchedule.every_epoch(
        model, len(recipe.train), recipe.args.epochs, optimizer=trainer.optimizer, losses=losses
    )
    trainer.optimizer.register_step_post_hook(lambda *_: schedule.step())
    trainer.fit(recipe.train, recipe.valid)
    model.load_state_dict(trainer.early_stopper.best_weights)  # on `valid`
    return model, float(trainer.evaluate(model, recipe.test))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train DeepFM of torch-rechub, compress it and fine-tune it.")
    parser.add_argument("ratings", type=Path, help="u.data or an .inter file")
    parser.add_argument("--folder", type=Path, default=Path("torch-rechub-recipe"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 16.0])
    parser.add_argument("--epochs", type=int, default=10, help="at most: training stops early")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--codebook-size", type=int, default=16, help="of the model trained from the start")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs: give at least 2, for a clustering before the end of the training")
    args.folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(read(args.ratings), args)
    recipe.trainer.fit(recipe.train, recipe.valid)
    ckpt = args.folder / "dense" / "model.pth"
    lines = [("dense", 0, float(recipe.trainer.evaluate(recipe.trainer.model, recipe.test)))]
    for ratio in args.ratios:
        small, tuned = (args.folder / f"{name}-{ratio:g}x.safetensors" for name in ("small", "tuned"))
        size = cqr.convert(ckpt, small, ratio=ratio, min_rows=MIN_ROWS, force=True)
        lines[0] = ("dense", size.tables_bytes_before, lines[0][2])
        lines.append((f"converted {ratio:g}x", size.tables_bytes_after, recipe.evaluate_file(small)))
        report = cqr.finetune(small, tuned, recipe.task(), original=ckpt, force=True)
        print(f"{ratio:g}x fine-tuned, on held-out ratings: {report.summary}", flush=True)
        size = report.size or size
        lines.append((f"fine-tuned {ratio:g}x", size.tables_bytes_after, recipe.evaluate_file(tuned)))
    model, auc = train_from_the_start(recipe, args.codebook_size)
    size = cqr.save_compressed(model, args.folder / "from-the-start.safetensors", force=True)
    lines.append(("from the start", size.tables_bytes_after, auc))
    print(f"\n{'on the test':<18}{'bytes of tables':>16}{'AUC':>10}")
    for name, nbytes, value in lines:
        print(f"{name:<18}{nbytes:>16,}{value:>10.4f}")


if __name__ == "__main__":
    main()
