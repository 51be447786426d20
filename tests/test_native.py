"""The compiled lookup gives what torch gives, for every layout, and its absence changes nothing but the time."""

import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from warm_process import WarmPython

from cqr_compress import CompressedEmbedding, CompressedTable
from cqr_compress.errors import CqrCompressWarning, ShapeError
from cqr_compress.kernel import build, ops, wheel_hook
from cqr_compress.kernel import library as libraries
from cqr_compress.kernel.build import native
from cqr_compress.kernel.cache import cached_library
from cqr_compress.kernel.compile import (
    SOURCES,
    THREADS,
    compile_library,
    installed_name,
    level_flags,
    levels,
)
from cqr_compress.table.codes import computed_codes
from cqr_compress.table.spec import DIGIT, HASHED, QUOTIENT, REMAINDER, STORED, CodebookSpec, RowwiseSpec

needs_library = pytest.mark.skipif(not ops.available(), reason=f"no compiled lookup: {native().reason}")

SMALL = CodebookSpec(
    method="test", num_embeddings=50, embedding_dim=8, num_columns=2, num_levels=1, codebook_size=256,
    code_sources=(STORED,),
)  # fmt: skip


def random_table(spec: Any, seed: int) -> CompressedTable:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for short, shape in spec.tensor_shapes().items():
        if shape.dtype == torch.uint8:
            tensors[short] = torch.randint(256, shape.shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[short] = torch.randn(shape.shape, generator=generator).to(shape.dtype)
    return CompressedTable(spec, tensors)


def rows_and_gradients(table: CompressedTable, ids: torch.Tensor) -> list[torch.Tensor]:
    layer = CompressedEmbedding(table)
    with torch.no_grad():
        alone = layer(ids)
    rows = layer(ids)
    assert torch.equal(rows, alone)
    rows.backward(torch.linspace(-1, 1, rows.numel()).view_as(rows))
    return [rows.detach(), *(p.grad.float() for p in layer.parameters() if p.grad is not None)]


def assert_same(table: CompressedTable, ids: torch.Tensor) -> None:
    """Compare the compiled lookup with torch's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "available", lambda: False)
        expected = rows_and_gradients(table, ids)
    found = rows_and_gradients(table, ids)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(
            a, b, rtol=2e-3 if a is not found[0] else 1e-5, atol=1e-3 if a is not found[0] else 1e-5
        )


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    n_bits=st.integers(1, 16), columns=st.integers(1, 5), levels=st.sampled_from([1, 2, 3, 8, 64, 65, 130]),
    sub_dim=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 19, 20, 64, 85]), dtype=st.sampled_from(["float16", "float32"]),
    size=st.sampled_from([0, 1, 7, 300, 1100]), index=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 9),
)  # fmt: skip
def test_codebook_lookups_agree_with_torch(
    n_bits: int, columns: int, levels: int, sub_dim: int, dtype: str, size: int, index: torch.dtype, seed: int
) -> None:
    if levels > 8 and n_bits > 6:
        n_bits = 6  # keep codebooks small
    spec = CodebookSpec(
        method="test", num_embeddings=50, embedding_dim=columns * sub_dim, num_columns=columns, num_levels=levels,
        codebook_size=2**n_bits, code_sources=(STORED,) * levels, codebook_dtype=dtype,
    )  # fmt: skip
    assert_same(
        random_table(spec, seed),
        torch.randint(50, (size,), generator=torch.Generator().manual_seed(seed)).to(index),
    )


@needs_library
@pytest.mark.parametrize("size", [2, 64, 1024])
@pytest.mark.parametrize(
    "sources",
    [(HASHED,), (STORED, HASHED), (HASHED, STORED, STORED), (QUOTIENT, REMAINDER), (DIGIT,), (STORED, DIGIT)],
    ids="+".join,
)
def test_lookups_of_computed_codes_agree_with_torch(sources: tuple[str, ...], size: int) -> None:
    N = min(5000, size**2)
    spec = CodebookSpec(
        method="test", num_embeddings=N, embedding_dim=6, num_columns=2, num_levels=len(sources),
        codebook_size=size, code_sources=sources, seed=9,
    )  # fmt: skip
    table = random_table(spec, 0)
    for ids in (torch.arange(N), torch.randint(N, (3000,)).int(), torch.empty(0, dtype=torch.int64)):
        assert_same(table, ids)
    for bad in (-1, N):
        with pytest.raises(IndexError, match=f"id {bad} is outside the table of {N} rows"):
            CompressedEmbedding(table)(torch.tensor([0, bad]))


@needs_library
def test_hashes_of_large_ids_agree_with_torch() -> None:
    spec = CodebookSpec(
        method="test", num_embeddings=2**45, embedding_dim=4, num_columns=4, num_levels=2, codebook_size=1000,
        code_sources=(HASHED, HASHED), seed=3,
    )  # fmt: skip
    ids = torch.randint(2**45, (1000,))
    found = ops.all_codes(spec, ids, None)
    assert found is not None and torch.equal(found.view(-1, 4, 2).long(), computed_codes(spec, ids))


@needs_library
@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize("dim", [1, 7, 64, 65])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rowwise_lookups_agree_with_torch(n_bits: int, dim: int, dtype: str) -> None:
    spec = RowwiseSpec(method="int", num_embeddings=90, embedding_dim=dim, n_bits=n_bits, scale_dtype=dtype)
    for size in (0, 1, 90, 1000):
        assert_same(random_table(spec, 0), torch.randint(90, (size,)))


@needs_library
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    spec = CodebookSpec(
        method="test", num_embeddings=500, embedding_dim=24, num_columns=3, num_levels=2, codebook_size=32,
        code_sources=(STORED,) * 2,
    )  # fmt: skip
    table, ids = random_table(spec, 0), torch.randint(500, (5000,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(rows_and_gradients(table, ids))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_views_and_odd_strides_are_read_right() -> None:
    table = random_table(SMALL, 0)
    layer, ids = CompressedEmbedding(table), torch.randint(50, (20, 10))
    rows = table.decode()
    for view in (ids.t(), ids[:, ::3], ids[3:].T[1], torch.tensor(5).expand(4)):
        assert torch.allclose(layer(view), rows[view], atol=1e-6)
    layer.codes = layer.codes.t().contiguous().t()
    assert torch.allclose(layer(ids), rows[ids], atol=1e-6)
    layer(ids).sum().backward()  # the gradient is an expanded scalar
    assert layer.codebooks.grad.sum() == pytest.approx(200 * 8, rel=1e-2)


@needs_library
def test_tensors_that_no_longer_fit_are_refused_and_not_read_beyond() -> None:
    for change in (
        {"codes": torch.zeros(49, 2, dtype=torch.uint8)}, {"codes": torch.zeros(50, 1, dtype=torch.uint8)},
        {"codes": torch.zeros(50, 2, dtype=torch.int8)}, {"codebooks": torch.zeros(2, 1, 255, 4)},
        {"codebooks": torch.zeros(3, 1, 256, 4)},
    ):  # fmt: skip
        layer = CompressedEmbedding(random_table(SMALL, 0)).requires_grad_(False)
        for short, tensor in change.items():
            getattr(layer, short).data = tensor
        with pytest.raises(ShapeError, match="do not form a table of 50 rows with codes of 8 bits"):
            layer(torch.tensor([49]))
    rowwise = RowwiseSpec(method="int8", num_embeddings=50, embedding_dim=8, n_bits=8)
    for short, tensor in {
        "codes": torch.zeros(50, 7, dtype=torch.uint8),
        "row_scale": torch.ones(9).half(),
    }.items():
        layer = CompressedEmbedding(random_table(rowwise, 0)).requires_grad_(False)
        getattr(layer, short).data = tensor
        with pytest.raises(ShapeError, match="do not form a table of 50 x 8"):
            layer(torch.tensor([49]))


RACE = """
import sys, threading, torch
sys.path.insert(0, {tests!r})
from test_native import random_table
from cqr_compress import CompressedEmbedding
from cqr_compress.table.spec import DIGIT, HASHED, STORED, CodebookSpec, RowwiseSpec
N = 1000
shape = dict(method="test", num_embeddings=N, embedding_dim=8)
layers = [CompressedEmbedding(random_table(RowwiseSpec(**shape, n_bits=8), 0)).requires_grad_(False)]
for sources in ((STORED,), (STORED, HASHED), (STORED, DIGIT), (HASHED, DIGIT)):
    spec = CodebookSpec(**shape, num_columns=2, num_levels=len(sources), codebook_size=64, code_sources=sources)
    layers.append(CompressedEmbedding(random_table(spec, 0)))
ids = torch.zeros(20_000, dtype=torch.int64)
raw, done = ids.numpy(), False
def change():
    while not done:
        raw[-1] = 2**40
        raw[-1] = 0
sys.setswitchinterval(1e-4)
thread = threading.Thread(target=change)
thread.start()
try:
    for _ in range({rounds}):
        for layer in layers:
            try:
                rows = layer(ids)
                if rows.requires_grad:
                    rows.sum().backward()
            except IndexError:
                pass
finally:
    done = True
    thread.join()
"""


@pytest.mark.parametrize(("native", "rounds"), [("1", 20), ("0", 5)])
def test_ids_that_another_thread_changes_are_not_read_beyond_the_table(
    native: str, rounds: int, python: WarmPython
) -> None:
    """As in nn.Embedding: an IndexError or rows, and no segmentation fault."""
    script = RACE.format(tests=str(Path(__file__).parent), rounds=rounds)
    env = {**os.environ, "CQR_COMPRESS_NATIVE": native, "OMP_NUM_THREADS": "1"}
    done = python("-c", script, env=env)
    assert done.returncode == 0, done.stderr


@needs_library
def test_ids_changed_between_forward_and_backward_are_refused() -> None:
    layer, ids = CompressedEmbedding(random_table(SMALL, 0)), torch.arange(50)
    rows = layer(ids)
    ids.numpy()[7] = 2**40
    with pytest.raises(IndexError, match="position 7 of the ids is outside the table of 50 rows"):
        rows.sum().backward()


def lookup_in_worker(layer: CompressedEmbedding) -> list[torch.Tensor]:
    class Rows(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> torch.Tensor:
            with torch.no_grad():
                return layer(torch.full((700,), i))

    return list(torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, timeout=60))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_look_rows_up() -> None:
    layer = CompressedEmbedding(random_table(SMALL, 0)).requires_grad_(False)
    layer(torch.zeros(5000, dtype=torch.int64))  # threads of this process are awake
    batches = torch.cat(lookup_in_worker(layer))
    assert torch.equal(batches[:, 0], layer(torch.arange(4)))


SCRIPT = """
import torch
from cqr_compress import CompressedEmbedding, CompressedTable
from cqr_compress.kernel.build import native
from cqr_compress.table.spec import RowwiseSpec
spec = RowwiseSpec(method="int8", num_embeddings=3, embedding_dim=2, n_bits=8)
table = CompressedTable(spec, {"codes": torch.tensor([[1, 2], [3, 4], [5, 6]]).byte(),
                               "row_scale": torch.ones(3).half(), "row_offset": torch.zeros(3).half()})
print(CompressedEmbedding(table)(torch.tensor([2, 0])).tolist(), native().reason)
"""


class Ran(NamedTuple):
    reason: str
    notes: str
    libraries: list[Path]


def run(python: WarmPython, tmp_path: Path, *, without: tuple[str, ...] = (), **environment: str) -> Ran:
    """Look rows up in a process with an own cache and temporary folder; nothing is left in the latter."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(temporary)}
    env = {name: value for name, value in env.items() if name not in ("CQR_COMPRESS_CACHE", *without)}
    quick = fake_compiler(tmp_path, 'exec cc "$@" -O0', "quick-cc")
    env |= {"CQR_COMPRESS_NATIVE": "1", "CC": quick, **environment}
    done = python("-c", SCRIPT, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[5.0, 6.0], [1.0, 2.0]] ") and not list(temporary.iterdir())
    return Ran(done.stdout.split("]] ")[1].strip(), done.stderr, sorted((tmp_path / "cache").rglob("*.so")))


def fake_compiler(tmp_path: Path, script: str, name: str = "fake-cc") -> str:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_lookups_work_where_nothing_can_be_compiled(tmp_path: Path, python: WarmPython) -> None:
    off = run(python, tmp_path, CQR_COMPRESS_NATIVE="0")
    assert off == ("disabled by CQR_COMPRESS_NATIVE=0", "", [])
    bare = run(python, tmp_path, PATH=str(tmp_path), CC="nothing")
    assert bare == ("no C compiler: none of 'nothing', gcc and clang found", "", [])
    assert "the environment variable CC is no command" in run(python, tmp_path, CC="gcc 'x").reason
    failing = run(python, tmp_path, CC=fake_compiler(tmp_path, "echo out of order >&2; exit 3"))
    assert failing.reason.endswith("fake-cc failed with code 3 out of order") and not failing.libraries
    assert "lookups on the CPU run in torch, slower: " in failing.notes


@needs_library
def test_a_library_is_compiled_once_into_a_private_folder_and_then_needs_no_compiler(
    tmp_path: Path, python: WarmPython
) -> None:
    first, again = run(python, tmp_path), run(python, tmp_path, PATH=str(tmp_path), CC="nothing")
    assert first == again == (str(first.libraries[0]), "", first.libraries)
    folder = first.libraries[0].parent
    assert folder == tmp_path / "cache" / "cqr-compress" and list(folder.iterdir()) == first.libraries
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *first.libraries)] == [0o700, 0o700]


