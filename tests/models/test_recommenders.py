"""Recommenders of torch-rechub and deepctr-torch, trained for an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding

ROWS, USERS, ITEMS = 6000, 1500, 1200


def clicks() -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    features = {"user": random.integers(0, USERS, ROWS), "item": random.integers(0, ITEMS, ROWS)}
    return features, ((features["user"] % 7 + features["item"] % 5) > 5).astype("float32")


def test_torch_rechub_deepfm_after_an_epoch(load_both: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    def build() -> nn.Module:
        torch.manual_seed(0)
        fields = [SparseFeature("user", USERS, 16), SparseFeature("item", ITEMS, 16)]
        return DeepFM(fields, fields, {"dims": [32], "dropout": 0.0})

    features, label = clicks()
    model = build()
    loader, _, _ = DataGenerator(features, label).generate_dataloader(split_ratio=[0.8, 0.1], batch_size=500)
    trainer = CTRTrainer(model, n_epoch=1, device="cpu", model_path=str(tmp_path))
    trainer.fit(loader)
    tables = [name for name in model.state_dict() if "embed_dict" in name]
    dense, compressed = load_both(model, build, tables, ratio=4.0)
    assert sum(isinstance(m, CompressedEmbedding) for m in compressed.modules()) == 2
    batch = {name: torch.as_tensor(values[:400]) for name, values in features.items()}
    assert float((compressed(batch) - dense(batch)).abs().max().detach()) < 1e-5


def test_deepctr_deepfm_after_an_epoch(load_both: Any) -> None:
    pytest.importorskip("deepctr_torch")
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM

    features, label = clicks()

    def build() -> nn.Module:
        fields = [SparseFeat("user", USERS, embedding_dim=16), SparseFeat("item", ITEMS, embedding_dim=16)]
        model = DeepFM(fields, fields, dnn_hidden_units=(32,), task="binary", device="cpu", seed=0)
        model.compile("adam", "binary_crossentropy", metrics=[])
        return model

    model = build()
    model.fit(features, label, batch_size=500, epochs=1, verbose=0)
    tables = ["embedding_dict.user.weight", "embedding_dict.item.weight"]
    dense, compressed = load_both(model, build, tables, ratio=4.0)
    expected = dense.predict(features, batch_size=1000)
    assert np.abs(compressed.predict(features, batch_size=1000) - expected).max() < 1e-5
    before = [p.detach().clone() for p in compressed.embedding_dict["user"].parameters()]
    compressed.float().compile("adam", "binary_crossentropy", metrics=[])
    compressed.fit(features, label, batch_size=500, epochs=1, verbose=0)
    after = list(compressed.embedding_dict["user"].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), (
        "codebooks train in its own loop"
    )


def test_sentence_transformers_static_embedding(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = [f"w{i}" for i in range(3000)]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()

    def build() -> SentenceTransformer:
        torch.manual_seed(0)
        return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")

    model = build()
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    small = tmp_path / "small.safetensors"
    cqr.convert(
        tmp_path / "ckpt.pt", small, cqr.ConvertOptions(method="pq", ratio=8), tables=["0.embedding.weight"]
    )
    dense, compressed = build(), build()
    dense.load_state_dict(cqr.load_dense_state_dict(small))
    assert cqr.load_compressed(compressed, small).tables == ("0.embedding.weight",)
    texts = ["w1 w2 w3", "w999 nothing w5", ""]
    assert np.abs(compressed.encode(texts) - dense.encode(texts)).max() < 1e-5
    assert isinstance(compressed[0].embedding, cqr.CompressedEmbeddingBag)
