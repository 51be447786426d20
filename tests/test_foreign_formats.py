"""Formats of other programs are recognized, and the command that the message gives makes a readable file."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError

ROWS = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(path)
    return str(found.value)


def run_advice(message: str, tmp_path: Path) -> None:
    command = re.search(r"(?:[Rr]un: )(.*)", message)
    assert command is not None, message
    words = command[1].replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


def rows_of(path: Path) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        (entry,) = [e for e in checkpoint.entries.values() if e.shape == (1500, 8)]
        return entry.stored.read()


def test_an_onnx_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(ROWS.numpy(), "emb.weight")])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    run_advice(refused(tmp_path / "m.onnx"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "m.safetensors"), ROWS)


def test_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/embedding/vars/0"] = ROWS.numpy()
        file["names"] = [b"a"]
    run_advice(refused(tmp_path / "m.weights.h5"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "m.safetensors"), ROWS)


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", ROWS.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run_advice(refused(tmp_path / "m.gguf"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "m.safetensors"), ROWS)


def test_flax(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    packed = serialization.msgpack_serialize({"params": {"embed": {"embedding": ROWS.numpy()}}})
    (tmp_path / "m.msgpack").write_bytes(packed)
    run_advice(refused(tmp_path / "m.msgpack"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "m.safetensors"), ROWS)


def test_orbax(tmp_path: Path) -> None:
    pytest.importorskip("flax")
    orbax = pytest.importorskip("orbax.checkpoint")
    orbax.PyTreeCheckpointer().save(tmp_path / "m", {"params": {"emb": ROWS.numpy()}})
    run_advice(refused(tmp_path / "m"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "m.safetensors"), ROWS)


@pytest.mark.parametrize("kind", ["SavedModel", "folder", "index"])
def test_tensorflow(tmp_path: Path, kind: str) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    model = tensorflow.Module()
    model.emb = tensorflow.Variable(ROWS.numpy())
    if kind == "SavedModel":
        tensorflow.saved_model.save(model, str(tmp_path / "m"))
    else:
        tensorflow.train.Checkpoint(m=model).write(str(tmp_path / "m" / "m"))
    run_advice(refused(tmp_path / "m" / "m.index" if kind == "index" else tmp_path / "m"), tmp_path)
    folder = tmp_path / "m" if kind == "index" else tmp_path
    assert torch.equal(rows_of(folder / "m.safetensors"), ROWS)


def test_compressed_with_gzip(tmp_path: Path) -> None:
    torch.save({"emb.weight": ROWS}, tmp_path / "m.pt")
    (tmp_path / "n.pt.gz").write_bytes(gzip.compress((tmp_path / "m.pt").read_bytes()))
    run_advice(refused(tmp_path / "n.pt.gz"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "n.pt"), ROWS)


def test_compressed_with_gzip_under_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"emb.weight": ROWS}, tmp_path / "m.pt")
    (tmp_path / "n.pt").write_bytes(gzip.compress((tmp_path / "m.pt").read_bytes()))
    run_advice(refused(tmp_path / "n.pt"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "n-2.pt"), ROWS)


@pytest.mark.parametrize("name", ["m.safetensors", "m.h5"])
def test_a_command_replaces_no_file(tmp_path: Path, name: str) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / name, "w") as file:
        file["emb"] = ROWS.numpy()
    (tmp_path / "m.safetensors").touch()
    held = (tmp_path / "m.safetensors").read_bytes()
    run_advice(refused(tmp_path / name), tmp_path)
    assert (tmp_path / "m.safetensors").read_bytes() == held
    assert torch.equal(rows_of(tmp_path / "m-2.safetensors"), ROWS)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_distributed_checkpoint(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    checkpoint.save({"emb.weight": ROWS}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    run_advice(refused(tmp_path / "sharded"), tmp_path)
    assert torch.equal(rows_of(tmp_path / "sharded.pt"), ROWS)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("m.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file.*h5py"),
        ("m.gguf", b"GGUF\x03\0\0\0", "a GGUF file.*gguf.GGUFReader"),
        ("flax_model.msgpack", b"\x81\xa6params", "Flax.*msgpack_restore"),
        ("flax_model.msgpack", b"\xde\x00\x20", "Flax.*msgpack_restore"),
        ("ckpt-1.index", b"\0" * 600 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow.*load_checkpoint.*ckpt-1"),
        ("m.pt.xz", b"\xfd7zXZ\0", "xz"),
        ("m.pt.bz2", b"BZh9", "bzip2"),
        ("m.pt.zst", b"\x28\xb5\x2f\xfd", "zstd"),
        ("m.7z", b"7z\xbc\xaf\x27\x1c", "7z"),
        ("m.parquet", b"PAR1", "Parquet"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS.*lfs pull"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "web page.*download"),
    ],
)
def test_others_are_named(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    (tmp_path / name).write_bytes(content + bytes(20) * (not name.endswith(".index")))
    assert re.search(wanted, refused(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["saved_model.pb", "variables/variables.index"], "SavedModel.*variables/variables"),
        (["checkpoint", "m.ckpt-5.index", "m.ckpt-5.data-00000-of-00001"], "TensorFlow checkpoint.*m.ckpt-5"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed.*zero_to_fp32.py"),
        (["manifest.ocdbt", "d/x"], "Orbax"),
    ],
)
def test_folders_of_others_are_named(tmp_path: Path, names: list[str], wanted: str) -> None:
    for name in names:
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).touch()
    assert re.search(wanted, refused(tmp_path / "m"))


@pytest.mark.parametrize(
    ("folder", "name", "wanted"),
    [
        ("m", "x.distcp", "dcp_to_torch . model.pt"),
        ("m", "m.ckpt-5.data-00000-of-00001", "no checkpoint"),  # without the index that names its tensors
        ("m.msgpack", "x", "no checkpoint"),
    ],
)
def test_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str, wanted: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).touch()
    assert "no checkpoint" in refused(tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    assert wanted in refused(Path())


def test_zip_files_of_others_are_named(tmp_path: Path) -> None:
    for member, wanted in (("model.weights.h5", "Keras.*unzip"), ("m.pt", "archive.*unzip")):
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            archive.writestr(member, b"x")
        assert re.search(wanted, refused(tmp_path / "m.zip"))


def test_the_message_reaches_the_command(tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match="HDF5"):
        cqr.convert(tmp_path / "m.h5")
