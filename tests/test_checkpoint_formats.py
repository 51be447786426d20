import argparse
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cqr_compress.checkpoint.formats import safetensors_files
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError

State = dict[str, torch.Tensor]


def assert_same(path: Path, state: State) -> None:
    with open_checkpoint(path) as checkpoint:
        names = {**{n: n for n in checkpoint.entries}, **checkpoint.aliases}
        assert set(names) == set(state)
        for name, tensor in state.items():
            entry = checkpoint.entries[names[name]]
            assert torch.equal(entry.stored.read(), tensor) and entry.dtype == tensor.dtype
            if tensor.ndim:
                assert torch.equal(entry.stored.read_rows(1, 3), tensor[1:3])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_reads_as_it_was_saved(tmp_path: Path, model_state: State, legacy: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(model_state, path, _use_new_zipfile_serialization=not legacy)
    assert_same(path, model_state)


def test_safetensors_and_both_kinds_of_shards_read_as_they_were_saved(tmp_path: Path, model_state: State) -> None:
    save_file(model_state, tmp_path / "m.safetensors")
    assert_same(tmp_path / "m.safetensors", model_state)
    names = list(model_state)
    for suffix, index in (
        ("safetensors", "model.safetensors.index.json"),
        ("bin", "pytorch_model.bin.index.json"),
    ):
        folder = tmp_path / suffix
        folder.mkdir()
        weight_map = {}
        for i, part in enumerate((names[:2], names[2:])):
            state = {name: model_state[name] for name in part}
            shard = f"part-{i}.{suffix}"
            save_file(state, folder / shard) if suffix == "safetensors" else torch.save(state, folder / shard)
            weight_map.update(dict.fromkeys(part, shard))
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        assert_same(folder, model_state)
        assert_same(folder / index, model_state)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_reads_bit_for_bit(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    state = {"x": (torch.randn(5, 3) * 50).to(dtype), "y": torch.zeros(4, 2)}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(tmp_path / "m.pt", state)


def test_views_transposes_and_empty_tensors_read_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(60.0).view(10, 6)
    state = {"t": base.T, "slice": base[2:9, 1:4], "one": torch.tensor(3.0), "other": base.clone()}
    torch.save(state, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", state)
    torch.save({"none": torch.empty(0, 4), "a": base}, tmp_path / "e.pt")
    with open_checkpoint(tmp_path / "e.pt") as checkpoint:
        assert checkpoint.entries["none"].stored.read().shape == (0, 4)


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "module", "net", "generator", "whatever"]
)
def test_a_nested_state_dict_is_found_by_its_tensors(tmp_path: Path, model_state: State, key: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3000, 16))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {"epoch": 3, key: OrderedDict(model_state), "optimizer": optimizer.state_dict(), "best": 0.25}
    torch.save(content, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", model_state)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.optimizer_bytes == 2 * 3000 * 16 * 4 + 4


def test_wrapper_prefixes_stay_in_the_names(tmp_path: Path, model_state: State) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in model_state.items()}
    torch.save({"model": state}, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", state)


def test_tensors_that_share_memory_are_one_entry_and_an_alias(tmp_path: Path) -> None:
    table = torch.randn(10, 4)
    torch.save({"wte.weight": table, "lm_head.weight": table}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.entries) == ["wte.weight"]
        assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}


class Config:
    """Stands for a class that the reading program cannot import."""

    def __init__(self) -> None:
        self.depth = 3
        self.nested = {"weights": torch.ones(2, 2)}


def test_objects_of_unknown_classes_become_named_placeholders(tmp_path: Path, model_state: State) -> None:
    content = {
        "config": Config(),
        "args": argparse.Namespace(lr=0.1),
        "loss": np.float64(0.5),
        "where": Path("x"),
        "state_dict": model_state,
    }
    torch.save(content, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        met = {placeholder.path: placeholder.class_name for placeholder in checkpoint.unbuilt_objects}
        assert met["config"].endswith("test_checkpoint_formats.Config")
        assert met["args"] == "argparse.Namespace"
        assert "numpy" in met["loss"]
        assert torch.equal(checkpoint.entries["out.weight"].stored.read(), model_state["out.weight"])
        assert torch.equal(checkpoint.entries["config.nested.weights"].stored.read(), torch.ones(2, 2))
        assert checkpoint.outside_model == {"config.nested.weights"}


class Recommender(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(20, 4)
        self.tower = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_a_whole_pickled_module_gives_its_state_dict(tmp_path: Path) -> None:
    model = Recommender()
    torch.save(model, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", dict(model.state_dict()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + b"\0" * 60, "truncated or damaged"),
        (b"\x80\x04N.", "bare pickle"),
        (b"hello world, not a checkpoint", "not a torch or safetensors checkpoint"),
        ((2**40).to_bytes(8, "little") + b"{}", "not a valid safetensors file"),
        (b'\x10\0\0\0\0\0\0\0{"a":{"dtype":"F3', "not a valid safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.pt")


def test_a_lying_safetensors_header_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.999, 0.7, 0.3])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, ckpt: Path, legacy: bool, share: float) -> None:
    if legacy:
        torch.save({"emb.weight": torch.randn(900, 16)}, ckpt, _use_new_zipfile_serialization=False)
    content = ckpt.read_bytes()
    ckpt.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged|cannot be read"):
        open_checkpoint(ckpt)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("change", ["truncate", "empty", "append", "rewrite"])
