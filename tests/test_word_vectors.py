"""Word vectors: six kinds of files, read by numpy alone, and written again."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError, FormatError
from cqr_compress.kernel.compile import NoCompilerError, compile_library, find_compiler
from cqr_compress.kernel.library import load_library
from cqr_compress.table.trellis import seeded_values as torch_values
from cqr_compress.vectors import compiled_rows
from cqr_compress.vectors.subwords import Subwords
from cqr_compress.vectors.table_reader import TableReader, seeded_values

N, D = 1500, 12
WORDS = [f"w{i}" for i in range(N - 3)] + ["naïve", "日本", "New York"]


def rows_with_neighbours() -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(60, D))
    return (centers[generator.integers(60, size=N)] + 0.2 * generator.normal(size=(N, D))).astype(np.float32)


ROWS = rows_with_neighbours()


def text(rows: np.ndarray = ROWS, end: str = "\n") -> bytes:
    lines = [
        f"{word} {' '.join(str(x) for x in row)}{end}" for word, row in zip(WORDS, rows.tolist(), strict=True)
    ]
    return "".join(lines).encode()


def binary() -> bytes:
    lines = [w.replace(" ", "_").encode() + b" " + r.tobytes() + b"\n" for w, r in zip(WORDS, ROWS, strict=True)]
    return f"{N} {D}\n".encode() + b"".join(lines)


BUCKETS = 700
GRAMS = np.random.default_rng(1).normal(size=(BUCKETS, D)).astype(np.float32)


def fasttext(minn: int = 3, maxn: int = 4) -> bytes:
    head = struct.pack("<2i12id", 793712314, 12, D, 5, 5, 1, 5, 1, 2, 2, BUCKETS, minn, maxn, 100, 1e-4)
    dictionary = struct.pack("<3i2q", N, N, 0, 10 * N, -1)
    entries = b"".join(w.encode() + b"\0" + struct.pack("<qb", 5, 0) for w in WORDS)
    grams = GRAMS if maxn else GRAMS[:0]
    matrix = struct.pack("<?2q", False, N + len(grams), D) + ROWS.tobytes() + grams.tobytes()
    return head + dictionary + entries + matrix + struct.pack("<?2q", False, 0, D)


FILES = {
    "word2vec.txt": f"{N} {D}\n".encode() + text(),
    "fasttext.vec": f"{N} {D}\n".encode() + text(end=" \r\n"),
    "glove.txt": text(),
    "word2vec.bin": binary(),
    "fasttext.bin": fasttext(0, 0),
    "array.npy": b"",
    "array.npz": b"",
    "packed.npz": b"",
}


def write(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(FILES[name])
    if name == "array.npy":
        np.save(path, ROWS)
        (folder / "array.words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    elif path.suffix == ".npz":
        save = np.savez if name == "array.npz" else np.savez_compressed
        save(path, vectors=ROWS, words=np.array(WORDS))
    return path


@pytest.mark.parametrize("name", FILES)
def test_words_and_vectors_of_all_files(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    with open_checkpoint(path) as checkpoint:
        assert np.allclose(checkpoint.entries["vectors"].stored.read().numpy(), ROWS, rtol=1e-6)
        assert torch.equal(
            checkpoint.entries["vectors"].stored.read_rows(3, 9), checkpoint.entries["vectors"].stored.read()[3:9]
        )
    small = tmp_path / "small.safetensors"
    cqr.convert(path, small, method="pq", num_columns=6, n_bits=8)
    vectors = cqr.load_vectors(small)
    words = [w.replace(" ", "_") for w in WORDS] if name == "word2vec.bin" else WORDS
    assert vectors.words == words and len(vectors) == N and vectors.vector_size == D
    dense = cqr.load_dense_state_dict(small)["vectors"].numpy()
    assert np.allclose(vectors[words[5]], dense[5], atol=1e-6)
    assert np.allclose(vectors[words], dense, atol=1e-6)
    unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    order = [i for i in np.argsort(-(unit @ unit[7]), kind="stable") if i != 7]
    found = vectors.most_similar("w7", topn=5)
    assert [w for w, _ in found] == [words[i] for i in order[:5]]
    assert abs(found[0][1] - float(unit[order[0]] @ unit[7])) < 1e-5
    assert abs(vectors.similarity("w1", "w2") - float(unit[1] @ unit[2])) < 1e-5
    assert abs(vectors.n_similarity(["w1", "w3"], ["w1", "w3"]) - 1) < 1e-5
    assert [w for w, _ in vectors.most_similar(["w1", "w2"], ["w3"], topn=2 * N)][:1] != ["w1"]
    assert "w1" in vectors and "nothing" not in vectors and 3 not in vectors
    with pytest.raises(KeyError, match="'nothing' is not in the vocabulary"):
        vectors["nothing"]


OPTIONS: list[dict[str, Any]] = [
    {"method": "trellis", "ratio": 8, "max_tiers": 1},
    {"method": "trellis", "ratio": 8, "rotation": "pca", "exact_rows": (0, 5, 1400)},
    {"method": "trellis", "ratio": 5, "max_tiers": 4},
    {"method": "pq", "ratio": 6, "codebook_dtype": "int8", "rotation": "opq"},
    {"method": "rq", "ratio": 6},
    {"method": "prq", "ratio": 6, "codebook_dtype": "int8"},
    {"method": "int8"},
    {"method": "int4"},
    {"ratio": 6, "effort": "fast"},
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library without threads, as in a wheel; None without a compiler."""
    path = tmp_path_factory.mktemp("library") / "lookup-serial.so"
    try:
        compile_library(find_compiler(), ("-march=native",), path, 120)
    except NoCompilerError:
        return None
    return load_library(path)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_numpy_and_the_library_decode_all_layouts_as_torch_does(
    tmp_path: Path, options: dict[str, Any], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ROWS.copy()
    rows[17] = 0
    path, small = tmp_path / "v.txt", tmp_path / "small.safetensors"
    path.write_bytes(text(rows))
    cqr.convert(path, small, **options)
    dense = cqr.load_dense_state_dict(small)["vectors"].numpy()
    example = Path(cqr.__file__).parents[1] / "examples" / "read_with_numpy.py"
    if example.exists():
        run = [sys.executable, str(example), str(small), "-o", str(tmp_path / "dense.npz")]
        assert "vectors 1500 x 12" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert np.allclose(np.load(tmp_path / "dense.npz")["vectors"], dense, atol=1e-5)
        assert len(example.read_text().splitlines()) <= 150
    for each in (None, library):
        monkeypatch.setattr(compiled_rows, "_library", lambda: each)  # noqa: B023
        vectors = cqr.load_vectors(small)
        assert (vectors._table._compiled is None) == (each is None)
        assert np.allclose(np.concatenate([block for _, block in vectors.all_vectors()]), dense, atol=1e-5)
        assert np.allclose(vectors[["w17", "w3", "w1400"]], dense[[17, 3, 1400]], atol=1e-5)
        assert np.allclose([vectors[word] for word in WORDS[:260]], dense[:260], atol=1e-5)
        assert np.allclose(vectors[WORDS[-1]], dense[-1], atol=1e-5)
        first, kept = vectors["w3"], vectors["w3"].copy()
        vectors["w4"]
        assert np.array_equal(first, kept) and first.flags.writeable
        for wrong in (-1, N):
            with pytest.raises(IndexError):
                vectors._table.rows(np.array([3, wrong] if each else [3, N]))


def test_of_equal_words_the_first_has_the_vector(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("a 1 2 3 4\nb 5 6 7 8\na 9 9 9 9\n" * 700)
    cqr.convert(tmp_path / "v.txt", tmp_path / "small.safetensors", method="int8")
    vectors = cqr.load_vectors(tmp_path / "small.safetensors")
    assert np.allclose(vectors["a"], [1, 2, 3, 4], atol=0.1) and np.allclose(vectors["b"], [5, 6, 7, 8], atol=0.1)


@pytest.mark.parametrize("window", [4, 8, 10, 12])
def test_values_of_states_are_those_of_torch(window: int) -> None:
    assert np.array_equal(seeded_values(window, 3), torch_values(window, 3).numpy())


def test_words_of_fasttext_have_ngrams(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(fasttext())
    cqr.convert(tmp_path / "model.bin", tmp_path / "small.safetensors", method="int8")
    vectors = cqr.load_vectors(tmp_path / "small.safetensors")
    assert len(vectors) == N
    table = cqr.load_dense_state_dict(tmp_path / "small.safetensors")["vectors"].numpy()
    subwords = Subwords(N, BUCKETS, 3, 4)
    grams = subwords.rows_of("w12")  # <w1 w12 12> <w12 w12>
    assert len(grams) == 5 and grams[0] == N + fnv(b"<w1") % BUCKETS
    assert np.allclose(vectors["w12"], table[[12, *grams]].mean(0), atol=1e-5)
    assert np.allclose(vectors["日本"], table[[N - 2, *subwords.rows_of("日本")]].mean(0), atol=1e-5)
    assert np.allclose(vectors["unseen"], table[subwords.rows_of("unseen")].mean(0), atol=1e-5)
    assert "unseen" in vectors and "unseen" not in vectors.words and subwords.rows_of("</s>") == []
    assert vectors.most_similar("unseen", topn=1)[0][0] in WORDS


def fnv(content: bytes) -> int:
    value = 2166136261
    for byte in content:
        value = ((value ^ byte) * 16777619) % 2**32
    return value


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["vectors", "model"])
def test_files_of_gensim(tmp_path: Path, separate: bool, kind: str) -> None:
    models = pytest.importorskip("gensim.models")
    vectors = models.KeyedVectors(D)
    vectors.add_vectors(WORDS, ROWS)
    saved: Any = vectors
    if kind == "model":
        saved = models.Word2Vec(vector_size=D, min_count=1)
        saved.wv = vectors
    path = tmp_path / "v.kv"
    saved.save(str(path), sep_limit=100 if separate else 10**9)
    assert separate == bool(list(tmp_path.glob("*.npy")))
    with open_checkpoint(path) as checkpoint:
        assert np.allclose(checkpoint.entries["vectors"].stored.read().numpy(), ROWS)
    cqr.convert(path, tmp_path / "small.safetensors", method="int8")
    ours = cqr.load_vectors(tmp_path / "small.safetensors")
    assert ours.words == WORDS
    found, wanted = ours.most_similar("w1", topn=3), vectors.most_similar("w1", topn=3)
    assert [w for w, _ in found] == [w for w, _ in wanted]
    cqr.export(tmp_path / "small.safetensors", tmp_path / "out.bin")
    again = models.KeyedVectors.load_word2vec_format(str(tmp_path / "out.bin"), binary=True)
    assert np.allclose(again["w7"], ours["w7"], atol=1e-6)
    for file in tmp_path.glob("*.npy"):
        file.unlink()
        with pytest.raises(CheckpointError, match="has no vectors, and there is no"):
            open_checkpoint(path)


def test_a_pickle_that_names_gensim_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "v.kv").write_bytes(
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(str(tmp_path)) + 8]) + f"touch {tmp_path}/x".encode()
        + b"\x85R\x8c\x0dgensim.models."[:5] + b"gensim.models\x94."
    )  # fmt: skip
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "v.kv")
    assert not (tmp_path / "x").exists()


