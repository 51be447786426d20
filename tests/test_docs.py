"""What README, help texts and examples say is run or looked up, so that it cannot rot."""

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from warm_process import WarmPython

import cqr_compress as cqr
from cqr_compress.cli.app import app
from cqr_compress.quantize.registry import METHODS
from cqr_compress.tasks.data.files import DataOptions
from cqr_compress.tasks.registry import builtin_task

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
Cli = Callable[..., subprocess.CompletedProcess[str]]
Example = Callable[..., str]


def blocks(language: str) -> list[str]:
    """Blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def first_words(output: str) -> set[str]:
    """What the lines of an output begin with; rules of any length are one."""
    return {line.split()[0].replace("─", "") or "rule" for line in output.splitlines() if line.strip()}


def test_the_session_of_the_readme_runs_and_prints_what_is_shown(cli: Cli, few_rows: Path, tmp_path: Path) -> None:
    (session,) = [block for block in blocks("console") if block.startswith("$")]
    (tmp_path / "quickstart").mkdir()
    torch.save(torch.load(few_rows), tmp_path / "quickstart" / "ckpt.pt")
    parts = re.split(r"^\$ ", session, flags=re.M)[1:]
    assert [part.split()[1] for part in parts] == ["inspect", "convert", "export"]
    for part in parts:
        command, _, shown = part.partition("\n")
        program, *args = shlex.split(command)
        assert program == "cqr-compress"
        printed = cli(*args, columns=100).stdout
        assert first_words(shown) == first_words(printed)
        headings = [line for line in shown.splitlines() if line.startswith("table ")]
        assert all(set(line.split()) <= set(printed.split()) for line in headings)


def test_the_python_of_the_readme_runs(few_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 3

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item_embedding = torch.nn.Embedding(1100, 16)
            self.user_embedding = torch.nn.Embedding(1100, 16)
            self.out = torch.nn.Linear(16, 4)
            self.register_buffer("steps", torch.tensor(0))

    for block in blocks("python"):
        exec(block, {"model": Model(), "Model": Model})


def test_the_commands_for_fine_tuning_run(cli: Cli, few_rows: Path, tmp_path: Path) -> None:
    section = README.split("## Fine-tune")[1].split("## Train small")[0]
    lines = [line for block in re.findall(r"```console\n(.*?)```", section, re.S) for line in block.splitlines()]
    assert len(lines) == 5
    state = {name: value for name, value in torch.load(few_rows).items() if "embedding" in name}
    torch.save(state, few_rows)
    cli("convert", few_rows, "-o", "small.safetensors", "--ratio", 8)
    events = torch.randint(1100, (3000, 2)).tolist()
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
        self.item_embedding, self.user_embedding = nn.Embedding(1100, 16), nn.Embedding(1100, 16)
def model():
    return Model()
def train_batches(epoch):
    return [torch.randint(1100, (64, 2)) for _ in range(4)]
def loss(model, batch):
    rows = model.user_embedding(batch[:, 0]) * model.item_embedding(batch[:, 1])
    return (rows.sum(1) - 1) ** 2
def evaluate(model):
    return {"loss": float(loss(model, torch.arange(1000).view(-1, 2)).mean())}
"""


def test_public_docstrings_render_without_warnings(tmp_path: Path, python: WarmPython) -> None:
    pytest.importorskip("pdoc")
    options = ["--docformat", "google", "--no-show-source", "--output-directory", "html"]
    done = python("-m", "pdoc", *options, "cqr_compress", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = (tmp_path / "html" / "cqr_compress.html").read_text()
    assert [name for name in cqr.__all__ if f'id="{name}"' not in page] == []
    assert "Args:" not in page, "a section of a docstring is not indented as such"


def test_every_command_is_in_the_readme_and_the_methods_are_those_of_the_registry() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"cqr-compress {command.callback.__name__}" in README
    rows = [
        f"| `{entry.name}` | {entry.summary} | {', '.join(f'[{name}]({link})' for name, link in entry.papers)} |"
        for entry in METHODS.values()
    ]
    assert "\n".join(rows) in README


def test_the_readme_is_read_to_its_end_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 250
    for name, text in (("README.md", README), ("tests/benchmarks/README.md", BENCHMARKS)):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), link
    for script in re.findall(r"python ((?:tests|examples)/\S+\.py)", README + BENCHMARKS):
        assert (ROOT / script).exists(), script


