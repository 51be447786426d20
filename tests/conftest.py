"""Small real inputs: a trained-looking table, checkpoints of each format, the command line in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("CQR_COMPRESS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def table() -> torch.Tensor:
    """A 3000 x 16 table with clusters and unequal variances, as trained tables have."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(40, 16, generator=generator)
    rows = centers[torch.randint(40, (3000,), generator=generator)]
    rows = rows + 0.4 * torch.randn(3000, 16, generator=generator)
    return rows * torch.linspace(0.2, 2.0, 16)


@pytest.fixture
def model_state(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """A recommender's state_dict: two tables, a linear layer, an integer buffer."""
    generator = torch.Generator().manual_seed(2)
    return {
        "item_embedding.weight": table,
        "user_embedding.weight": torch.randn(1500, 16, generator=generator),
        "out.weight": torch.randn(4, 16, generator=generator),
        "out.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def ckpt(tmp_path: Path, model_state: dict[str, torch.Tensor]) -> Path:
    """The state_dict saved with torch.save."""
    path = tmp_path / "ckpt.pt"
    torch.save(model_state, path)
    return path


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, in `tmp_path`."""

    def run(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "cqr_compress", *map(str, args)],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A real input by its path, or a skip where it is not there."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"real input {name} is not on this machine")
        return SHARED / name

    return find