def test_only_numpy_and_safetensors_are_imported(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(text())
    cqr.convert(tmp_path / "v.txt", tmp_path / "small.safetensors", ratio=6, method="trellis")
    code = (
        "import sys, cqr_compress as cqr; v = cqr.load_vectors('small.safetensors'); v.most_similar('w1')\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'faiss', 'rich', 'typer', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("suffix", [".txt", ".vec", ".bin", ".npy"])
def test_vectors_are_exported_and_read_again(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "v.txt").write_bytes(text())
    small, out = tmp_path / "small.safetensors", tmp_path / f"out{suffix}"
    cqr.convert(tmp_path / "v.txt", small, method="int8")
    assert cqr.export(small, out) == out.stat().st_size
    dense = cqr.load_dense_state_dict(small)["vectors"]
    with open_checkpoint(out) as checkpoint:
        assert torch.allclose(checkpoint.entries["vectors"].stored.read(), dense, rtol=1e-5, atol=1e-6)
        assert json.loads(checkpoint.metadata["word_vectors"])["words"] == N
    cqr.convert(out, tmp_path / "again.safetensors", method="int8")
    again = cqr.load_vectors(tmp_path / "again.safetensors")
    assert again.words[:-1] == WORDS[:-1] and again.words[-1].replace("_", " ") == "New York"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", f"{N} {D}\n".encode() + text()[: len(text()) // 2], "truncated|no word with"),
        ("a.txt", f"{N + 5} {D}\n".encode() + text(), "it is truncated"),
        ("a.txt", f"{N - 5} {D}\n".encode() + text(), "no word with 12 numbers"),
        ("a.txt", f"{10**9} 300\n".encode() + text(), "truncated"),
        ("a.txt", text() + b"word 1 2 3\n", f"line {N + 1}.*no word with 12 numbers"),
        ("a.txt", text() + b"word " + b"1 " * 11 + b"x\n", "no word with 12 numbers"),
        ("a.bin", binary()[:-30], "truncated"),
        ("a.bin", f"{10**9} {D}\n".encode() + binary(), "truncated"),
        ("a.bin", f"3 {D}\n".encode() + b"x" * 100_000, "ends within a word, or is damaged"),
        ("a.bin", fasttext()[:-10_000], "truncated|damaged"),
        ("a.bin", fasttext()[:60], "truncated"),
        ("a.bin", fasttext()[:4] + b"\x0b" + fasttext()[5:], "version 11"),
        ("a.npy", b"\x93NUMPY\x01\0\x10\0garbage", "no array of numpy"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=wanted):
        open_checkpoint(tmp_path / name)


def test_arrays_with_objects_and_other_shapes_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros(3), np.zeros((3, 4), np.int64), np.array([[{}]], dtype=object)):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(CheckpointError, match="no array of numpy|not rows of floating-point numbers"):
            open_checkpoint(tmp_path / "a.npy")


def test_other_files_have_no_word_vectors(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.randn(2000, 8)}, tmp_path / "a.pt")
    cqr.convert(tmp_path / "a.pt", tmp_path / "a.safetensors", method="int8")
    for path in ("a.safetensors", "a.pt"):
        with pytest.raises(FormatError, match="no (readable )?word vectors"):
            cqr.load_vectors(tmp_path / path)


