"""Archives of numpy are read as tensors or word vectors, and damaged ones are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError

ROWS = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_several_arrays_are_tensors_with_their_names(tmp_path: Path, save: object) -> None:
    arrays = {
        "user_embedding": ROWS,
        "item_embedding": np.asfortranarray(ROWS[:1200].astype(np.float16)),
        "bias": ROWS[0].astype(">f8"),
        "steps": np.array(7),
        "empty": np.empty((0, 3), np.float32),
        "names": np.array(["a", "b"]),
    }
    save(tmp_path / "m.npz", **arrays)  # type: ignore[operator]
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        assert set(checkpoint.entries) == {*arrays} - {"names"}
        for name, entry in checkpoint.entries.items():
            assert np.array_equal(entry.stored.read().numpy(), arrays[name]) and entry.shape == arrays[name].shape
        assert np.array_equal(checkpoint.entries["user_embedding"].stored.read_rows(5, 9).numpy(), ROWS[5:9])
    report = cqr.convert(tmp_path / "m.npz", tmp_path / "s.safetensors", method="int8")
    assert {table.name for table in report.tables} == {"user_embedding", "item_embedding"}
    dense = cqr.load_dense_state_dict(tmp_path / "s.safetensors")
    assert dense["bias"].dtype == torch.float64 and int(dense["steps"]) == 7


def test_a_matrix_alone_is_word_vectors_with_numbers_for_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", ROWS)
    cqr.convert(tmp_path / "v.npz", method="int8")
    vectors = cqr.load_vectors(tmp_path / "v.cqr.safetensors")
    assert vectors.words[:3] == ["0", "1", "2"] and np.allclose(vectors["7"], ROWS[7], atol=0.05)


def member(array: np.ndarray, cut: int = 0, **header: object) -> bytes:
    """The bytes of an array, without the last `cut`, with other fields of its header."""
    out = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(out, fields | header)  # type: ignore[arg-type]
    return out.getvalue() + array.tobytes()[: len(array.tobytes()) - cut]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no archive of numpy"),
        (b"\x93NUMPY\1\0\x10\0garbage", "no archive of numpy"),
        (member(ROWS, cut=4), "not the bytes of an array"),
        (member(ROWS, shape=(10**9, 10**9)), "not the bytes of an array"),
        (member(ROWS, shape=(-1500, -8)), "the shape"),
        (member(ROWS, descr="|O"), "not the bytes of an array|no array of numbers"),
        (member(np.array([], np.float32), descr="|O", shape=(0,)), "no array of numbers"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.npz")


def test_truncated_archives_duplicates_and_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "m.npz", a=ROWS)
    whole = (tmp_path / "m.npz").read_bytes()
    for size in (40, 1000, len(whole) - 10):
        (tmp_path / "m.npz").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "m.npz")
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("a.npy", member(ROWS))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", member(ROWS))
    with pytest.raises(CheckpointError, match="two arrays named 'a'"):
        open_checkpoint(tmp_path / "twice.npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**6))
    monkeypatch.setattr("cqr_compress.checkpoint.formats.numpy_archive._FREE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="out of proportion"):
        open_checkpoint(tmp_path / "bomb.npz")