def test_flags_of_documented_commands_exist(cli: Cli) -> None:
    for text in (README, BENCHMARKS):
        for line in re.findall(r"^\s*(?:\$ )?cqr-compress ([a-z]+ .*)$", text, re.M):
            command, *words = shlex.split(line.split("  #")[0])
            shown = cli(command, "--help").stdout
            assert all(word in shown for word in words if word.startswith("-")), line


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "python -m pytest" in README and (ROOT / ".ci" / "run").read_text().rstrip().endswith(
        "python -m pytest"
    )


def test_the_least_squares_example_shows_the_bound(tmp_path: Path, run_example: Example) -> None:
    pytest.importorskip("matplotlib")
    small = shlex.split("--examples 300 --ids 60 --dim 4 --k 12 --iterations 4 --plot p.png")
    printed = run_example("least_squares.py", *small)
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in printed.splitlines()[2:-1]}
    assert all(a <= b for a, b in zip(rows["dense"], rows["bound (dense)"], strict=True))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run_example(python: WarmPython, tmp_path: Path) -> Example:
    """Run an example in `tmp_path`; what it prints."""

    def run(name: str, *arguments: object) -> str:
        done = python(ROOT / "examples" / name, *arguments, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_quickstart_gives_accuracy_back(tmp_path: Path, run_example: Example) -> None:
    small = (
        "--num-users 1100 --num-items 1100 --num-events 90000 --epochs 6 --weight-decay 0 --ratios 48 --folder q"
    )
    printed = run_example("quickstart.py", *small.split())
    table = printed.split("4,500 test clicks")[1]
    found = re.findall(r"^(dense|converted +\S+|fine-tuned +\S+) +[\d,]+ +(0\.\d+)$", table, re.M)
    auc = {" ".join(name.split()): float(value) for name, value in found}
    assert list(auc) == ["dense", "converted 48x", "fine-tuned 48x"], printed
    assert auc["dense"] > auc["converted 48x"] > 0.55 and auc["fine-tuned 48x"] > auc["converted 48x"]
    assert "user_embedding.weight" in printed and "item_embedding.weight" in printed
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "q" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def load_example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / name)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["example"] = example
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize("value", [0.1, math.nan])
def test_examples_give_no_credit_for_equal_or_broken_scores(value: float) -> None:
    sasrec = load_example("sasrec_sequences.py")
    model = sasrec.SASRec(61, 16, 8)
    nn.init.constant_(model.item_emb.weight, value)
    users = [[1 + (user + k) % 60 for k in range(6)] for user in range(30)]
    assert not sasrec.ndcg(model, users, 8) > 0  # the target ties with 55 other items: rank 27.5


def test_the_auc_of_equal_scores_is_half() -> None:
    quickstart, dlrm = load_example("quickstart.py"), load_example("dlrm_criteo.py")
    label = torch.tensor([0.0] * 30 + [1.0] * 10)
    ids = torch.zeros(40, dtype=torch.long)
    model = quickstart.GMF(2, 2, 4)
    assert quickstart.auc(model, quickstart.Clicks(ids, ids, label)) == 0.5
    clicks = dlrm.Clicks(torch.zeros(40, 1), ids[:, None], label)
    assert dlrm.evaluate(Constant(), clicks, "cpu")["auc"] == 0.5


class Constant(nn.Module):
    """Logits of 0."""

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids))


