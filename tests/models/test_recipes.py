"""The recipes for frameworks run from training to the table of results, on a little of their data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = ["dense", "converted 4x", "fine-tuned 4x", "from the start"]


def ratings(path: Path, heading: str) -> Path:
    """Lines of user, item, rating and time: some users like most items, and most users like some items."""
    random = np.random.default_rng(0)
    users, items = random.integers(1, 601, 12_000), random.integers(1, 601, 12_000)
    lines = [
        f"{user}\t{item}\t{5 if user % 7 + item % 5 > 5 else 1}\t{when}"
        for when, (user, item) in enumerate(dict.fromkeys(zip(users, items, strict=True)))
    ]
    path.write_text("\n".join([heading, *lines] if heading else lines) + "\n")
    return path


def results(name: str, folder: Path, *arguments: object) -> dict[str, tuple[int, float]]:
    """Bytes of tables and the metric, by the first words of a line of the table that a recipe prints."""
    given = [*arguments, "--folder", folder / "out", "--ratios", 4]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, given)], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.split("on the test")[1]
    found = re.findall(r"^(\S.*?) +([\d,]+) +(\d\.\d{4})$", table, re.M)
    assert [line for line, _, _ in found] == LINES, done.stdout
    return {line: (int(size.replace(",", "")), float(metric)) for line, size, metric in found}


def check_sizes(found: dict[str, tuple[int, float]]) -> None:
    sizes = [found[line][0] for line in LINES]
    assert 0 < max(sizes[1:3]) <= sizes[0] / 4 and 0 < sizes[3] < sizes[0]


def test_the_recipe_for_recbole(tmp_path: Path) -> None:
    pytest.importorskip("recbole")
    heading = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    data = ratings(tmp_path / "mine.inter", heading)
    found = results("recbole_recipe.py", tmp_path, "--data", data, "--epochs", 2, "--dim", 16)
    check_sizes(found)
    assert all(metric > 0 for _, metric in found.values())


def test_the_recipe_for_torch_rechub(tmp_path: Path) -> None:
    pytest.importorskip("torch_rechub")
    data = ratings(tmp_path / "u.data", "")
    found = results("torch_rechub_recipe.py", tmp_path, data, "--epochs", 4, "--dim", 16, "--learning-rate", 1e-2)
    check_sizes(found)
    assert found["dense"][1] > 0.6 and found["fine-tuned 4x"][1] > 0.6