def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path, form: str, change: str) -> None:
    """A mapped page beyond the end of a file would kill the process with SIGBUS."""
    path = tmp_path / "m"
    state = {"emb.weight": torch.randn(5000, 16)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    size = path.stat().st_size
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.entries["emb.weight"].stored.read(), state["emb.weight"])
        if change == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "rewrite":
            path.write_bytes(b"\1" * size)
            os.utime(path, (0, 0))
        else:
            os.truncate(path, size // 2 if change == "truncate" else 0)
        has = path.stat().st_size
        message = f"was changed while it was read: it had {size} bytes and has {has}. Run the command again"
        with pytest.raises(CheckpointError, match=message):
            checkpoint.entries["emb.weight"].stored.read()
        with pytest.raises(CheckpointError, match=message):
            checkpoint.entries["emb.weight"].stored.read_rows(4990, 5000)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("opens", [1, 2, 3])
@pytest.mark.parametrize("content", ["shorter", "of another shape", "of the same shape", "rubbish"])
def test_a_file_that_is_replaced_while_it_is_opened_is_said_to_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, opens: int, content: str
) -> None:
    path, other = tmp_path / "m", tmp_path / "other"
    for target, rows in ((path, 50), (other, {"shorter": 10, "of another shape": 60}.get(content, 50))):
        state = {"emb.weight": torch.randn(rows, 16)}
        if form == "safetensors":
            save_file(state, target)
        else:
            torch.save(state, target, _use_new_zipfile_serialization=form == "zip")
    if content == "rubbish":
        other.write_bytes(b"rubbish" * 100)
    left = opens
    before = path.stat().st_size

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: object, *args: Any, **options: Any) -> Any:
            nonlocal left
            left -= str(file) == str(path)
            if left == 0:
                other.replace(path)
                left = -100
            return function(file, *args, **options)

        return call

    monkeypatch.setattr(io, "open", counted(io.open))
    monkeypatch.setattr(safetensors_files, "safe_open", counted(safetensors_files.safe_open))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(path)
    assert f"was changed while it was read: it had {before} bytes and has {path.stat().st_size}" in str(
        refused.value
    )


def test_every_short_prefix_of_a_legacy_file_is_refused_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"emb.weight": torch.randn(4, 2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_tensor_that_reads_past_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.zeros(4, 2)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = members[name].replace(b"K\x04K\x02\x86", b"K\xffK\x02\x86")  # shape (255, 2)
    with zipfile.ZipFile(tmp_path / "lie.pt", "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    with pytest.raises(CheckpointError, match="reads past the end of storage"):
        open_checkpoint(tmp_path / "lie.pt")


def test_a_folder_without_an_index_names_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains no checkpoint: no index of shards"):
        open_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"x": torch.zeros(2, 2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="2 checkpoints and no index: give one of a.pt, b.pt"):
        open_checkpoint(tmp_path)


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        open_checkpoint(index)


def test_shards_that_miss_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "s.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}))
    with pytest.raises(CheckpointError, match="'b' in s.safetensors"):
        open_checkpoint(index)


def test_a_file_without_tensors_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"config": Config}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_deeply_nested_pickle_is_refused_not_a_crash(tmp_path: Path) -> None:
    tree: object = torch.zeros(2, 2)
    for _ in range(300):
        tree = [tree]
    torch.save(tree, tmp_path / "m.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_sparse_tensor_is_a_placeholder_and_not_its_parts(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.zeros(4, 2), "sparse": torch.eye(4).to_sparse()}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.entries) == ["emb.weight"]
        assert [met.path for met in checkpoint.unbuilt_objects] == ["sparse"]
