"""Damaged or hostile indexes, headers, reports and frequencies are refused with one message."""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.commands.inspect import effective_rank
from cqr_compress.errors import CheckpointError, CqrCompressError, FormatError
from cqr_compress.planning.frequencies import read_frequencies


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"emb.weight": ".."}}, "lists the shard '..', which is no plain file name"),
        ({"weight_map": {"emb.weight": "."}}, "no plain file name"),
        ({"weight_map": {"emb.weight": ""}}, "no plain file name"),
        ({"weight_map": {"emb.weight": "a/b.safetensors"}}, "no plain file name"),
        ({"weight_map": {"emb.weight": "..\\b.safetensors"}}, "no plain file name"),
        ({"weight_map": {"emb.weight": "a\0"}}, "no plain file name"),
        ({"weight_map": {"emb.weight": "a" * 5000}}, "cannot be read"),
        ({"weight_map": {"emb.weight": "\ud800"}}, "cannot be read"),
        ({"weight_map": {"emb.weight": "m.safetensors.index.json"}}, "not a torch or safetensors checkpoint"),
        ({"weight_map": {"emb.weight": "folder"}}, "is a folder, not a regular file"),
        ({"weight_map": {"emb.weight": "fifo"}}, "is a pipe, socket or device"),
        ({"weight_map": {"emb.weight": "link"}}, "a link to .* outside its folder"),
        ({"weight_map": {"emb.weight": [1]}}, "lists a list in place of the name of a shard"),
        ({"weight_map": {}}, "needs a 'weight_map' object"),
        ({"weight_map": []}, "needs a 'weight_map' object"),
        ([], "needs a 'weight_map' object"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "is not JSON"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    save_file({"emb.weight": torch.ones(4, 2)}, folder / "folder" / "inner.safetensors")
    save_file({"emb.weight": torch.ones(4, 2)}, tmp_path / "private.safetensors")
    (folder / "link").symlink_to(tmp_path / "private.safetensors")
    os.mkfifo(folder / "fifo")
    index = folder / "m.safetensors.index.json"
    index.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    with pytest.raises(CheckpointError, match=message) as refused:
        open_checkpoint(index)
    assert len(str(refused.value)) < 800


@pytest.mark.parametrize(
    ("start", "part", "end", "limit"),
    [
        ("[", "[],", "[]]", "1,000,000 values"),
        ("[", "{},", "{}]", "1,000,000 values"),
        ("[", "1,", "1]", "1,000,000 values"),
        ('["\\u4e00', "a", '"]', "16 MiB"),
        ('["\N{GRINNING FACE}', "a", '"]', "16 MiB"),
        ("[", " ", "]", "64 MiB"),
    ],
)
def test_an_index_that_would_fill_the_memory_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, part: str, end: str, limit: str
) -> None:
    path = tmp_path / "m.safetensors.index.json"
    nbytes = (65 if limit == "64 MiB" else 17) * 2**20
    path.write_text(start + part * (nbytes // len(part)) + end, encoding="utf-8")
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match=f"more than {limit} of JSON"):
        open_checkpoint(path)


def test_an_index_of_200_000_tensors_is_read(tmp_path: Path) -> None:
    weight_map = {
        f"language_model.model.layers.{i}.mlp.experts.down_proj.weight_packed": f"model-{i % 70:05}-of-00070.safetensors"
        for i in range(200_000)
    }
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2))
    assert read_json(path)["weight_map"] == weight_map


def test_links_of_a_hugging_face_cache_and_inside_the_folder_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "0123" / "part",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"emb.weight": torch.ones(4, 2)}, blobs / "ab12")
    (blobs / "cd34").write_text(json.dumps({"weight_map": {"emb.weight": "m.safetensors"}}))
    (snapshot / "m.safetensors").symlink_to("../../../blobs/ab12")
    (snapshot / "m.safetensors.index.json").symlink_to("../../../blobs/cd34")
    with open_checkpoint(snapshot) as checkpoint:
        assert list(checkpoint.entries) == ["emb.weight"]
    (tmp_path / "linked").symlink_to(snapshot)
    with open_checkpoint(tmp_path / "linked") as checkpoint:
        assert list(checkpoint.entries) == ["emb.weight"]


