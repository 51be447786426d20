"""Small real inputs: a trained-looking table, checkpoints of each format, the command line."""

from __future__ import annotations

import gc
import io
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads of several would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from warm_process import WarmPython

from cqr_compress.cli.app import app

SHARED = Path(os.environ.get("CQR_COMPRESS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let every test draw the same numbers, in whatever order and process it runs."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # else torch.manual_seed formats the stack for CUDA, which takes milliseconds
        torch.cuda.manual_seed_all(0)


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
def few_rows(ckpt: Path, model_state: dict[str, torch.Tensor]) -> Path:
    """The same file with tables of 1100 rows, for searches among layouts."""
    torch.save({name: rows[:1100].clone() if rows.dim() else rows for name, rows in model_state.items()}, ckpt)
    return ckpt


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in this process, in `tmp_path`; tests of signals and of start-up begin a process."""

    def run(*args: object, code: int = 0, columns: int = 200) -> subprocess.CompletedProcess[str]:
        out, err, found = io.StringIO(), io.StringIO(), 0
        before, path, width = Path.cwd(), list(sys.path), os.environ.get("COLUMNS")
        os.chdir(tmp_path)
        os.environ["COLUMNS"] = str(columns)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                app(list(map(str, args)), prog_name="cqr-compress")
        except SystemExit as e:
            found = int(e.code or 0)
        finally:
            os.chdir(before)
            sys.path[:] = path  # a task file's folder
            os.environ.pop("COLUMNS")
            if width is not None:
                os.environ["COLUMNS"] = width
        assert found == code, f"{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(
            ["cqr-compress", *map(str, args)], found, out.getvalue(), err.getvalue()
        )

    return run


@pytest.fixture(scope="session")
def python() -> Iterator[WarmPython]:
    """Run `python` with arguments, in a process that has imported torch."""
    warm = WarmPython()
    yield warm
    warm.close()


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A real input by its path, or a skip where it is not there."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"real input {name} is not on this machine")
        return SHARED / name

    return find


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process, for DDP.

    It ends after the test's own variables: a DDP wrapper that is the last to hold the group waits for its threads
    while it holds the interpreter's lock, which they can need.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    gc.collect()
    torch.distributed.destroy_process_group()
