"""The types of the package reach the programs that use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch

import cqr_compress as cqr

report = cqr.convert("a.pt", "b.safetensors", ratio=16)
error: float | None = report.tables[0].relative_mse
model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(10, 4)})
loaded: tuple[str, ...] = cqr.load_compressed(model, "b.safetensors").tables
layer = cqr.CQREmbedding(5000, 32, codebook_size=16)
rows: torch.Tensor = layer(torch.tensor([1, 2]))
best = layer.topk(rows, k=10)
words: list[tuple[str, float]] = cqr.load_vectors("b.safetensors").most_similar("king")
folder: str = cqr.convert_folder("a", "b", method="pq").folder
"""
WRONG = """
import cqr_compress as cqr

cqr.convert(3)
text: str = cqr.export("a.safetensors", "b.pt")
cqr.no_such_name
"""


def test_a_program_is_checked_against_the_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    own = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]  # of strict
    command = [sys.executable, "-m", "mypy", *own, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "right.py" not in done.stdout and "Found 3 errors in 1 file" in done.stdout, done.stdout