def test_a_pipe_a_device_and_names_that_no_file_can_have_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for path, message in (
        (tmp_path / "c.pt", "a pipe, socket or device"),
        (Path("/dev/zero"), "a pipe, socket or device"),
        (tmp_path / "loop.pt", "cannot be read: Too many levels of symbolic links"),
        (tmp_path / ("a" * 5000), "cannot be read: File name too long"),
        ("a\0b", "cannot be read"),
        (tmp_path / "none.pt", "no such file or folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any], Any]]:
    """A compressed file of a method: its path, its header and its tensors."""
    folder = tmp_path_factory.mktemp("compressed")
    torch.manual_seed(0)
    torch.save({"emb.weight": torch.randn(2000, 16), "out.weight": torch.randn(3, 4)}, folder / "m.pt")
    for method in ("pq", "hash", "int8"):
        cqr.convert(folder / "m.pt", folder / f"{method}.safetensors", method=method, ratio=3)
    cqr.convert(folder / "m.pt", folder / "pq opq.safetensors", method="pq", ratio=3, rotation="opq")

    def read(method: str) -> tuple[Path, dict[str, Any], Any]:
        path = folder / f"{method}.safetensors"
        with open_checkpoint(path) as opened:
            return path, json.loads(opened.metadata["cqr_compress"]), load_file(path)

    return read


HUGE = 10**4000


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("pq", lambda h, s: s.update(embedding_dim=10**15, num_columns=7)),
        ("pq", lambda h, s: s.update(embedding_dim=2**40 + 1, num_columns=7, num_embeddings=1)),
        ("hash", lambda h, s: s.update(code_sources=["digit"], codebook_size=2**62, embedding_dim=10**9, num_columns=10**9)),
        ("hash", lambda h, s: s.update(num_embeddings=10**9)),
        ("hash", lambda h, s: s.update(num_embeddings=10**18)),
        ("hash", lambda h, s: s.update(num_embeddings=HUGE)),
        ("hash", lambda h, s: s.update(seed=HUGE)),
        ("hash", lambda h, s: s.update(code_sources=[[1]])),
        ("hash", lambda h, s: s.update(code_sources="hashed")),
        ("hash", lambda h, s: s.update(code_sources=3)),
        ("hash", lambda h, s: s.update(code_sources=["x" * 10**6])),
        ("pq", lambda h, s: s.update(rotation=[1])),
        ("pq", lambda h, s: s.update(dtype={})),
        ("pq", lambda h, s: s.update(code_sources=["digit"])),
        ("pq opq", lambda h, s: s.update(rotation=None)),
        ("pq", lambda h, s: s.update(kind=[])),
        ("pq", lambda h, s: s.update({"x" * 10**6: 1})),
        ("int8", lambda h, s: s.update(n_bits=HUGE)),
        ("pq", lambda h, s: h["tables"]["emb.weight"].update(quality=[])),
        ("pq", lambda h, s: h["tables"]["emb.weight"].update(quality={"relative_mse": "a"})),
        ("pq", lambda h, s: h["tables"]["emb.weight"].update(quality={"relative_mse": HUGE})),
        ("pq", lambda h, s: h["tables"]["emb.weight"].update(budget=HUGE)),
        ("pq", lambda h, s: h["tables"].update({"emb.weight": []})),
        ("pq", lambda h, s: h["tables"].update({"\udc80": h["tables"]["emb.weight"]})),
        ("pq", lambda h, s: h.update(extras=[[1]])),
        ("pq", lambda h, s: h.update(extras=["\udc80"])),
        ("pq", lambda h, s: h.update(aliases={"\udc80": "emb.weight"})),
        ("pq", lambda h, s: h.update(aliases={"out.weight": "emb.weight"})),
        ("pq", lambda h, s: h.update(method=3)),
        ("pq", lambda h, s: h.update(seed="a")),
        ("pq", lambda h, s: h.update(seed=HUGE)),
        ("pq", lambda h, s: h.update(format_version=HUGE)),
        ("pq", lambda h, s: h.update(left_dense=[{"name": "a", "shape": [HUGE, 1], "bytes": 1, "reason": ""}])),
        ("pq", lambda h, s: h["source"].update(bytes=HUGE)),
        ("pq", lambda h, s: h["source"].update(placeholders=[3])),
        ("pq", lambda h, s: h.update(skeleton=[])),
        ("pq", lambda h, s: h.update(skeleton="emb.weight")),
        ("pq", lambda h, s: h.update(skeleton={"t": "none"})),
        ("pq", lambda h, s: h.update(skeleton={"d": [[{"u": 1}, None]]})),
        ("pq", lambda h, s: h.update(skeleton={"d": [[{}, None]]})),
        ("pq", lambda h, s: h.update(skeleton={"d": [[i * (2**61 - 1), None] for i in range(1000)]})),
        ("pq", lambda h, s: h.update(skeleton={"d": [[{"u": key}, None] for key in product((-1, -2), repeat=8)]})),
        ("pq", lambda h, s: h.update(skeleton={"d": [[{"u": [0] * 1001}, None]]})),
        ("pq", lambda h, s: h.update(skeleton=nested(300, lambda inner: {"l": [inner]}))),
        ("pq", lambda h, s: h.update(unknown=nested(300, lambda inner: [inner]))),
        ("pq", lambda h, s: h.update(tuning={**TUNING, "dense": {"auc": "0.5"}})),
        ("pq", lambda h, s: h.update(tuning={**TUNING, "dense": {"bce": 0.5}})),
        ("pq", lambda h, s: h.update(tuning={**TUNING, "before": {"auc": HUGE}})),
        ("pq", lambda h, s: h.update(tuning={**TUNING, "task": []})),
        ("pq", lambda h, s: h.update(tuning=3)),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(
    compressed: Callable[..., Any],
    cli: Callable[..., Any],
    tmp_path: Path,
    method: str,
    change: Callable[..., None],
) -> None:
    _, header, tensors = compressed(method)
    change(header, header["tables"]["emb.weight"]["spec"])
    save_header(tmp_path / "h.safetensors", header, tensors)
    told = cli("inspect", "h.safetensors", code=1).stderr
    assert told.startswith("error: ") and told.count("\n") == 1 and len(told) < 1500
    with pytest.raises(FormatError):
        cqr.load_dense_state_dict(tmp_path / "h.safetensors")
    cli("export", "h.safetensors", "-o", "out.pt", code=1)
    assert not (tmp_path / "out.pt").exists()


TUNING = {
    "task": "t", "metric": "auc", "mode": "max", "dense": None, "before": {"auc": 0.5}, "after": {"auc": 0.6},
    "improved": True, "verdict": "", "best_step": 1, "steps": 1,
}  # fmt: skip


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = None
    for _ in range(levels):
        value = wrap(value)
    return value


def save_header(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        save_file(tensors, path, {"format": "pt", "cqr_compress": json.dumps(header)})
    finally:
        sys.set_int_max_str_digits(limit)


def test_text_of_a_file_does_not_reach_the_terminal_as_markup_or_escapes(
    compressed: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    _, header, tensors = compressed("pq")
    evil = "\x1b]0;PWN\x07\u202e[/]"
    header["tables"]["emb.weight"].update(reason=evil)
    header["tables"]["emb.weight"]["spec"].update(method="[/]")
    header.update(method="[/]", tuning={**TUNING, "task": evil, "verdict": evil, "dense": {"auc": 0.5}})
    header["source"].update(file=evil, placeholders=[{"path": evil, "class_name": evil}])
    header["left_dense"] = [{"name": evil, "shape": [3, 4], "bytes": 48, "reason": evil}]
    save_header(tmp_path / "h.safetensors", header, tensors)
    for columns in (40, 200):
        shown = cli("inspect", "h.safetensors", columns=columns).stdout
        assert "\\x1b]0;PWN\\x07\\u202e[/]" in shown.replace("\n", "") and "\x1b" not in shown
    torch.save(
        {f"{evil}.weight": torch.randn(2000, 8), f"emb{evil}.x.weight": torch.randn(30, 8)}, tmp_path / "d.pt"
    )
    assert "\x1b" not in cli("inspect", "d.pt").stdout
    refused = cli("inspect", "d.pt", "--tables", "\x1bx", code=1).stderr
    assert "\x1b" not in refused and "\\x1bx" in refused


def test_a_key_that_unicode_cannot_encode_does_not_end_in_a_traceback(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    content = {
        "model": {"emb.weight": torch.randn(2000, 16)}, "\udc80": 1, ("a", "\udc80"): 2, (b"x", 1): 3,
        10**17: 4, "long": 10**2000, "ok": {("a", 1): 5},
    }  # fmt: skip
    torch.save(content, tmp_path / "m.pt")
    cli("inspect", "m.pt")
    cli("convert", "m.pt", "-o", "c.safetensors", "--method", "int8")
    cli("export", "c.safetensors", "-o", "e.pt")
    found = torch.load(tmp_path / "e.pt")
    assert set(found) == {"model", 10**17, "ok"} and found["ok"] == {("a", 1): 5}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(tables=3),
        lambda r: r.update(tables=[3]),
        lambda r: r["tables"][0].update(shape=[1]),
        lambda r: r["tables"][0].update(shape="ab"),
        lambda r: r["tables"][0].update(name=[]),
        lambda r: r["tables"][0].update(ratio_bytes="a"),
        lambda r: r["tables"][0].update(bytes_before=HUGE),
        lambda r: r["tables"][0].update(aliases=[1]),
        lambda r: r["tables"][0].update(other=1),
        lambda r: r.update(file_bytes_before=HUGE),
        lambda r: r.update(left_dense={}),
        lambda r: r.update(left_dense=[{"name": "a"}]),
        lambda r: r.update(unbuilt_objects=[[]]),
        lambda r: r.update(schema_version=HUGE),
        lambda r: r.update(tuning=[]),
        lambda r: r.update(tuning={"task": "a"}),
        lambda r: r.update(evaluation={}),
        lambda r: r.update(evaluation={"metric": "auc", "metrics": None, "dense": None}),
        lambda r: r.update(evaluation={"metric": None, "metrics": None, "dense": None, "file_bytes": 1,
                                       "dense_bytes": 1, "tables": []}),
        lambda r: r.update(measured="yes"),
        lambda r: r.pop("file"),
    ],
)  # fmt: skip
def test_a_damaged_report_is_refused_and_ignored_beside_its_file(
    compressed: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    path, _, _ = compressed("pq")
    (tmp_path / "c.safetensors").write_bytes(path.read_bytes())
    report = json.loads(path.with_name("pq.report.json").read_text())
    change(report)
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    (tmp_path / "c.report.json").write_text(json.dumps(report))
    sys.set_int_max_str_digits(limit)
    told = cli("inspect", "c.report.json", code=1).stderr
    assert told.startswith("error: 'c.report.json' ") and len(told) < 600
    cli("inspect", "c.safetensors")


def test_a_report_that_is_nested_deeply_or_no_file_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "c.report.json").write_text("[" * 100_000)
    assert "nested too deeply" in cli("inspect", "c.report.json", code=1).stderr
    os.mkfifo(tmp_path / "d.report.json")
    assert "a pipe, socket or device" in cli("inspect", "d.report.json", code=1).stderr


def test_frequencies_that_lie_are_refused(tmp_path: Path) -> None:
    rows = {"a.weight": 4}

    def npy(shape: str, descr: str = "<f8", data: bytes = b"\0" * 64) -> bytes:
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data

    for content in (
        npy("(1000000000000,)"), npy("(10000000000,)", "|V0"), npy("(10000000000,)", "|S0"), npy("(-1,)"),
        npy(f"({'1' * 4000},)"), npy("(" * 500), npy("(2,)", "|S8"), npy("(2,)", "<c16"), b"PK\x05\x06" + b"\0" * 18,
    ):  # fmt: skip
        (tmp_path / "c.npy").write_bytes(content)
        with pytest.raises(CqrCompressError, match="cannot read numbers"):
            read_frequencies(tmp_path / "c.npy", rows)
    for digits in ("9" * 400, "9" * 5000, "-" + "9" * 30):
        (tmp_path / "c.csv").write_text(f"id,count\n{digits},1\n")
        with pytest.raises(CheckpointError, match="cannot read"):
            read_frequencies(tmp_path / "c.csv", rows)
    os.mkfifo(tmp_path / "f.csv")
    with pytest.raises(CheckpointError, match="a pipe, socket or device"):
        read_frequencies(tmp_path / "f.csv", rows)
    np.save(tmp_path / "c.npy", np.arange(4))
    assert read_frequencies(tmp_path / "c.npy", rows)["a.weight"].tolist() == [0, 1, 2, 3]


def test_the_effective_rank_of_a_wide_table_takes_its_smaller_gram_matrix() -> None:
    rows = torch.randn(60, 5) @ torch.randn(5, 40)
    assert abs(effective_rank(rows) - effective_rank(rows.T.contiguous())) < 0.01
    began = time.process_time()
    assert effective_rank(torch.ones(3000, 9000)) == pytest.approx(1, abs=0.01)
    assert time.process_time() - began < 20
