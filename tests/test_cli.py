import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from warm_process import WarmPython

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.cli.render import print_size_report
from cqr_compress.cli.tables import fold
from cqr_compress.errors import CheckpointError, SpecError
from cqr_compress.finetuning.options import option_names
from cqr_compress.option_fields import option_infos
from cqr_compress.progress import ProgressBars
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import METHODS

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_the_four_commands_of_the_readme_run_one_after_another(
    cli: Cli, ckpt: Path, tmp_path: Path, model_state: dict[str, torch.Tensor]
) -> None:
    inspected = cli("inspect", "ckpt.pt").stdout
    assert "item_embedding.weight" in inspected and "recommender table (0.99)" in inspected
    converted = cli("convert", "ckpt.pt", "-o", "small.safetensors", "--ratio", 8, "--method", "pq").stdout
    assert "(measured)" in converted and "cqr.load_compressed(model, 'small.safetensors')" in converted
    report = cli("inspect", "small.safetensors").stdout
    assert report in converted
    assert cli("inspect", "small.report.json").stdout == report
    assert cli("export", "small.safetensors", "-o", "dense.pt").stdout.startswith("wrote dense.pt (")
    dense = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert torch.equal(dense["out.weight"], model_state["out.weight"])


def test_convert_alone_writes_beside_the_source(cli: Cli, few_rows: Path, tmp_path: Path) -> None:
    cli("convert", "ckpt.pt")
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt", "ckpt.cqr.safetensors", "ckpt.cqr.report.json"}
    report = json.loads((tmp_path / "ckpt.cqr.report.json").read_text())
    assert all(table["ratio_bytes"] >= 16 for table in report["tables"])


def test_json_has_the_documented_keys(cli: Cli, ckpt: Path) -> None:
    dense = json.loads(cli("inspect", "ckpt.pt", "--json").stdout)
    assert dense["unbuilt_objects"] == []
    assert {"name", "shape", "dtype", "nbytes", "confidence", "reason"} <= dense["tables"][0].keys()
    plan = json.loads(cli("convert", "ckpt.pt", "--dry-run", "--json", "--method", "pq").stdout)
    done = json.loads(cli("convert", "ckpt.pt", "--json", "--method", "pq").stdout)
    assert plan["file_bytes_after"] == done["file_bytes_after"] and not plan["measured"]
    wanted = {"name", "shape", "method", "bytes_before", "bytes_after", "relative_mse"}
    assert wanted <= done["tables"][0].keys() and done["file_bytes_before"] == ckpt.stat().st_size