@needs_library
def test_processes_that_start_together_compile_once(tmp_path: Path, python: WarmPython) -> None:
    log = tmp_path / "log"
    compiler = fake_compiler(tmp_path, f"echo $@ >> {log}; exec cc $@ -O0")
    with ThreadPoolExecutor() as pool:
        reasons = {ran.reason for ran in pool.map(lambda _: run(python, tmp_path, CC=compiler), range(2))}
    assert len(reasons) == 1 and len(log.read_text().splitlines()) == len(SOURCES) + 1  # and the link


@pytest.mark.parametrize("damage", ["truncated", "other bytes", "writable", "link", "foreign"])
def test_a_cached_library_that_is_damaged_or_foreign_is_removed_and_built_again(
    tmp_path: Path, damage: str
) -> None:
    notes: list[str] = []

    def compiled(path: Path) -> None:
        path.write_bytes(b"library")

    def library() -> Path:
        return cached_library(tmp_path, "key", compiled, notes.append)

    good = library()
    assert library() == good and not notes
    if damage == "truncated":
        good.write_bytes(b"lib")
    elif damage == "other bytes":
        good.write_bytes(b"Library")
    elif damage == "writable":
        good.chmod(0o666)
    elif damage == "link":
        good.rename(tmp_path / "elsewhere.so")
        good.symlink_to(tmp_path / "elsewhere.so")
    elif os.geteuid() == 0:
        os.chown(good, 54321, -1)
    else:
        pytest.skip("needs root to make a file of another user")
    problem = {"truncated": "is damaged", "other bytes": "is damaged", "link": "cannot be read"}.get(
        damage, "can be written to by others"
    )
    assert library() == good and good.read_bytes() == b"library"
    assert len(notes) == 1 and notes[0].startswith(f"{good} {problem}") and notes[0].endswith(": it is removed")
    assert stat.S_IMODE(good.lstat().st_mode) == 0o700 and library() == good and len(notes) == 1


