"""Outputs are replaced as a whole or not at all, and damage after writing is noticed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cqr_compress as cqr
from cqr_compress.checkpoint import compressed_writer, output_files, shards
from cqr_compress.checkpoint.checksums import CHECKSUMS_KEY, WRITE_KEY
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.output_files import atomic_file, create_partial
from cqr_compress.errors import CheckpointError, CqrCompressWarning, FormatError, OutputError, OutputExistsError

Cli = Callable[..., subprocess.CompletedProcess[str]]
SHARD_BYTES = 20_000


def decoded(path: Path) -> dict[str, torch.Tensor]:
    return cqr.load_dense_state_dict(path)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shards_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("s-*.safetensors")}


@pytest.fixture
def two_writes(ckpt: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two sharded outputs of one name in two folders, with different content."""
    for folder, method in (("a", "int8"), ("b", "int4")):
        (tmp_path / folder).mkdir()
        cqr.convert(ckpt, tmp_path / folder / "s.safetensors", method=method, shard_bytes=SHARD_BYTES)
    return tmp_path / "a" / "s.safetensors.index.json", tmp_path / "b" / "s.safetensors.index.json"


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, None])
def test_a_process_that_dies_between_renames_leaves_the_old_output_or_the_new_one(
    ckpt: Path, tmp_path: Path, two_writes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    out = tmp_path / "a" / "s.safetensors"
    if shard_bytes is None:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        cqr.convert(ckpt, out, method="int8")
    opened = out if shard_bytes is None else two_writes[0]
    old = decoded(opened)
    states: list[Path] = []
    rename, unlink = output_files.rename, Path.unlink

    def snapshot() -> None:
        states.append(tmp_path / f"state{len(states)}")
        shutil.copytree(out.parent, states[-1])

    def rename_and_copy(partial: Path, target: Path) -> None:
        snapshot()
        rename(partial, target)
        snapshot()

    def unlink_and_copy(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        snapshot()

    for module in ("output_files", "streaming_writer"):
        monkeypatch.setattr(f"cqr_compress.checkpoint.{module}.rename", rename_and_copy)
    monkeypatch.setattr(Path, "unlink", unlink_and_copy)
    cqr.convert(ckpt, out, method="int4", shard_bytes=shard_bytes, force=True)
    monkeypatch.undo()
    new = decoded(opened)
    assert not equal(old, new) and len(states) > 4
    loaded = [decoded(state / opened.name) for state in states]
    assert all(equal(state, old) or equal(state, new) for state in loaded)
    assert equal(loaded[0], old) and equal(loaded[-1], new)
    for folder, state in zip(states, loaded, strict=True):  # a report never tells of another file
        report = folder / "s.report.json"
        if report.exists():
            written = json.loads(report.read_text())["tables"][0]["method"]
            assert written == ("int8" if equal(state, old) else "int4")
    for state in states:  # and the next run cleans up
        cqr.convert(ckpt, state / "s.safetensors", method="int4", shard_bytes=shard_bytes, force=True)
        assert sorted(p.name for p in state.iterdir()) == sorted(p.name for p in out.parent.iterdir())


def test_an_error_between_renames_takes_the_new_shards_back(
    ckpt: Path, two_writes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_writes[0].parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = output_files.rename

    def fail_at_the_index(partial: Path, target: Path) -> None:
        if target.name.endswith(".json"):
            raise OSError(28, "No space left on device")
        rename(partial, target)

    for module in ("output_files", "streaming_writer"):
        monkeypatch.setattr(f"cqr_compress.checkpoint.{module}.rename", fail_at_the_index)
    with pytest.raises(OutputError, match="the disk is full. No partial file is left"):
        cqr.convert(ckpt, folder / "s.safetensors", method="int4", shard_bytes=SHARD_BYTES, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("error", [errno.EIO, errno.EPERM, None])
def test_an_output_that_cannot_be_renamed_leaves_the_earlier_one_with_its_report(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    out = tmp_path / "s.safetensors"
    cqr.convert(ckpt, out, method="int8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def fail_at_the_output(self: Path, target: Path) -> Path:
        if target == out:
            raise KeyboardInterrupt if error is None else OSError(error, os.strerror(error))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_output)
    with pytest.raises(OutputError if error else KeyboardInterrupt, match=error and os.strerror(error)):
        cqr.convert(ckpt, out, method="int4", force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_of_a_replaced_output_is_not_put_back(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "s.safetensors", output_files.rename

    def interrupt_after(partial: Path, target: Path) -> None:
        rename(partial, target)
        raise KeyboardInterrupt

    cqr.convert(ckpt, out, method="int8")
    monkeypatch.setattr("cqr_compress.checkpoint.streaming_writer.rename", interrupt_after)
    with pytest.raises(KeyboardInterrupt):
        cqr.convert(ckpt, out, method="int4", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "s.safetensors"}
    assert cqr.inspect(out).tables[0].method == "int4"


def test_an_interrupt_after_the_index_is_renamed_keeps_its_shards(
    ckpt: Path, two_writes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = output_files.rename

    def interrupt_after_the_index(partial: Path, target: Path) -> None:
        rename(partial, target)
        if target.name.endswith(".index.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(output_files, "rename", interrupt_after_the_index)
    expected = decoded(two_writes[1])
    with pytest.raises(KeyboardInterrupt):
        cqr.convert(
            ckpt, two_writes[0].with_name("s.safetensors"), method="int4", shard_bytes=SHARD_BYTES, force=True
        )
    assert equal(decoded(two_writes[0]), expected)


def test_shards_of_different_writes_are_refused(two_writes: tuple[Path, Path]) -> None:
    a, b = two_writes
    for path in b.parent.glob("s-*.safetensors"):
        shutil.copy(path, a.parent)
    index = json.loads(a.read_text())
    theirs = json.loads(b.read_text())["weight_map"]
    name = next(reversed(index["weight_map"]))
    for without_write in (False, True):
        index["weight_map"][name] = theirs[name]
        if without_write:
            del index["metadata"][WRITE_KEY]
        a.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="has shards of different writes, which do not belong together"):
            open_checkpoint(a)


def test_the_same_request_writes_the_same_files(ckpt: Path, two_writes: tuple[Path, Path]) -> None:
    folder = two_writes[0].parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    cqr.convert(ckpt, folder / "s.safetensors", method="int8", shard_bytes=SHARD_BYTES, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_shards_that_are_not_of_the_replaced_output_stay(ckpt: Path, two_writes: tuple[Path, Path]) -> None:
    folder = two_writes[0].parent
    theirs = [folder / "s-01234567-00001-of-00002.safetensors", folder / "s-00001-of-00002.safetensors"]
    for path in theirs:
        save_file({"x": torch.zeros(2)}, path)
    cqr.convert(ckpt, folder / "s.safetensors", method="int4", force=True)
    assert {path.name for path in folder.iterdir()} == {
        "s.safetensors", "s.report.json", *(path.name for path in theirs)
    }  # fmt: skip


def test_shards_that_another_index_lists_or_that_are_read_stay(ckpt: Path, two_writes: tuple[Path, Path]) -> None:
    folder = two_writes[0].parent
    other = two_writes[0].rename(folder / "earlier.safetensors.index.json")
    expected = decoded(other)
    cqr.convert(ckpt, folder / "s.safetensors", method="int4", force=True)
    assert equal(decoded(other), expected)
    cqr.export(other, folder / "s.safetensors", force=True)
    assert equal(decoded(other), expected)


def test_a_pipe_with_the_name_of_a_shard_is_left_alone(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "s-01234567-00001-of-00002.safetensors")
    cqr.convert(ckpt, tmp_path / "out" / "s.safetensors", method="int8")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_too_many_open_files_are_an_error_of_the_file(two_writes: tuple[Path, Path]) -> None:
    index, limits = two_writes[0], resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_checkpoint(index)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_temporary_file_is_left_where_space_cannot_be_reserved(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with small_files(1000), pytest.raises(OutputError):
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_an_index_of_other_files_is_not_removed(ckpt: Path, tmp_path: Path) -> None:
    index = tmp_path / "s.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "x.safetensors"}}))
    with pytest.raises(OutputExistsError):
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8", force=True)
    assert index.exists()


def test_temporary_files_of_killed_runs_are_removed_and_those_of_running_ones_are_not(
    ckpt: Path, tmp_path: Path
) -> None:
    (tmp_path / ".s.safetensors.0a1b2c3d.partial").write_bytes(b"x")
    (tmp_path / ".s-00000000-00002-of-00003.safetensors.0a1b2c3d.partial").write_bytes(b"x")
    (tmp_path / ".s.report.json.0a1b2c3d.partial").write_bytes(b"x")
    (tmp_path / ".other.safetensors.0a1b2c3d.partial").write_bytes(b"x")
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    assert {path.name for path in tmp_path.glob(".*")} == {".other.safetensors.0a1b2c3d.partial"}
    before = (tmp_path / "s.safetensors").read_bytes()
    running, file = create_partial(tmp_path / "s.safetensors")
    with file, pytest.raises(OutputError, match="another process is writing the same output"):
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="int4", force=True)
    assert running.exists() and (tmp_path / "s.safetensors").read_bytes() == before
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int4", force=True)  # the lock ended with the file
    assert not running.exists()


def test_a_report_that_cannot_be_written_does_not_deny_the_file(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, report: object) -> None:
        raise OutputError(f"cannot write {str(path)!r}: the disk is full")

    monkeypatch.setattr(compressed_writer, "write_report", full)
    with pytest.raises(OutputError, match=r"s.safetensors' is written and complete, but not its report: cannot"):
        cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    assert decoded(tmp_path / "s.safetensors")


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_command_says_what_it_has_written(
    ckpt: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output_files, "completed", [])
    monkeypatch.setattr(compressed_writer, "write_report" if after else "_write", interrupt)
    shown = cli("convert", "ckpt.pt", "-o", "s.safetensors", "--method", "int8", code=130).stderr
    assert (tmp_path / "s.safetensors").exists() == after
    assert "interrupted; " + ("written and complete: s.safetensors" if after else "nothing was written") in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a folder|does not name a file"),
        ("", "is a folder|does not name a file"),
        ("folder", "is a folder"),
        ("folder.safetensors", "is a folder"),
        ("x" * 300 + ".safetensors", "has more than 213 bytes"),
        ("missing/s.safetensors", "no such folder"),
        ("s", "does not end in .safetensors"),
        ("s.pt", "does not end in .safetensors"),
        ("pipe.safetensors", "is a device, a pipe or a socket"),
        ("device.safetensors", "is a device, a pipe or a socket"),
        ("dangling.safetensors", "is a link to a file that does not exist"),
        ("loop.safetensors", "is a link to itself"),
    ],
)
def test_what_is_no_file_is_refused_as_output(
    ckpt: Path, tmp_path: Path, cli: Cli, name: str, message: str
) -> None:
    for folder in ("folder", "folder.safetensors"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/null")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    shown = cli("convert", "ckpt.pt", "-o", name, "--method", "int8", "--force", code=1).stderr
    assert any(part in " ".join(shown.split()) for part in message.split("|")) and "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_torch_file_that_does_not_fit_is_an_error_of_the_output(ckpt: Path, tmp_path: Path) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    before = sorted(path.name for path in tmp_path.iterdir())
    with small_files(4096), pytest.raises(OutputError, match="cannot write .*d.pt.*: the file size limit"):
        cqr.export(tmp_path / "s.safetensors", tmp_path / "d.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(3000, 16)
        self.user_embedding = nn.Embedding(1500, 16)
        self.out = nn.Linear(16, 4)
        self.register_buffer("steps", torch.tensor(0))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["item_embedding.codes", "out.weight"])
def test_a_flipped_byte_is_refused(ckpt: Path, tmp_path: Path, cli: Cli, sharded: bool, name: str) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8", shard_bytes=SHARD_BYTES if sharded else None)
    path = tmp_path / ("s.safetensors.index.json" if sharded else "s.safetensors")
    holder = next(
        file
        for file in tmp_path.glob("s*.safetensors")
        if name in safe_open(file, "pt").keys()  # noqa: SIM118
    )
    content = bytearray(holder.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + start] ^= 1
    holder.write_bytes(content)
    message = f"{name!r} of .* does not have its checksum: the file was damaged after it was written"
    model = Net()
    with pytest.raises(FormatError, match=message):
        cqr.load_compressed(model, path)
    assert isinstance(model.item_embedding, nn.Embedding)
    with pytest.raises(FormatError, match=message):
        cqr.load_dense_state_dict(path)
    shown = cli("export", path, "-o", "d.pt", code=1).stderr
    assert "does not have its checksum" in shown and not (tmp_path / "d.pt").exists()
    cli("export", path, "-o", "d.pt", "--no-verify")
    cqr.load_compressed(model, path, verify=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"out.weight":{"dtype":"F32","shape":[4,16]', b'"out.weight":{"dtype":"I32","shape":[4,16]', "checksum"),
        (b'"out.weight":{"dtype":"F32","shape":[4,16]', b'"out.weight":{"dtype":"F32","shape":[8,8] ', "checksum"),
        (rb"\"seed\":0", rb"\"seed\":7", "checksum"),
        (b'"item_embedding.weight":{', b'"item_embedding.wdight":{', "checksum"),
    ],
)
def test_a_changed_header_is_refused(ckpt: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "s.safetensors"
    cqr.convert(ckpt, path, method="pq", ratio=8)
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        cqr.load_dense_state_dict(path)


def test_checksums_of_another_length_are_refused(ckpt: Path, tmp_path: Path) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "s.safetensors")
    for text in ("", metadata[CHECKSUMS_KEY][:-1], "x" * len(metadata[CHECKSUMS_KEY])):
        save_file(tensors, tmp_path / "s.safetensors", {**metadata, CHECKSUMS_KEY: text})
        with pytest.raises(CheckpointError, match="the checksums in the metadata of .* are damaged"):
            open_checkpoint(tmp_path / "s.safetensors")


def test_evaluate_keeps_a_report_that_is_not_its_own(ckpt: Path, tmp_path: Path) -> None:
    cqr.convert(ckpt, tmp_path / "s.safetensors", method="int8")
    theirs = tmp_path / "s.report.json"
    for content in ("[1]", "no json", '{"kind": "sales"}'):
        theirs.write_text(content)
        with pytest.warns(CqrCompressWarning, match="the report next to .* was not updated"):
            cqr.evaluate([tmp_path / "s.safetensors"], original=ckpt)
        assert theirs.read_text() == content


def test_an_alias_is_one_of_a_tensor_in_its_own_shard(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(3, 2), torch.arange(6.0, 12).view(3, 2)
    torch.save({"emb.weight": a, "out.weight": a}, tmp_path / "one.bin")
    torch.save({"emb.weight": b}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    for weight_map, tensors, aliases in (
        ({"emb.weight": "two.bin", "out.weight": "one.bin"}, {"emb.weight": b, "out.weight": a}, {}),
        ({"out.weight": "one.bin"}, {"out.weight": a}, {}),
        ({"out.weight": "one.bin", "emb.weight": "one.bin"}, {"emb.weight": a}, {"out.weight": "emb.weight"}),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with open_checkpoint(index) as opened:
            found = {name: entry.stored.read() for name, entry in opened.entries.items()}
            assert equal(found, tensors) and dict(opened.aliases) == aliases
            assert all(entry.name == name for name, entry in opened.entries.items())


def test_a_folder_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(output_files.fcntl, "flock", no_locks)
    left = tmp_path / ".x.01234567.partial"
    left.write_bytes(b"x")
    with atomic_file(tmp_path / "x") as file:
        file.write(b"y")
    assert (tmp_path / "x").read_bytes() == b"y" and left.exists()  # it cannot be known whether its process runs


def test_split_shards_keeps_the_order(ckpt: Path) -> None:
    with open_checkpoint(ckpt) as opened:
        shapes = {n: shards.TensorShape(e.shape, e.dtype) for n, e in opened.entries.items()}
    groups = shards.split_shards(shapes, 100_000)
    assert len(groups) == 2 and [name for group in groups for name in group] == list(shapes)
