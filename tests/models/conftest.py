"""Models that others wrote: compress a checkpoint of one, load it, and compare with the exported dense file.

They need the packages of the `models` extra and are skipped where those are not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import cqr_compress as cqr

Pair = tuple[nn.Module, nn.Module]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of other people's packages are theirs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def load_both(tmp_path: Path) -> Callable[..., Pair]:
    """Compress a model's state_dict; give the dense model that was exported and the compressed one."""

    def load(model: nn.Module, build: Callable[[], nn.Module], tables: list[str], ratio: float = 8.0) -> Pair:
        torch.save(model.state_dict(), tmp_path / "ckpt.pt")
        request = cqr.ConvertOptions(method="pq", ratio=ratio)
        cqr.convert(tmp_path / "ckpt.pt", tmp_path / "small.safetensors", request, tables=tables)
        cqr.export(tmp_path / "small.safetensors", tmp_path / "dense.pt")
        dense, compressed = build(), build()
        dense.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
        loaded = cqr.load_compressed(compressed, tmp_path / "small.safetensors")
        assert set(tables) <= set(loaded.tables)
        return dense.eval(), compressed.eval()

    return load