@needs_library
def test_a_truncated_library_in_the_cache_does_not_crash_the_next_program(
    tmp_path: Path, python: WarmPython
) -> None:
    good = run(python, tmp_path).libraries[0]
    os.truncate(good, 8000)
    ran = run(python, tmp_path)
    assert ran.libraries == [good] == [Path(ran.reason)] and "is damaged: it is removed" in ran.notes


@needs_library
def test_a_folder_that_others_can_write_to_is_not_trusted_and_nothing_is_left_elsewhere(
    tmp_path: Path, python: WarmPython
) -> None:
    folder = tmp_path / "cache" / "cqr-compress"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    ran = run(python, tmp_path)
    assert Path(ran.reason).suffix == ".so" and folder not in Path(ran.reason).parents and not ran.libraries
    assert f"others can write to the cache folder {folder}: each program compiles its lookups again" in ran.notes
    own = tmp_path / "own"
    assert Path(run(python, tmp_path, CQR_COMPRESS_CACHE=str(own)).reason).parent == own


@needs_library
def test_a_process_without_a_cache_shares_its_library_with_those_that_it_starts(
    tmp_path: Path, python: WarmPython
) -> None:
    script = """
import os, subprocess, sys
from cqr_compress.kernel.build import native
code = "from cqr_compress.kernel.build import native; print(native().reason)"
found = native().reason
child = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "CC": "x", "PATH": ""})
assert found.endswith(".so") and child.stdout.decode().strip() == found, child
"""
    (tmp_path / "file").touch()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    env["CC"] = fake_compiler(tmp_path, 'exec cc "$@" -O0')
    done = python("-c", script, env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake-cc", "file"]


@needs_library
def test_a_relative_cache_folder_is_ignored_and_a_home_folder_is_not_needed(
    tmp_path: Path, python: WarmPython
) -> None:
    relative = run(python, tmp_path, XDG_CACHE_HOME="cache", HOME=str(tmp_path / "home"))
    assert Path(relative.reason).parent == tmp_path / "home" / ".cache" / "cqr-compress"
    assert not (tmp_path / "cache").exists()
    homeless = run(python, tmp_path, XDG_CACHE_HOME="", HOME="relative")
    assert "there is no home folder for a cache" in homeless.notes and homeless.reason.endswith(".so")


@needs_library
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to change the user id")
def test_a_user_without_a_name_and_a_home_folder_looks_rows_up(tmp_path: Path, python: WarmPython) -> None:
    script = f"""
import os, sys, torch
sys.path[:] = {sys.path!r}
os.environ.pop("HOME", None); os.environ.pop("XDG_CACHE_HOME", None); os.environ["TMPDIR"] = {str(tmp_path)!r}
os.environ["CC"] = "sh -c 'exec cc \\"$@\\" -O0' cc"
from cqr_compress.kernel import build
os.setuid(54321)
print(build.native().reason)
"""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    tmp_path.chmod(0o777)
    done = python("-c", script, cwd=Path("/"))
    assert done.returncode == 0 and done.stdout.strip().endswith(".so"), done
    assert "there is no home folder for a cache" in done.stderr and not list(tmp_path.iterdir())


def test_a_compiler_that_hangs_is_given_up_and_not_tried_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_SECONDS", 0.3)
    monkeypatch.setenv("CQR_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", fake_compiler(tmp_path, "echo >> tries; sleep 60; true"))
    monkeypatch.chdir(tmp_path)
    for message in ("fake-cc did not finish in time", "tried again later, or without .*timeout"):
        start = time.monotonic()
        with pytest.warns(CqrCompressWarning, match=f"lookups on the CPU run in torch, slower: .*{message}"):
            assert build._compiled().library is None
        assert time.monotonic() - start < 5
    assert (tmp_path / "tries").read_text() == "\n" * len(SOURCES)
    (stamp,) = (tmp_path / "cache").glob("*.timeout")
    os.utime(stamp, (0, 0))
    with pytest.warns(CqrCompressWarning, match="fake-cc did not finish in time"):
        build._compiled()
    assert (tmp_path / "tries").read_text() == "\n" * 2 * len(SOURCES)


@needs_library
def test_the_libraries_of_a_wheel_agree_with_torch_at_each_level_of_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is not looked up here, and what is the same code without threads, needs no optimizing
    quick = 'case "$*" in *-fopenmp*lookup.c*) exec cc "$@";; esac; exec cc "$@" -O0'
    monkeypatch.setenv("CC", fake_compiler(tmp_path, quick))
    warnings: list[str] = []
    built = wheel_hook._compiled(tmp_path, warnings.append)
    assert len(built) + len(warnings) == len(THREADS) * len(levels())
    monkeypatch.setattr(libraries, "HEADER", tmp_path / "kernel.h")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = list(libraries.installed_libraries(THREADS))
    assert {path.name for path in found} <= {path.name for path in built}
    assert [path.stem.endswith("-serial") for path in found] == sorted(
        path.stem.endswith("-serial") for path in found
    )
    layers = [replace(SMALL, codebook_dtype=dtype, embedding_dim=72) for dtype in ("float16", "float32")]
    rowwise = RowwiseSpec(method="int8", num_embeddings=50, embedding_dim=33, n_bits=8)
    for path in found:
        library = build._loaded(path).library
        monkeypatch.setattr(ops, "library", lambda library=library: library)
        ops.has_half.cache_clear()
        for spec in (*layers, rowwise):
            assert_same(random_table(spec, 0), torch.randint(50, (1100,)))
    monkeypatch.undo()
    ops.has_half.cache_clear()


def test_a_wheel_without_a_compiler_has_no_library_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    warnings: list[str] = []
    assert wheel_hook._compiled(tmp_path, warnings.append) == []
    assert warnings == ["the wheel has no compiled lookups: no C compiler: none of 'cc', gcc and clang found"]


@needs_library
def test_the_library_of_a_wheel_is_used_without_a_compiler_and_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = list(levels())[-1]
    output = tmp_path / installed_name(level, "")
    compiler = [fake_compiler(tmp_path, 'exec cc "$@" -O0')]
    compile_library(compiler, (*level_flags(level), *THREADS[""]), output, 60)
    monkeypatch.setattr(libraries, "HEADER", tmp_path / "kernel.h")
    monkeypatch.setenv("PATH", "")
    assert native.__wrapped__().reason == str(output)


@needs_library
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 600), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**16))
def test_nearest_centroids_are_those_of_a_matrix_product(n: int, K: int, S: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, centroids = torch.randn(n, S, generator=generator), torch.randn(K, S, generator=generator)
    codes = ops.nearest(rows, centroids).long()
    distances = torch.cdist(rows.double(), centroids.double()).square()
    assert codes.shape == (n,) and bool((codes < K).all())
    found = distances.gather(1, codes[:, None])[:, 0]
    assert torch.allclose(found, distances.min(1).values, atol=1e-5) if n else True


@needs_library
def test_the_first_of_equal_centroids_is_taken_whatever_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(20, 4, generator=generator).repeat(3, 1)
    rows = centroids[torch.randint(60, (5000,), generator=generator)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.nearest(rows, centroids)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.nearest(rows, centroids)) and int(one.max()) < 20
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[:7], ops.nearest(rows[:7].contiguous(), centroids))


@needs_library
def test_rows_of_another_dtype_or_dimension_are_refused_and_not_read() -> None:
    rows = torch.randn(40, 4)
    for wrong in (rows.double(), rows.T.contiguous().T, rows[:, :3].contiguous()):
        with pytest.raises(ShapeError, match="are not contiguous float32 of equal dimensions"):
            ops.nearest(wrong, torch.randn(8, 4))
