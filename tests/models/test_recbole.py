"""RecBole: train on the data it carries, convert the .pth that it saved, evaluate with its own evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding

pytest.importorskip("recbole")


@pytest.mark.parametrize(
    ("name", "table"), [("BPR", "item_embedding.weight"), ("SASRec", "item_embedding.weight")]
)
def test_recbole_evaluates_the_compressed_model_as_the_exported_one(
    name: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recbole"])
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: original(*a, **{**k, "weights_only": False}))
    settings: dict[str, Any] = {
        "epochs": 1, "use_gpu": False, "show_progress": False, "checkpoint_dir": str(tmp_path / "saved"),
        "train_batch_size": 2048, "seed": 1, "reproducibility": True, "embedding_size": 32, "hidden_size": 32,
        "inner_size": 32, "n_layers": 1, "n_heads": 2, "metrics": ["Recall", "NDCG"], "topk": [10],
        "valid_metric": "NDCG@10", "train_neg_sample_args": None if name == "SASRec" else {
            "distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0},
    }  # fmt: skip
    config = Config(model=name, dataset="ml-100k", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))

    def build() -> Any:
        init_seed(config["seed"], config["reproducibility"])
        return get_model(name)(config, train.dataset).to("cpu")

    trainer = get_trainer(config["MODEL_TYPE"], name)(config, build())
    trainer.fit(train, valid, saved=True, show_progress=False)
    original_result = dict(trainer.evaluate(test, show_progress=False))
    small = tmp_path / "small.safetensors"
    request = cqr.ConvertOptions(method="pq", ratio=4, min_rows=900)
    report = cqr.convert(trainer.saved_model_file, small, request, tables=[table])
    dense, compressed = build(), build()
    dense.load_state_dict(cqr.load_dense_state_dict(small))
    loaded = cqr.load_compressed(compressed, small)
    assert table in loaded.tables and isinstance(compressed.item_embedding, CompressedEmbedding)
    results = []
    for model in (dense, compressed):
        evaluator = get_trainer(config["MODEL_TYPE"], name)(config, model)
        results.append(evaluator.evaluate(test, load_best_model=False, show_progress=False))
    assert results[0] == results[1] and results[0]["recall@10"] > 0
    batch = next(iter(test))[0]
    with torch.no_grad():
        difference = compressed.eval().full_sort_predict(batch) - dense.eval().full_sort_predict(batch)
    assert float(difference.abs().max()) < 1e-5
    sizes = report.tables[0].bytes_before, report.tables[0].bytes_after
    print(f"{name}: table {sizes[0]} -> {sizes[1]} bytes", original_result, "->", dict(results[1]))
