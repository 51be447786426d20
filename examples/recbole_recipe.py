"""RecBole: train a model, compress its checkpoint, fine-tune it, with RecBole's own trainer and evaluation.

    python3.11 -m venv env && env/bin/pip install . recbole 'numpy<2' 'pandas<3' \
        && env/bin/python examples/recbole_recipe.py [--model BPR] [--data ratings.inter] [--ratios 8 16]

Without `--data` it takes MovieLens-100k, which RecBole carries; a file of yours has the columns user_id, item_id
and timestamp. RecBole 1.2 runs on Python 3.11 or older. Of each user, RecBole trains on 80% of the items, a tenth
chooses among weights, and a tenth is for the test: NDCG@10 among all items that the user has not had. The last
line is a model that never had a full table: it is trained from the start with `CQREmbedding`, and a hook of the
optimizer reclusters it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from torch import Tensor, nn

import cqr_compress as cqr

MIN_ROWS = 500  # smaller tables stay dense
METRIC = "ndcg@10"
warnings.filterwarnings("ignore", module="recbole")  # its calls of pandas and torch are deprecated
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # RecBole reads its own checkpoints, which hold objects


class Recipe:
    """What RecBole makes of a configuration: the data, models, and a trainer that evaluates any of them."""

    def __init__(self, config: Any) -> None:
        self.config = config
        init_seed(config["seed"], config["reproducibility"])
        self.train, self.valid, self.test = data_preparation(config, create_dataset(config))
        self.trainer = self.new_trainer(self.model())

    def model(self) -> Any:
        return get_model(self.config["model"])(self.config, self.train.dataset).to(self.config["device"])

    def new_trainer(self, model: nn.Module) -> Any:
        return get_trainer(self.config["MODEL_TYPE"], self.config["model"])(self.config, model)

    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        self.trainer.model = model
        return dict(self.trainer.evaluate(data, load_best_model=False))

    def evaluate_file(self, path: Path) -> float:
        """The test's metric of a compressed file, loaded into RecBole's own model."""
        model = self.model()
        cqr.load_compressed(model, path)
        return self.evaluate(model, self.test)[METRIC]

    def batches(self, epoch: int) -> Any:
        """RecBole's training batches; its loader shuffles with a generator of its own."""
        self.train.generator.manual_seed(self.config["seed"] + epoch)
        return self.train

    def loss(self, model: Any, batch: Any) -> Tensor:
        return model.calculate_loss(batch.to(self.config["device"]))

    def task(self) -> cqr.Task:
        """For fine-tuning: RecBole's batches, the model's own loss, and RecBole's metrics on held-out items."""
        return cqr.Task(
            name=f"recbole-{self.config['model']}",
            model=self.model,
            train_batches=self.batches,
            loss=self.loss,
            evaluate=lambda model: self.evaluate(model, self.valid),
            metric=METRIC,
        )


def configure(args: argparse.Namespace) -> Any:
    """RecBole's configuration; an own file is copied to where RecBole looks for it."""
    settings = {
        "data_path": str(args.folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "checkpoint_dir": str(args.folder), "show_progress": False, "seed": args.seed, "epochs": args.epochs,
        "embedding_size": args.dim, "eval_batch_size": 2**20, "metrics": ["NDCG", "Recall"], "topk": [10],
        "valid_metric": METRIC, "learning_rate": args.learning_rate, "stopping_step": 5,
    }  # fmt: skip
    if args.data is not None:
        (args.folder / "own").mkdir(exist_ok=True)
        shutil.copyfile(args.data, args.folder / "own" / "own.inter")
    sys.argv = sys.argv[:1]  # Config reads the command line, too
    return Config(model=args.model, dataset="own" if args.data else "ml-100k", config_dict=settings)


def train_from_the_start(recipe: Recipe, codebook_size: int, learning_rate: float) -> tuple[Any, float]:
    """Train a model whose tables are sketches from the first step on; the model, and the test's metric."""
    model = recipe.model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Embedding) and layer.num_embeddings >= MIN_ROWS:
            rows, dim = layer.num_embeddings, layer.embedding_dim
            sketch = cqr.CQREmbedding(rows, dim, layer.padding_idx, codebook_size=codebook_size, seed=1)
            model.set_submodule(name, sketch.to(recipe.config["device"]))
    recipe.config["learning_rate"] = learning_rate
    trainer = recipe.new_trainer(model)
    trainer.stopping_step = recipe.config["epochs"]  # the metric rises late, after some clusterings

    def losses() -> Iterator[Tensor]:
        """A pass over the training data, for clustering: RecBole's loss is a mean, so times its examples."""
        for batch in recipe.train:
            yield (recipe.loss(model, batch) * len(batch)).reshape(1)

    schedule = cqr.ClusterSchedule.every_epoch(
        model, len(recipe.train), recipe.config["epochs"], optimizer=trainer.optimizer, losses=losses
    )
    trainer.optimizer.register_step_post_hook(lambda *_: schedule.step())
    trainer.fit(recipe.train, recipe.valid, verbose=False)
    return model, trainer.evaluate(recipe.test)[METRIC]  # of the best weights on `valid`, which it loads


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of RecBole, compress it and fine-tune it.")
    parser.add_argument("--model", default="BPR", help="a general recommender of RecBole")
    parser.add_argument("--data", type=Path, help="an .inter file; if not given, MovieLens-100k")
    parser.add_argument("--folder", type=Path, default=Path("recbole-recipe"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 16.0])
    parser.add_argument("--epochs", type=int, default=60, help="at most: training stops early")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--codebook-size", type=int, default=64, help="of the model trained from the start")
    parser.add_argument("--sketch-learning-rate", type=float, default=6e-3, help="of that model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs: give at least 2, for a clustering before the end of the training")
    args.folder, args.data = args.folder.resolve(), args.data and args.data.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)  # RecBole writes logs to where it runs
    recipe = Recipe(configure(args))
    print(f"training {args.model} on {len(recipe.train.dataset):,} ratings", flush=True)
    recipe.trainer.fit(recipe.train, recipe.valid, verbose=False)
    ckpt = Path(recipe.trainer.saved_model_file)
    lines = [("dense", 0, recipe.trainer.evaluate(recipe.test)[METRIC])]
    for ratio in args.ratios:
        small, tuned = (args.folder / f"{name}-{ratio:g}x.safetensors" for name in ("small", "tuned"))
        size = cqr.convert(ckpt, small, ratio=ratio, min_rows=MIN_ROWS, force=True)
        lines[0] = ("dense", size.tables_bytes_before, lines[0][2])
        lines.append((f"converted {ratio:g}x", size.tables_bytes_after, recipe.evaluate_file(small)))
        report = cqr.finetune(small, tuned, recipe.task(), original=ckpt, force=True)
        print(f"{ratio:g}x fine-tuned, held-out items: {report.summary}", flush=True)
        size = report.size or size
        lines.append((f"fine-tuned {ratio:g}x", size.tables_bytes_after, recipe.evaluate_file(tuned)))
    model, metric = train_from_the_start(recipe, args.codebook_size, args.sketch_learning_rate)
    size = cqr.save_compressed(model, args.folder / "from-the-start.safetensors", force=True)
    lines.append(("from the start", size.tables_bytes_after, metric))
    print(f"\n{'on the test':<18}{'bytes of tables':>16}{METRIC.upper():>10}")
    for name, nbytes, value in lines:
        print(f"{name:<18}{nbytes:>16,}{value:>10.4f}")


if __name__ == "__main__":
    main()