def spec_and_tensors(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file has of its table of vectors."""
    with safe_open(path, "np") as file:
        spec = json.loads(file.metadata()["cqr_compress"])["tables"]["vectors"]["spec"]
        names = [name for name in list(file.keys()) if name.startswith("vectors.")]
        return spec, {name.removeprefix("vectors."): file.get_tensor(name) for name in names}


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({"method": "trellis", "ratio": 5, "max_tiers": 1}, ("rotation", "row_gain", "state_values", "row_tiers")),
        ({"method": "pq", "ratio": 6}, ("rotation", "codebook_scale", "kept_rows")),
    ],
)
def test_the_library_gets_checked_tensors_only(
    tmp_path: Path, options: dict[str, Any], added: tuple[str, ...], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "_library", lambda: library)
    (tmp_path / "v.txt").write_bytes(text())
    cqr.convert(tmp_path / "v.txt", tmp_path / "s.safetensors", **options)
    spec, tensors = spec_and_tensors(tmp_path / "s.safetensors")
    wanted = TableReader(spec, tensors).rows(np.arange(N))
    more = {name: np.ones((2, 2), np.uint8) for name in added if name not in tensors}
    assert more
    assert np.array_equal(TableReader(spec, {**tensors, **more}).rows(np.arange(N)), wanted)
    if spec["rotation"] is None:
        with pytest.raises(FormatError, match="rank has no rotation"):
            TableReader({**spec, "rank": D - 4}, tensors)


def test_starts_of_other_integers_are_read_by_numpy(
    tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "_library", lambda: library)
    (tmp_path / "v.txt").write_bytes(text())
    cqr.convert(tmp_path / "v.txt", tmp_path / "s.safetensors", method="trellis", ratio=5, max_tiers=4)
    spec, tensors = spec_and_tensors(tmp_path / "s.safetensors")
    assert len(spec["tier_nbytes"]) > 1
    short = TableReader(spec, {**tensors, "tier_starts": tensors["tier_starts"].astype(np.uint16)})
    assert short._compiled is None
    assert np.allclose(short.rows(np.arange(N)), TableReader(spec, tensors).rows(np.arange(N)), atol=1e-5)


def test_codes_that_torch_computes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="decoded by torch"):
        TableReader(
            {
                "kind": "codebook",
                "method": "hash",
                "num_embeddings": 3,
                "embedding_dim": 2,
                "code_sources": ["hashed"],
            },
            {},
        )


def npy(header: bytes, body: bytes = bytes(48)) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr':'<f4','fortran_order':False,'shape':(-3,-4)}\n",
        b"{'descr':'<f4','fortran_order':False,'shape':(True,12)}\n",
        b"{'descr':'<f4','fortran_order':False,'shape':(((3,4)\n",
        b"{1:2,'a':3}\n",
        b"{[]:1}\n",
        b"-" * 9000 + b"1\n",
    ],
)
def test_hostile_headers_of_arrays_are_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header))
    with pytest.raises(CheckpointError, match="no array of numpy|not rows of floating-point numbers"):
        open_checkpoint(tmp_path / "a.npy")


def read(path: Path) -> tuple[list[str], list[list[float]]]:
    with open_checkpoint(path) as checkpoint:
        text = zlib.decompress(checkpoint.entries["vocabulary"].stored.read().numpy().tobytes()).decode()
        return text.split("\n")[:-1], checkpoint.entries["vectors"].stored.read().tolist()


@pytest.mark.parametrize(
    "content",
    [b"a 1 2 3\nb 4 5 6\n\n \n", b"\xef\xbb\xbfa 1 2 3\nb 4 5 6", b"a 1 2 3\nb 4 5 " + b"6." + b"0" * 60 + b"e0"],
    ids=["blank lines", "byte order mark", "long numbers"],
)
def test_odd_lines_of_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt") == (["a", "b"], [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "a.txt").write_bytes(b"a 1 2 1." + b"0" * 60 + b"e-5\n")
    assert read(tmp_path / "a.txt")[1] == [[1, 2, np.float32(1e-5)]]


def test_words_of_an_array_are_a_list_of_words(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read(tmp_path / "a.npy")[0] == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(b"one 1 1 1\ntwo 1 1 1\n")  # text of the same vectors
    assert read(tmp_path / "a.npy")[0] == ["0", "1"]
    (tmp_path / "a.txt").unlink()
    (tmp_path.parent / f"{tmp_path.name}.secret").write_text("key\nof others\n")
    (tmp_path / "a.txt").symlink_to(tmp_path.parent / f"{tmp_path.name}.secret")
    assert read(tmp_path / "a.npy")[0] == ["0", "1"]


class KeyedVectors:
    """A class that is pickled as one of gensim."""

    __module__, __qualname__ = "gensim.models.keyedvectors", "KeyedVectors"

    def __init__(self, words: list[str], vectors: Any) -> None:
        self.index_to_key, self.vectors = words, vectors


@pytest.fixture
def gensim_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("gensim.models.keyedvectors")
    module.KeyedVectors = KeyedVectors
    for name in ("gensim", "gensim.models", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)

    def save(words: list[str], vectors: Any) -> Path:
        (tmp_path / "v.kv").write_bytes(pickle.dumps(KeyedVectors(words, vectors), 4))
        return tmp_path / "v.kv"

    return save


def test_arrays_in_pickles_of_gensim(tmp_path: Path, gensim_pickle: Any) -> None:
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    for dtype in ("<f2", ">f2", "<f4", ">f4", ">f8"):
        assert read(gensim_pickle(["a", "b\ud800"], rows.astype(dtype))) == (["a", "b?"], rows.tolist())
    damaged = gensim_pickle(["a", "b"], rows.astype("<f4"))
    content = rows.astype("<f4").tobytes()
    assert damaged.read_bytes().count(content) == 1
    damaged.write_bytes(damaged.read_bytes().replace(b"C\x18" + content, b"C\x17" + content[:-1]))
    with pytest.raises(CheckpointError):
        open_checkpoint(damaged)
    path = gensim_pickle(["a", "b"], None)
    outside = tmp_path.parent / f"{tmp_path.name}.npy"
    np.save(outside, rows.astype("<f4"))
    (tmp_path / "v.kv.vectors.npy").symlink_to(outside)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        open_checkpoint(path)


def test_ngrams_of_any_length_end(tmp_path: Path) -> None:
    assert Subwords(10, 7, 0, 2).rows_of("a") == Subwords(10, 7, 1, 2).rows_of("a")
    assert len(Subwords(10, 7, -5, 2**60).rows_of("abc")) == 13


ODD = [None, 0, -1, 1, 2**31, 2**62, 10**30, "x", [], {}, [1], ["stored"], True, 1.5, "trellis"]


@pytest.mark.parametrize("options", [OPTIONS[i] for i in (1, 2, 3, 7)], ids=lambda o: o["method"])
def test_damaged_tables_are_refused_by_numpy(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "v.txt").write_bytes(text())
    small, damaged = tmp_path / "small.safetensors", tmp_path / "damaged.safetensors"
    cqr.convert(tmp_path / "v.txt", small, **options)
    with safe_open(str(small), "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def attempt(metadata: dict[str, str], tensors: dict[str, Any]) -> None:
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, damaged, metadata)
        with contextlib.suppress(FormatError):
            vectors = cqr.load_vectors(damaged)
            assert vectors[["w0", "w5", "w1400"]].shape == (3, D) and vectors.most_similar("w1")
            assert "unseen" not in vectors

    header = json.loads(metadata["cqr_compress"])
    spec = header["tables"]["vectors"]["spec"]
    for name, value in itertools.product(spec, ODD):
        header["tables"]["vectors"]["spec"] = {**spec, name: value}
        attempt({**metadata, "cqr_compress": json.dumps(header)}, tensors)
        header["tables"]["vectors"]["spec"] = {k: v for k, v in spec.items() if k != name}
    attempt({**metadata, "cqr_compress": json.dumps(header)}, tensors)
    for value in (*ODD, {"words": N, "buckets": 5, "minn": 1, "maxn": 3}, {"words": N, "buckets": "x"}):
        attempt({**metadata, "word_vectors": json.dumps(value)}, tensors)
        attempt({**metadata, "cqr_compress": json.dumps(value)}, tensors)
    with pytest.raises(FormatError):
        attempt({**metadata, "cqr_compress": "[" * 100_000}, tensors)
        cqr.load_vectors(damaged)
    for name in [name for name in tensors if name.startswith("vectors.")]:
        values = tensors[name]
        attempt(metadata, {k: v for k, v in tensors.items() if k != name})
        for other in (values[:1], values[None], values.astype(np.int64), np.full_like(values, 120), values[::-1]):
            attempt(metadata, {**tensors, name: other})
    for words in (b"a\n", b"a\n" * (N + 1), b"", b"\xff\n" * N, bytes(2**25)):
        packed = np.frombuffer(zlib.compress(words, 9), np.uint8)
        save_file({**tensors, "vocabulary": packed}, damaged, metadata)
        with pytest.raises(FormatError):
            cqr.load_vectors(damaged)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FormatError, match="no readable word vectors"):
            cqr.load_vectors(path)


def test_lists_of_no_words_and_single_words(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(text())
    cqr.convert(tmp_path / "v.txt", tmp_path / "small.safetensors", method="int8")
    vectors = cqr.load_vectors(tmp_path / "small.safetensors")
    assert vectors.most_similar("w1", "w2", topn=3) == vectors.most_similar(["w1"], ["w2"], topn=3)
    for action in (
        lambda: vectors[[]],
        lambda: vectors.most_similar([]),
        lambda: vectors.n_similarity([], ["w1"]),
    ):
        with pytest.raises(KeyError, match="at least one word"):
            action()
