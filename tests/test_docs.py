"""What README, help texts and examples say is run or looked up, so that it cannot rot."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cqr_compress.cli.app import app
from cqr_compress.quantize import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_the_commands_of_the_readme_run(cli: Cli, ckpt: Path) -> None:
    block = re.search(r"## Use\n\n```console\n(.*?)```", README, re.S)
    assert block is not None
    lines = [line.split("#")[0] for line in block[1].splitlines()]
    assert len(lines) == 4
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "cqr-compress"
        cli(*args)


def test_the_python_of_the_readme_runs(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = torch.nn.Embedding(3000, 16)
            self.user_embedding = torch.nn.Embedding(1500, 16)
            self.out = torch.nn.Linear(16, 4)
            self.register_buffer("steps", torch.tensor(0))

    for block in blocks:
        exec(block, {"model": Model(), "Model": Model, "torch": torch})


def test_the_commands_for_fine_tuning_run(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    section = README.split("### Fine-tune")[1].split("### Train small")[0]
    lines = [line for block in re.findall(r"```console\n(.*?)```", section, re.S) for line in block.splitlines()]
    assert len(lines) == 5
    state = {name: value for name, value in torch.load(ckpt).items() if "embedding" in name}
    torch.save(state, ckpt)
    cli("convert", ckpt, "-o", "small.safetensors", "--ratio", 8)
    events = torch.stack([torch.randint(1500, (3000,)), torch.randint(3000, (3000,))], 1).tolist()
    rows = [f"{user},{item},{user % 2}" for user, item in events]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,label", *rows]))
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "cqr-compress"
        cli(*args)
        if "--init-task" in args:
            (tmp_path / "my_task.py").write_text(USER_TASK)


USER_TASK = """
import torch
from torch import nn
metric = "loss"
mode = "min"
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.item_embedding, self.user_embedding = nn.Embedding(3000, 16), nn.Embedding(1500, 16)
def model():
    return Model()
def train_batches(epoch):
    return [torch.randint(1500, (64, 2)) for _ in range(4)]
def loss(model, batch):
    rows = model.user_embedding(batch[:, 0]) * model.item_embedding(batch[:, 1])
    return (rows.sum(1) - 1) ** 2
def evaluate(model):
    return {"loss": float(loss(model, torch.arange(1000).view(-1, 2)).mean())}
"""


def test_every_command_and_method_is_in_the_readme() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"cqr-compress {command.callback.__name__}" in README
    for method in (*METHODS, "auto"):
        assert f"`{method}`" in README


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "python -m pytest" in README and (ROOT / ".ci" / "run").read_text().rstrip().endswith(
        "python -m pytest"
    )


def test_the_least_squares_example_shows_the_bound(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = shlex.split("--examples 300 --ids 60 --dim 4 --k 12 --iterations 4 --plot p.png")
    command = [sys.executable, str(ROOT / "examples" / "least_squares.py"), *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in done.stdout.splitlines()[2:-1]}
    assert all(a <= b for a, b in zip(rows["dense"], rows["bound (dense)"], strict=True))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_quickstart_runs(tmp_path: Path) -> None:
    small = "--num-users 1100 --num-items 1100 --num-events 150000 --epochs 6 --ratio 4".split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--folder", str(tmp_path / "q"), *small],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search(r"AUC on 15,000 held-out clicks: (0\.\d+) before, (0\.\d+) after", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > 0.55 and abs(float(found[1]) - float(found[2])) < 0.1
    assert "user_embedding.weight" in done.stdout and "item_embedding.weight" in done.stdout


def test_nothing_a_user_reads_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"/work/|/root/|\.\./shared|/home/\w")
    for path in [*ROOT.glob("cqr_compress/**/*.py"), *ROOT.glob("examples/*.py"), ROOT / "README.md"]:
        assert not pattern.search(path.read_text()), path