def test_a_dry_run_writes_nothing(cli: Cli, ckpt: Path, tmp_path: Path) -> None:
    assert "predicted, nothing written" in cli("convert", "ckpt.pt", "--dry-run", "--method", "int8").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def garbage(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be converted, with what the message must say."""
    state = {"emb.weight": torch.randn(3000, 16)}
    whole = folder / "whole.pt"
    torch.save(state, whole)
    made = {name: folder / name for name in ("empty.pt", "cut.pt", "nan.pt", "no_tables.pt", "lying.safetensors")}
    made["empty.pt"].touch()
    made["cut.pt"].write_bytes(whole.read_bytes()[:90_000])
    torch.save({"emb.weight": torch.full((3000, 16), float("nan"))}, made["nan.pt"])
    torch.save({"fc.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}, made["no_tables.pt"])
    header = b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,8]}}'
    made["lying.safetensors"].write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    (folder / "bare").mkdir()
    whole.unlink()
    return {
        "missing": (folder / "missing.pt", "no such file or folder"),
        "empty": (made["empty.pt"], "is empty"),
        "truncated": (made["cut.pt"], "it is truncated or damaged"),
        "nan": (made["nan.pt"], "has NaN or infinity in 3000 rows, first 0, 1, 2, 3, 4"),
        "no tables": (made["no_tables.pt"], "found no embedding table"),
        "lying header": (made["lying.safetensors"], "not a valid safetensors file"),
        "folder": (folder / "bare", "contains no checkpoint"),
    }


@pytest.mark.parametrize("name", ["missing", "empty", "truncated", "nan", "no tables", "lying header", "folder"])
def test_a_bad_input_gives_one_message_exit_1_and_no_file(cli: Cli, tmp_path: Path, name: str) -> None:
    path, message = garbage(tmp_path)[name]
    before = sorted(tmp_path.rglob("*"))
    done = cli("convert", path, "-o", "small.safetensors", code=1)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_gives_a_message_and_no_file(ckpt: Path, tmp_path: Path, python: WarmPython) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from cqr_compress.cli.app import main; main()"
    )
    done = python("-c", code, "convert", "ckpt.pt", "--method", "pq", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot write 'ckpt.cqr.safetensors'" in done.stderr and "No partial file is left" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_debug_shows_the_traceback(tmp_path: Path, python: WarmPython) -> None:
    done = python("-m", "cqr_compress", "inspect", "missing.pt", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "CheckpointError" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("convert",), ("convert", "x.pt", "--method", "magic"), ("convert", "x.pt", "--exact-rows", "a"),
        ("convert", "x.pt", "--shard-size", "-3"), ("frobnicate",), ("inspect", "a", "b"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_2(cli: Cli, args: tuple[str, ...]) -> None:
    cli(*args, code=2)


def test_help_and_version_import_nothing_heavy(cli: Cli) -> None:
    """Counted and not timed: what is imported is what makes a start slow."""
    code = (
        "import sys; from cqr_compress.cli.app import app\n"
        "for args in (['--help'], ['--version'], *([name, '--help'] for name in sys.argv[1:])):\n"
        "    try: app(args)\n"
        "    except SystemExit as e: assert not e.code\n"
        "sys.exit(bool({'torch', 'faiss', 'numpy', 'safetensors'} & set(sys.modules)) or len(sys.modules) > 900)"
    )
    commands = ["inspect", "convert", "finetune", "evaluate", "refit", "export"]
    subprocess.run([sys.executable, "-c", code, *commands], check=True, capture_output=True)
    for command in commands:
        for flag in ("-h", "--help"):
            assert f"cqr-compress {command} " in cli(command, flag).stdout


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_the_terminal_with_whole_summaries(cli: Cli, columns: int) -> None:
    shown = cli("--help", columns=columns).stdout
    assert "..." not in shown.replace("[ARGS]...", "") and "…" not in shown
    assert "Train the codebooks of a compressed file on your data." in shown
    convert = cli("convert", "--help", columns=columns).stdout
    for panel in ("Selection", "Method", "Budget", "Output"):
        assert f"─ {panel} ─" in convert
    assert all(len(line) <= columns for line in (shown + convert).splitlines())


def test_options_come_from_the_dataclass(cli: Cli) -> None:
    shown = cli("convert", "--help").stdout
    for name in option_infos(ConvertOptions):
        assert f"--{name.replace('_', '-')}" in shown
    assert ", ".join(METHODS) in " ".join(shown.replace("│", " ").split())
    for entry in METHODS.values():
        assert entry.summary in shown
    tuned = " ".join(cli("finetune", "--help").stdout.replace("│", " ").split())
    for name in option_names():
        assert name in tuned or f"--{name.replace('_', '-')}" in tuned


def test_completion_of_the_shell_installs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cqr_compress", "--show-completion", "bash"],
        capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "COMPLETE" in done.stdout


def test_a_tied_head_is_announced(cli: Cli, tmp_path: Path, table: torch.Tensor) -> None:
    torch.save({"wte.weight": table, "lm_head.weight": table}, tmp_path / "m.pt")
    done = cli("convert", "m.pt", "--method", "int8")
    assert (
        "'lm_head.weight' shares its values with 'wte.weight': both will read the compressed table" in done.stderr
    )
    assert "= lm_head.weight" in done.stdout


def test_progress_is_a_plain_line_when_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cqr_compress.progress._PLAIN_EVERY_S", -1.0)
    with ProgressBars() as progress:
        progress.start("encoding x", 2_000_000, "rows")
        progress.advance(1_000_000)
    shown = capsys.readouterr()
    assert shown.err.startswith("encoding x: 1.0M of 2.0M rows, ") and shown.out == ""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_python_bars_appear_where_stderr_is_a_terminal(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="pq", n_bits=4, num_columns=4, force=True)
        assert ("encoding" in stream.getvalue()) == stream.isatty()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8", force=True, progress=cqr.NoProgress())
    assert terminal.getvalue() == ""


def test_what_is_found_is_logged_and_nothing_is_printed(
    ckpt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="pq", n_bits=4, num_columns=4)
    with caplog.at_level("INFO", "cqr_compress"):
        cqr.refit(tmp_path / "s.safetensors", tmp_path / "r.safetensors", original=ckpt, refine_rounds=1)
    assert "relative squared error" in caplog.text
    assert capsys.readouterr() == ("", "")


SLOW_CONVERT = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background starts with SIGINT ignored
from cqr_compress.checkpoint import shards
from cqr_compress.cli.app import main
write = shards.Output.write
def write_and_wait(self, name, values):
    write(self, name, values)
    pathlib.Path("pid").write_text(str(os.getpid()))
    pathlib.Path("pid").rename("writing")
    time.sleep(300)
shards.Output.write = write_and_wait
main()
"""


@pytest.mark.parametrize(("number", "leftovers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_a_killed_run_leaves_no_output(
    ckpt: Path, tmp_path: Path, number: int, leftovers: int, python: WarmPython
) -> None:
    command = ["-c", SLOW_CONVERT, "convert", "ckpt.pt", "--method", "int8"]
    with ThreadPoolExecutor() as pool:
        process = pool.submit(python, *command, cwd=tmp_path, timeout=120)
        while not (tmp_path / "writing").exists():  # the process waits there until it is killed
            assert not process.done(), process.result()
            time.sleep(0.01)
        os.kill(int((tmp_path / "writing").read_text()), number)
        done = process.result()
    assert done.returncode != 0 and "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"ckpt.pt", "writing"}
    assert len(left) == leftovers and all(name.endswith(".partial") for name in left)
    for name in left:
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / name)


def test_output_of_the_callers_own_code_stays_on_its_stdout(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", out)
    with ProgressBars() as progress:
        progress.start("encoding x", 10, "rows")
        print("a line of the caller")
    assert "a line of the caller" in out.getvalue()


def test_numbers_of_other_libraries_are_numbers(ckpt: Path, tmp_path: Path) -> None:
    options = ConvertOptions(ratio=np.float32(8), n_bits=np.int64(4), method="pq", min_rows=np.int32(10))
    assert (type(options.ratio), type(options.n_bits), options.min_rows) == (float, int, 10)
    cqr.convert(ckpt, tmp_path / "s.safetensors", options)
    for wrong in ({"n_bits": 1.5}, {"n_bits": True}, {"ratio": float("inf")}, {"ratio": "8"}, {"seed": 2**31}):
        with pytest.raises(SpecError, match=f"{next(iter(wrong))} is .*: give a"):
            ConvertOptions(**wrong)
    with pytest.raises(SpecError, match="has no field ratoi: did you mean ratio"):
        cqr.convert(ckpt, tmp_path / "t.safetensors", ratoi=8)


def test_an_option_that_has_a_flag_is_not_given_by_option(cli: Cli, ckpt: Path) -> None:
    shown = cli("finetune", ckpt, "--epochs", 2, "--option", "epochs=1", code=2).stderr
    assert "give --epochs instead" in " ".join(shown.replace("│", " ").split())
    assert "unknown option nonsense" in cli("finetune", ckpt, "--option", "nonsense=1", code=1).stderr
    assert "epochs" not in cli("finetune", ckpt, "--option", "max_steps=x", code=1).stderr


def test_names_fold_at_dots_and_numbers_stay_whole() -> None:
    assert fold("embeddings.word_embeddings.weight", 22).split() == ["embeddings.", "word_embeddings.", "weight"]
    assert fold("DLRM emb_l.N (0.99)", 12) == "DLRM emb_l.N\n  (0.99)"


def test_the_headline_compares_the_model_with_the_model(
    tmp_path: Path, table: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"emb.weight": table, "out.weight": torch.randn(300, 150), "out.bias": torch.randn(300)}
    moments = {i: {"exp_avg": torch.zeros(3000, 16), "exp_avg_sq": torch.zeros(3000, 16)} for i in range(2)}
    torch.save({"model": state, "optimizer": {"state": moments, "param_groups": []}}, tmp_path / "m.pt")
    report = cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", method="int8", tables=["emb.weight"])
    print_size_report(report)
    shown = " ".join(capsys.readouterr().out.split())
    model = report.file_bytes_before - 4 * table.nbytes
    assert report.optimizer_bytes == 4 * table.nbytes and report.model_bytes_before == model
    assert f"model {model / 2**10:.2f} KiB -> " in shown and f", {model / report.file_bytes_after:.2f}x (" in shown
    limit = model / (model - table.nbytes)
    assert 1.9 < limit < 2.1
    assert f"are {table.nbytes / model:.0%} of the model: at most {limit:.2f}x for the whole file" in shown
    assert "750.00 KiB of optimizer state, which the ratios do not count" in shown
