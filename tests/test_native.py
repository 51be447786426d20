"""The compiled lookup gives what torch gives, for every layout, and its absence changes nothing but the time."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cqr_compress import CompressedEmbedding, CompressedTable
from cqr_compress.errors import ShapeError
from cqr_compress.kernel import ops
from cqr_compress.kernel.build import native
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


@pytest.mark.parametrize(("native", "rounds"), [("1", 30), ("0", 5)])
def test_ids_that_another_thread_changes_are_not_read_beyond_the_table(native: str, rounds: int) -> None:
    """As in nn.Embedding: an IndexError or rows, and no segmentation fault."""
    script = RACE.format(tests=str(Path(__file__).parent), rounds=rounds)
    env = {**os.environ, "CQR_COMPRESS_NATIVE": native}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
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


def run(tmp_path: Path, **environment: str) -> str:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    env |= {"CQR_COMPRESS_NATIVE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[[5.0, 6.0], [1.0, 2.0]] ") and done.stderr == ""
    return done.stdout.split("]] ")[1].strip()


def test_lookups_work_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    assert run(tmp_path, CQR_COMPRESS_NATIVE="0") == "disabled by CQR_COMPRESS_NATIVE=0"
    bare = run(tmp_path, PATH=str(tmp_path), CC="nothing")
    assert bare == "no C compiler: none of 'nothing', gcc and clang found"
    assert "false failed" in run(tmp_path, CC="false")
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_library
def test_the_library_is_built_once_into_a_private_folder(tmp_path: Path) -> None:
    first, again = run(tmp_path), run(tmp_path)
    assert first == again and Path(first).parent == tmp_path / "cache" / "cqr-compress"
    assert (
        stat.S_IMODE(Path(first).parent.stat().st_mode) == 0o700 and len(list(Path(first).parent.iterdir())) == 1
    )


@needs_library
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "cqr-compress"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    path = Path(run(tmp_path))
    assert folder not in path.parents and path.name.endswith(".so") and not list(folder.iterdir())