def test_the_movielens_example_runs(tmp_path: Path, run_example: Example) -> None:
    generator = torch.Generator().manual_seed(0)
    user, item = torch.randint(600, (2, 12000), generator=generator).tolist()
    rows = [f"{u + 1}\t{i + 1}\t{1 + (u + i) % 5}\t{t}" for t, (u, i) in enumerate(zip(user, item, strict=True))]
    (tmp_path / "u.data").write_text("\n".join(rows) + "\n")
    printed = run_example("movielens_gmf.py", "u.data", "--epochs", 2, "--ratio", 8)
    assert printed.count("$ cqr-compress") == 3
    assert re.search(r"movielens/tuned.safetensors\s+[\d,]+ +0\.\d+", printed)
    (tmp_path / "ml.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows)
    )
    split = load_example("movielens_gmf.py").split  # a file with a heading is the same ratings
    parts = [split(tmp_path / name, tmp_path) for name in ("u.data", "ml.inter")]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_the_sasrec_example_runs(tmp_path: Path, run_example: Example) -> None:
    generator = torch.Generator().manual_seed(0)
    starts, lengths = (torch.randint(*ends, (80,), generator=generator).tolist() for ends in ((1, 60), (3, 12)))
    lines = [
        " ".join(map(str, [u + 1, *(1 + (s + k) % 60 for k in range(n))]))
        for u, (s, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    (tmp_path / "s.txt").write_text("\n".join(lines) + "\n")
    small = "--epochs 4 --dim 16 --length 8 --min-rows 50 --ratio 3".split()
    printed = run_example("sasrec_sequences.py", "s.txt", *small)
    assert re.search(r"tuned.safetensors\s+[\d,]+ +0(\.\d+)? ", printed) and "test_hr@10" in printed
    model = load_example("sasrec_sequences.py").SASRec(61, 16, 8)
    model.load_state_dict(torch.load(tmp_path / "sasrec" / "ckpt.pt"))
    data = DataOptions((tmp_path / "s.txt",), settings={"norm_first": "true"})
    task = builtin_task("sasrec", tmp_path / "sasrec" / "small.safetensors", data)
    same: Any = task.model()
    same.load_state_dict(model.state_dict())
    items = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    assert torch.allclose(model.eval()(items), same.eval()(items), atol=1e-5)


def test_the_criteo_example_draws_every_method_and_keeps_its_results(tmp_path: Path, run_example: Example) -> None:
    pytest.importorskip("matplotlib")
    small = (
        "--num-events 6000 --max-table 300 --codewords 16 --epochs 1 --batch-size 1000 --weight-decay 0".split()
    )
    printed = run_example("dlrm_criteo.py", *small)
    results = json.loads((tmp_path / "criteo" / "results.json").read_text())
    assert len(results) == 9 and all(0.1 < result["bce"] < 2 for result in results.values())
    assert results["pq@16"]["parameters"] == results["hash@16"]["parameters"] < results["full@0"]["parameters"]
    assert (tmp_path / "criteo" / "test_bce.png").read_bytes().startswith(b"\x89PNG")
    again = run_example("dlrm_criteo.py", *small)
    assert again.split("codewords")[1] == printed.split("codewords")[1]
    with pytest.raises(AssertionError, match="has results of other settings"):
        run_example("dlrm_criteo.py", *small, "--seed", "1")


def test_the_word_vectors_example_keeps_neighbours(tmp_path: Path, run_example: Example) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=generator)[torch.randint(40, (1500,), generator=generator)]
    rows = rows + 0.2 * torch.randn(1500, 12, generator=generator)
    lines = [f"w{i} {' '.join(f'{value:.4f}' for value in row)}" for i, row in enumerate(rows.tolist())]
    (tmp_path / "v.txt").write_text("1500 12\n" + "\n".join(lines) + "\n")
    printed = run_example("word_vectors.py", "v.txt", "--ratio", 6, "--zipf", "--words", "w3")
    assert "1,500 words, 12 dimensions" in printed and re.search(r"^w3: w\d+ w\d+", printed, re.M)
    kept = re.search(r"([\d.]+)% of the 10 nearest stay", printed)
    assert kept is not None and float(kept[1]) > 10
    assert len((tmp_path / "word_vectors" / "back.txt").read_text().splitlines()) == 1501


def test_the_export_example_writes_a_program_with_the_codes(tmp_path: Path, run_example: Example) -> None:
    torch.save({"a.emb.weight": torch.randn(3000, 16)}, tmp_path / "a.pt")
    cqr.convert(tmp_path / "a.pt", tmp_path / "small.safetensors", method="pq", ratio=6)
    printed = run_example("export_torch.py", "small.safetensors", "--no-compile")
    found = re.search(r"rows.pt2: ([\d,]+) bytes \(dense 192,000\), largest difference (\S+)", printed)
    assert found is not None and int(found[1].replace(",", "")) < 100_000 and float(found[2]) < 1e-5


@pytest.mark.parametrize(
    "options", [{"method": "hash"}, {"method": "qr"}, {"method": "cqr", "num_columns": 4}], ids=str
)
def test_the_numpy_reader_computes_codes_of_ids(
    tmp_path: Path, run_example: Example, options: dict[str, Any]
) -> None:
    torch.save({"a.emb.weight": torch.randn(1100, 16)}, tmp_path / "a.pt")
    cqr.convert(tmp_path / "a.pt", tmp_path / "small.safetensors", ratio=6, effort="fast", **options)
    assert "a.emb.weight 1100 x 16" in run_example("read_with_numpy.py", "small.safetensors", "-o", "dense.npz")
    dense = cqr.load_dense_state_dict(tmp_path / "small.safetensors")["a.emb.weight"]
    assert np.allclose(np.load(tmp_path / "dense.npz")["a.emb.weight"], dense, atol=1e-6)


def test_the_serving_example_answers_from_the_codes(tmp_path: Path, run_example: Example) -> None:
    printed = run_example("serving.py", "--num-items", 5000, "--dim", 16, "--ratio", 6)
    assert "table in memory: 320,000 bytes dense" in printed
    found = re.search(r"of the dense table's 10 best, (\d+)% are among 10 found and (\d+)% among 100", printed)
    assert found is not None and int(found[2]) > 50 and int(found[2]) >= int(found[1])


def test_the_onnx_example_serves_rows_and_the_best_ids(tmp_path: Path, run_example: Example) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.save({"a.emb.weight": torch.randn(3000, 16)}, tmp_path / "a.pt")
    cqr.convert(tmp_path / "a.pt", tmp_path / "small.safetensors", method="trellis", ratio=6, effort="fast")
    printed = run_example("serving_onnx.py", "small.safetensors")
    differences = re.findall(r"largest difference of .*: (\S+)$", printed, re.M)
    assert len(differences) == 2 and all(float(each) < 1e-4 for each in differences)
    assert "a.emb.weight: 192,000 bytes dense" in printed


def test_the_faiss_example_finds_what_the_layer_finds(tmp_path: Path, run_example: Example) -> None:
    printed = run_example("retrieval_faiss.py", "--num-items", 4000, "--dim", 16, "--ratio", 6)
    found = re.search(r"finds the same: ([\d.]+)%, ([\d.]+)% of them in common", printed)
    assert found is not None and float(found[1]) > 30 and float(found[2]) > 99
    assert (tmp_path / "retrieval" / "items.faiss").stat().st_size < 4000 * 16 * 4 / 3


def test_the_sentence_encoder_example_compares_sentence_vectors(tmp_path: Path, run_example: Example) -> None:
    transformers = pytest.importorskip("transformers")
    words = sorted(
        {
            word.strip(".,?")
            for text in load_example("sentence_encoder.py").SENTENCES
            for word in text.lower().split()
        }
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"w{i}" for i in range(2000))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    printed = run_example("sentence_encoder.py", "encoder", "--ratio", 4)
    cosines = re.search(r"cosine of each sentence with its vector before: (.*)", printed)
    assert cosines is not None and all(float(c) > 0.5 for c in cosines[1].split())


def test_nothing_a_user_reads_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"/work/|/root/|\.\./shared|/home/\w")
    for path in [*ROOT.glob("cqr_compress/**/*.py"), *ROOT.glob("examples/*.py"), ROOT / "README.md"]:
        assert not pattern.search(path.read_text()), path
