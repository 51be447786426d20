"""The layers behave as nn.Embedding and nn.EmbeddingBag over the decoded rows do."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding, CompressedEmbeddingBag, CompressedTable
from cqr_compress.errors import ShapeError, SpecError, WeightWriteError
from cqr_compress.table.spec import (
    HASHED,
    QUOTIENT,
    REMAINDER,
    STORED,
    AnySpec,
    CodebookSpec,
    RowwiseSpec,
    TrellisSpec,
)
from cqr_compress.table.tiers import tier_tensors
from cqr_compress.table.trellis import seeded_values

N, D = 300, 12


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal to the rounding of float32 sums, whose terms reach the largest of the values."""
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, atol=max(1e-4, 1e-6 * largest))


def codebook_spec(**fields: Any) -> CodebookSpec:
    base = {
        "method": "test", "num_embeddings": N, "embedding_dim": D, "num_columns": 3, "num_levels": 1,
        "codebook_size": 16, "code_sources": (STORED,),
    }  # fmt: skip
    return CodebookSpec(**(base | fields))


def trellis_spec(**fields: Any) -> TrellisSpec:
    return TrellisSpec(
        **({"method": "trellis", "num_embeddings": N, "embedding_dim": D, "tier_nbytes": (3,), "seed": 3} | fields)
    )


SPECS: dict[str, AnySpec] = {
    "pq8": codebook_spec(codebook_size=256),
    "pq4": codebook_spec(),
    "pq4_odd": codebook_spec(num_columns=1, embedding_dim=D),
    "pq5": codebook_spec(codebook_size=32),
    "pq12": codebook_spec(codebook_size=4096),
    "rq": codebook_spec(num_columns=1, num_levels=4, code_sources=(STORED,) * 4),
    "prq": codebook_spec(num_levels=2, code_sources=(STORED,) * 2, codebook_size=64),
    "opq": codebook_spec(rotation="opq"),
    "rank": codebook_spec(rotation="opq", rank=6),
    "float32": codebook_spec(codebook_dtype="float32"),
    "kept": codebook_spec(num_kept_rows=3, num_zero_rows=2),
    "one_zero": codebook_spec(num_zero_rows=1),
    "int8_books": codebook_spec(rotation="opq", rank=6, codebook_dtype="int8", num_zero_rows=1),
    "hash": codebook_spec(num_columns=1, codebook_size=37, code_sources=(HASHED,)),
    "qr": codebook_spec(num_columns=1, num_levels=2, codebook_size=18, code_sources=(QUOTIENT, REMAINDER)),
    "cqr": codebook_spec(num_levels=2, code_sources=(STORED, HASHED), seed=5),
    "int8": RowwiseSpec(method="int8", num_embeddings=N, embedding_dim=D, n_bits=8, num_zero_rows=1),
    "int4": RowwiseSpec(method="int4", num_embeddings=N, embedding_dim=D, n_bits=4),
    "trellis": trellis_spec(num_zero_rows=1),
    "trellis_gain": trellis_spec(gain_bits=8, value_source="stored", window=8),
    "trellis_pca": trellis_spec(rotation="pca", rank=7, num_kept_rows=3, num_zero_rows=2),
    "trellis_whole": trellis_spec(rotation="pca", gain_bits=8, window=12, codebook_dtype="float32"),
    "trellis_tiers": trellis_spec(tier_nbytes=(2, 3, 5, 9), tier_rows=(150, 100, 43, 7), num_kept_rows=3),
    "trellis_two": trellis_spec(
        tier_nbytes=(1, 4),
        tier_rows=(180, 120),
        window=8,
        rotation="pca",
        rank=7,
        gain_bits=8,
        value_source="stored",
    ),
}


def random_rates(num_dims: int, row_nbytes: int, generator: torch.Generator) -> Tensor:
    """Rates of 0 to 8 bits that add up to whole bytes."""
    drawn = torch.randperm(8 * num_dims, generator=generator)[: 8 * row_nbytes]
    return torch.bincount(drawn % num_dims, minlength=num_dims).to(torch.uint8)


def random_table(spec: AnySpec, seed: int = 0) -> CompressedTable:
    """A table with random tensors, kept rows 5, 9, 200 and zero rows 0, 17 where the spec has them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for short, shape in spec.tensor_shapes().items():
        if short == "dim_rates":
            assert isinstance(spec, TrellisSpec)
            rates = [random_rates(shape.shape[1], nbytes, generator) for nbytes in spec.tier_nbytes]
            tensors[short] = torch.stack(rates)
        elif short in ("row_tiers", "tier_starts"):
            assert isinstance(spec, TrellisSpec)
            tiers = torch.arange(spec.num_tiers).repeat_interleave(torch.tensor(spec.tier_rows))
            order = torch.randperm(spec.num_embeddings, generator=torch.Generator().manual_seed(seed))
            tensors[short] = tier_tensors(spec, tiers[order].byte())[short]
        elif shape.dtype == torch.int8:
            tensors[short] = torch.randint(-3, 4, shape.shape, generator=generator, dtype=torch.int8)
        elif shape.dtype == torch.uint8:
            tensors[short] = torch.randint(256, shape.shape, generator=generator, dtype=torch.uint8)
        elif shape.dtype.is_floating_point:
            tensors[short] = torch.randn(shape.shape, generator=generator).to(shape.dtype)
        else:
            kept = [5, 9, 200][: spec.num_kept_rows] + [0, 17][: spec.num_zero_rows]
            tensors[short] = torch.tensor(kept, dtype=shape.dtype)
    return CompressedTable(spec, tensors)


@pytest.fixture(params=SPECS, ids=list(SPECS))
def table(request: pytest.FixtureRequest) -> CompressedTable:
    return random_table(SPECS[request.param])


@pytest.fixture
def pq() -> CompressedTable:
    return random_table(SPECS["kept"])


@pytest.fixture(params=["compiled", "torch"])
def each_lookup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the compiled lookup, where there is one, and with torch's."""
    if request.param == "torch":
        monkeypatch.setattr("cqr_compress.kernel.ops.available", lambda: False)


def dense(table: CompressedTable, **arguments: Any) -> nn.Embedding:
    """The oracle: nn.Embedding over the decoded rows."""
    layer = nn.Embedding(N, D, **arguments)
    layer.weight.data = table.decode()
    return layer


IDS = torch.tensor([[0, 5, 299, 17], [5, 200, 1, 9], [250, 0, 3, 3]])


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0], IDS[:, None], IDS[:0], IDS[:, :0], IDS.int(), IDS.t()])
def test_lookup_equals_rows_of_the_decoded_table(table: CompressedTable, ids: Tensor) -> None:
    rows = CompressedEmbedding(table)(ids)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, dense(table)(ids), atol=1e-6)
    assert rows.shape == (*ids.shape, D)


def test_decoding_in_blocks_equals_lookup(table: CompressedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CompressedEmbedding(table)
    monkeypatch.setattr("cqr_compress.nn.table_layer.row_blocks", lambda n, *_: [(0, 7), (7, 200), (200, n)])
    with torch.no_grad():
        blocks = layer.decode()
    assert torch.allclose(blocks, table.decode(), atol=1e-6)
    assert torch.allclose(layer.decode(), blocks, atol=1e-6)


def trellis_row(spec: TrellisSpec, tensors: Mapping[str, Tensor], parameters: dict[str, Tensor], i: int) -> Tensor:
    """A trellis-coded row from the bits of its ring, as one long integer."""
    tiers, start = [0] * N, i * spec.row_nbytes
    if spec.has_tiers:
        tiers = [byte >> shift & 3 for byte in tensors["row_tiers"].tolist() for shift in (0, 2, 4, 6)]
        start = sum(spec.tier_nbytes[tier] for tier in tiers[:i])
    row_nbytes = spec.tier_nbytes[tiers[i]]
    bits = int.from_bytes(bytes(tensors["codes"].flatten()[start : start + row_nbytes].tolist()), "little")
    ring, first, values = bits | bits << 8 * row_nbytes | bits << 16 * row_nbytes, 0, []
    table = parameters.get("state_values", seeded_values(spec.window, spec.seed).double())
    for d, rate in enumerate(tensors["dim_rates"][tiers[i]].tolist()):
        values.append(table[ring >> first & (2**spec.window - 1)] * parameters["dim_scale"][tiers[i], d])
        first += rate
    row = torch.stack(values)
    if spec.gain_bits:
        low, log_ratio = parameters["gain_range"]
        row = row * low * torch.exp(log_ratio * int(tensors["row_gain"][i]) / 255)
    if spec.rotation:
        row = row @ parameters["rotation"]
    return row + parameters["row_mean"]


def reference_rows(table: CompressedTable, parameters: dict[str, Tensor]) -> Tensor:
    """The codebook formula written with loops, differentiable; rows 0..N."""
    spec, rows = table.spec, []
    for i in range(N):
        if isinstance(spec, RowwiseSpec):
            low = [int(b) for b in table.tensors["codes"][i]]
            codes = low if spec.n_bits == 8 else [c for b in low for c in (b & 15, b >> 4)]
            row = parameters["row_offset"][i] + parameters["row_scale"][i] * torch.tensor(codes).double()
        elif isinstance(spec, TrellisSpec):
            row = trellis_row(spec, table.tensors, parameters, i)
        else:
            stored = int.from_bytes(bytes(table.tensors["codes"][i].tolist()), "little")
            parts = []
            for c in range(spec.num_columns):
                codes = [
                    stored >> (spec.n_bits * (c * spec.num_levels + level)) & (2**spec.n_bits - 1)
                    for level in range(spec.num_levels)
                ]
                parts.append(sum(parameters["codebooks"][c, level, code] for level, code in enumerate(codes)))
            row = torch.cat(parts)
            if spec.rotation:
                row = row @ parameters["rotation"]
        rows.append(row)
    for place, i in enumerate(table.tensors.get("kept_ids", torch.empty(0)).tolist()):
        kept = place < spec.num_kept_rows
        rows[i] = parameters["kept_rows"][place] if kept else torch.zeros(D, dtype=torch.float64)
    return torch.stack(rows)


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize(
    "name",
    [
        "pq8",
        "pq4",
        "pq5",
        "rq",
        "prq",
        "opq",
        "rank",
        "kept",
        "int8",
        "int4",
        "trellis",
        "trellis_gain",
        "trellis_pca",
        "trellis_whole",
        "trellis_tiers",
        "trellis_two",
    ],
)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    table = random_table(SPECS[name])
    layer = CompressedEmbedding(table).double()
    factor = torch.randn(*IDS.shape, D, generator=torch.Generator().manual_seed(3)).double()
    layer.weight  # noqa: B018  reading it must not disturb
    (layer(IDS) * factor).sum().backward()
    parameters = {
        short: tensor.double().requires_grad_()
        for short, tensor in table.tensors.items() if tensor.is_floating_point() and tensor.numel()
    }  # fmt: skip
    (reference_rows(table, parameters)[IDS] * factor).sum().backward()
    assert set(parameters) == {short for short, _ in layer.named_parameters()}
    for short, parameter in parameters.items():
        assert torch.allclose(layer.get_parameter(short).grad, parameter.grad), short


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize("size", [4, 3000, 9000])
@pytest.mark.parametrize(
    "name",
    [
        "pq8",
        "pq4",
        "rq",
        "prq",
        "opq",
        "rank",
        "int8",
        "trellis",
        "trellis_gain",
        "trellis_pca",
        "trellis_whole",
        "trellis_tiers",
        "trellis_two",
    ],
)
def test_gradients_in_float32_do_not_depend_on_the_batch_size(name: str, size: int) -> None:
    ids = torch.randint(N, (size,), generator=torch.Generator().manual_seed(1))
    factor = torch.randn(size, D, generator=torch.Generator().manual_seed(2))
    found = CompressedEmbedding(random_table(SPECS[name])).float()
    wanted = copy.deepcopy(found).double()
    (found(ids) * factor).sum().backward()
    (wanted(ids) * factor.double()).sum().backward()
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(found(ids).double(), wanted(ids), atol=1e-5)


def test_gradients_reach_half_precision_codebooks(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq)
    with pytest.warns(UserWarning, match=r"Call model.float\(\) before training"):
        layer(IDS).square().sum().backward()
    assert layer.codebooks.grad.dtype == torch.float16 and layer.codebooks.grad.abs().sum() > 0


@pytest.mark.usefixtures("each_lookup")
def test_padding_row_gets_no_gradient() -> None:
    table = random_table(SPECS["pq8"])
    layer = CompressedEmbedding(table, padding_idx=-N + 3)
    assert layer.padding_idx == 3
    layer(torch.full((4,), 3)).sum().backward()
    assert layer.codebooks.grad.abs().sum() == 0
    other = CompressedEmbedding(table)
    other(torch.tensor([1])).sum().backward()
    layer(torch.tensor([1, 3])).sum().backward()
    assert torch.equal(layer.codebooks.grad, other.codebooks.grad)


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_shortens_rows_as_the_dense_layer_does(table: CompressedTable, norm_type: float) -> None:
    oracle = dense(table, max_norm=2.5, norm_type=norm_type)
    rows = CompressedEmbedding(table, max_norm=2.5, norm_type=norm_type)(IDS)
    assert torch.allclose(rows, oracle(IDS), atol=1e-5)


def test_scale_grad_by_freq_divides_by_the_count_in_the_batch() -> None:
    table = random_table(SPECS["float32"])
    layer, plain = CompressedEmbedding(table, scale_grad_by_freq=True), CompressedEmbedding(table)
    assert torch.equal(layer(IDS), plain(IDS))
    oracle = dense(table, scale_grad_by_freq=True)
    oracle(IDS).sum().backward()
    layer(IDS).sum().backward()
    plain.decode().backward(oracle.weight.grad)
    assert torch.allclose(layer.codebooks.grad, plain.codebooks.grad, atol=1e-5)


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize("bad", [300, -1, 2**40])
def test_error_names_the_bad_id_and_the_range(table: CompressedTable, bad: int) -> None:
    for layer in (CompressedEmbedding(table), CompressedEmbeddingBag(table)):
        with pytest.raises(IndexError, match=f"id {bad} is outside the table of 300 rows: give ids from 0 to 299"):
            layer(torch.tensor([[1, bad]]))


def test_ids_that_are_not_integers_are_refused_as_by_the_dense_layer(pq: CompressedTable) -> None:
    with pytest.raises(RuntimeError, match="indices"):
        CompressedEmbedding(pq)(torch.tensor([1.0]))


@pytest.mark.usefixtures("each_lookup")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_bags_equal_those_of_the_dense_layer(
    table: CompressedTable, mode: str, padding_idx: int | None, index: torch.dtype
) -> None:
    layer = CompressedEmbeddingBag(table, mode=mode, padding_idx=padding_idx)
    oracle = nn.EmbeddingBag(N, D, mode=mode, padding_idx=padding_idx)
    oracle.weight.data = table.decode()
    ids = IDS.to(index)
    assert torch.allclose(layer(ids), oracle(ids), atol=1e-5)
    flat, offsets = ids.flatten(), torch.tensor([0, 1, 1, 7, 12], dtype=index)
    assert torch.allclose(layer(flat, offsets), oracle(flat, offsets), atol=1e-5)
    assert layer(ids[:0]).shape == (0, D)
    layer.include_last_offset = oracle.include_last_offset = True
    assert torch.allclose(layer(flat, offsets), oracle(flat, offsets), atol=1e-5)
    if mode == "sum":
        weights = torch.randn(12, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(layer(flat, offsets, weights), oracle(flat, offsets, weights), atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients_of_bags_equal_those_of_the_dense_layer(mode: str) -> None:
    table = random_table(SPECS["float32"])
    layer = CompressedEmbeddingBag(table, mode=mode, padding_idx=3)
    oracle = nn.EmbeddingBag(N, D, mode=mode, padding_idx=3)
    oracle.weight.data = table.decode()
    weights = {m: nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for m in ("ours", "theirs")}
    sums = mode == "sum"
    layer(IDS, None, weights["ours"] if sums else None).square().sum().backward()
    oracle(IDS, None, weights["theirs"] if sums else None).square().sum().backward()
    plain = CompressedEmbedding(table)
    plain.decode().backward(oracle.weight.grad)
    assert torch.allclose(layer.codebooks.grad, plain.codebooks.grad, atol=1e-4)
    if sums:
        assert torch.allclose(weights["ours"].grad, weights["theirs"].grad, atol=1e-4)


def test_bag_refuses_what_the_dense_layer_refuses(pq: CompressedTable) -> None:
    layer = CompressedEmbeddingBag(pq, mode="max")
    with pytest.raises(ValueError, match="offsets"):
        layer(IDS, torch.tensor([0]))
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        layer(IDS, None, torch.ones(3, 4))
    with pytest.raises(ValueError, match="scaling the gradient"):
        CompressedEmbeddingBag(pq, mode="max", scale_grad_by_freq=True)(IDS)


def test_arguments_that_cannot_work_are_refused_by_name(pq: CompressedTable) -> None:
    with pytest.raises(SpecError, match="sparse"):
        CompressedEmbedding(pq, sparse=True)
    with pytest.raises(SpecError, match="padding_idx 300 is outside the table of 300 rows"):
        CompressedEmbeddingBag(pq, padding_idx=300)
    with pytest.raises(SpecError, match="mode 'prod' is not one of sum, mean, max"):
        CompressedEmbeddingBag(pq, mode="prod")
    with pytest.raises(SpecError, match="from_pretrained"):
        CompressedEmbedding.from_pretrained(torch.ones(3, 3))
    with pytest.raises(SpecError, match="from_pretrained"):
        CompressedEmbeddingBag.from_pretrained(torch.ones(3, 3))


def test_memory_equals_the_bytes_of_the_spec(table: CompressedTable) -> None:
    layer = CompressedEmbedding(table)
    resident = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.state_dict().values()}
    extra = [b for name, b in layer.named_buffers() if name not in layer.state_dict()]
    seeded = isinstance(table.spec, TrellisSpec) and table.spec.value_source == "seeded"
    computed = 4 * table.spec.num_values if seeded else 0  # float32 values of the states
    expected = sum(shape.nbytes for shape in table.spec.tensor_shapes().values())
    assert sum(resident.values()) + sum(b.untyped_storage().nbytes() for b in extra) == expected + computed
    if table.spec.file_shapes() == table.spec.tensor_shapes():  # no int8 codebooks and rotations
        assert expected == table.spec.nbytes
    assert layer.nbytes == expected
    assert layer.num_parameters == table.spec.num_parameters
    assert set(layer.state_dict()) == set(table.spec.tensor_shapes())


def test_state_dict_moves_between_layers(table: CompressedTable) -> None:
    first = CompressedEmbedding(table)
    second = CompressedEmbedding(random_table(table.spec, seed=9))
    kept = second.state_dict().get("kept_ids")
    assert second.load_state_dict(first.state_dict(), strict=True).missing_keys == []
    assert torch.equal(second(IDS), first(IDS)) and (kept is None or torch.equal(kept, first.kept_ids))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))


def test_copies_and_pickles_are_equal_and_apart(table: CompressedTable) -> None:
    layer = CompressedEmbedding(table, padding_idx=1)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(IDS), layer(IDS)) and other.spec == layer.spec and other.padding_idx == 1
        before = layer(IDS)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(layer(IDS), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_take_the_dtype_that_the_layer_is_moved_to(table: CompressedTable, dtype: torch.dtype) -> None:
    layer = CompressedEmbedding(table).to(dtype)
    oracle = dense(table).to(dtype)
    assert layer(IDS).dtype == layer.weight.dtype == layer.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-6}[dtype]
    assert torch.allclose(layer(IDS).double(), oracle(IDS).double(), atol=tolerance, rtol=tolerance)
    back = layer.float()
    assert back(IDS).dtype == torch.float32 and all(p.dtype == torch.float32 for p in back.parameters())
    spec = back.table().spec
    assert spec.dtype == "float32" and back.table().spec.tensor_shapes() == spec.tensor_shapes()
    assert layer.state_dict().get("codes", torch.empty(0, dtype=torch.uint8)).dtype == torch.uint8


def test_a_layer_on_meta_has_shapes_and_no_memory(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq).to("meta")
    assert layer.device.type == layer(IDS.to("meta")).device.type == "meta"
    assert layer(IDS.to("meta")).shape == (3, 4, D)


def test_requires_grad_freezes_all_of_it(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq).requires_grad_(False)
    assert not layer(IDS).requires_grad and not layer.weight.requires_grad
    assert layer.requires_grad_(True).weight.requires_grad


# ---- weight


def test_weight_looks_like_a_parameter_and_decodes_when_used(table: CompressedTable) -> None:
    layer = CompressedEmbedding(table)
    rows = table.decode()
    weight = layer.weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressedEmbedding, "decode", lambda self: pytest.fail("decoded"))
        assert isinstance(weight, nn.Parameter) and weight.shape == (N, D) and weight.requires_grad
        assert not weight.is_leaf and weight.grad is None and not weight.data.requires_grad
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and len(weight) == N
    assert weight.numel() == N * D and weight.T.shape == (D, N) and weight.size(1) == D and weight.dim() == 2
    for found in (weight + 0, weight[:], weight.T.T * 1, weight.clone(), weight.data.clone(), torch.cat([weight])):
        assert type(found) is Tensor and torch.allclose(found, rows, atol=1e-6)
    assert torch.allclose(weight.norm(), rows.norm()) and "TableWeight" in repr(weight)
    assert type(copy.deepcopy(weight)) is type(pickle.loads(pickle.dumps(weight))) is Tensor


@pytest.mark.parametrize(
    "product",
    [
        lambda h, w: h @ w.T, lambda h, w: F.linear(h, w), lambda h, w: torch.matmul(h, w.t()),
        lambda h, w: h.matmul(w.transpose(0, 1)), lambda h, w: torch.einsum("bd,nd->bn", h, w),
        lambda h, w: F.linear(h, w, torch.arange(N).float()), lambda h, w: (w @ h.T).T,
        lambda h, w: torch.mm(h, w.transpose(-2, -1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("trains", [False, True])
def test_products_with_the_weight_equal_those_with_the_rows(
    table: CompressedTable, product: Callable[[Tensor, Tensor], Tensor], trains: bool
) -> None:
    layer, h = CompressedEmbedding(table).requires_grad_(trains), torch.randn(5, D)
    assert close(product(h, layer.weight), product(h, table.decode()))
    assert product(h, layer.weight).requires_grad == trains


def test_products_without_gradients_do_not_decode_the_table(pq: CompressedTable, monkeypatch: Any) -> None:
    layer = CompressedEmbedding(pq)
    monkeypatch.setattr(CompressedEmbedding, "decode", lambda self: pytest.fail("decoded"))
    with torch.no_grad():
        assert (torch.randn(5, D) @ layer.weight.T).shape == (5, N)
        assert F.linear(torch.randn(2, 5, D), layer.weight).shape == (2, 5, N)
    assert F.embedding(IDS, layer.weight).requires_grad
    assert F.embedding(IDS, layer.weight, 0, None, 2.0, False, True).shape == (3, 4, D)


def test_weight_is_differentiable(pq: CompressedTable) -> None:
    h = torch.randn(5, D)
    layer, other = CompressedEmbedding(pq).double(), CompressedEmbedding(pq).double()
    F.cross_entropy(h.double() @ layer.weight.T, torch.arange(5)).backward()
    F.cross_entropy(h.double() @ other(torch.arange(N)).T, torch.arange(5)).backward()
    assert torch.allclose(layer.codebooks.grad, other.codebooks.grad)
    assert not (layer.weight.detach() * 1).requires_grad and not (layer.weight.data + 1).requires_grad


@pytest.mark.parametrize("padding_idx", [None, 9, -2])
def test_functional_embedding_of_the_weight_is_a_lookup(pq: CompressedTable, padding_idx: int | None) -> None:
    layer = CompressedEmbedding(pq)
    rows = F.embedding(IDS, layer.weight, padding_idx)
    assert torch.equal(rows, layer(IDS))
    rows[0, 0].sum().backward()
    bags = F.embedding_bag(IDS, layer.weight, mode="sum")
    assert torch.allclose(bags, layer(IDS).sum(1), atol=1e-5)


@pytest.mark.parametrize(
    "index", [3, -1, slice(None), slice(5, 90, 7), slice(-4, None), IDS, IDS - N, IDS.int(), 0, torch.tensor(4)]
)
def test_indexing_the_weight_looks_rows_up(table: CompressedTable, index: Any, monkeypatch: Any) -> None:
    layer, rows = CompressedEmbedding(table), table.decode()
    monkeypatch.setattr(CompressedEmbedding, "decode", lambda self: pytest.fail("decoded"))
    assert torch.allclose(layer.weight[index], rows[index], atol=1e-6)
    assert layer.weight[index].requires_grad and not layer.weight.data[index].requires_grad


def test_other_indices_of_the_weight_decode_it(pq: CompressedTable) -> None:
    layer, rows = CompressedEmbedding(pq), pq.decode()
    mask = torch.arange(N) % 3 == 0
    for index in (mask, (3, 4), (slice(2, 5), 1), None, ..., [1, 2], (IDS, 0)):
        assert torch.allclose(layer.weight[index], rows[index], atol=1e-6)
    assert torch.allclose(layer.weight.T[2], rows.T[2], atol=1e-6)
    assert torch.allclose(layer.weight.index_select(0, IDS[0]), rows[IDS[0]], atol=1e-6)
    assert torch.allclose(torch.index_select(layer.weight, 1, IDS[0] % D), rows[:, IDS[0] % D], atol=1e-6)
    for bad in (N, -N - 1, torch.tensor([N])):
        with pytest.raises(IndexError):
            layer.weight[bad]
    assert layer.weight.grad is None


def test_writing_to_the_weight_is_refused(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq)
    with pytest.raises(WeightWriteError, match="fill_ would write"):
        layer.weight.data.fill_(0)
    with pytest.raises(WeightWriteError, match="normal_ would write"):
        nn.init.normal_(layer.weight)
    with pytest.raises(WeightWriteError, match="__setitem__ would write"):
        layer.weight[0] = 0
    with pytest.raises(WeightWriteError, match="cannot set the weight"):
        layer.weight = nn.Parameter(torch.zeros(N, D))
    with pytest.raises(WeightWriteError, match="would write"):
        layer.reset_parameters()
    with pytest.raises(WeightWriteError, match="would write"):
        layer.weight.data = torch.zeros(N, D)
    with pytest.raises(WeightWriteError, match="would write"):
        layer.weight.copy_(torch.zeros(N, D))
    with pytest.raises(WeightWriteError, match="would write"):
        torch.add(torch.zeros(N, D), 1, out=layer.weight)
    layer.weight = layer.weight  # what code that ties weights does


# ---- scores and topk


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (70,)])
def test_scores_equal_products_with_the_decoded_rows(
    table: CompressedTable, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cqr_compress.nn.search.BLOCK_ROWS", 128)
    h = torch.randn(*shape, D)
    layer = CompressedEmbedding(table)
    wanted = h @ table.decode().T
    with torch.no_grad():
        assert close(layer.scores(h), wanted)
        assert close(layer.scores(h, torch.tensor([5, 0, 5])), wanted[..., [5, 0, 5]])
        values, indices = layer.topk(h, 10)
    best = wanted.topk(10, dim=-1)
    assert close(values, best.values) and values.shape == (*shape, 10)
    assert close(wanted.gather(-1, indices), best.values)
    assert close(layer.scores(h), wanted)


def test_scores_are_differentiable(table: CompressedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqr_compress.nn.search.BLOCK_ROWS", 128)
    layer, other = CompressedEmbedding(table).double(), CompressedEmbedding(table).double()
    h, g = (torch.randn(70, D).double().requires_grad_() for _ in range(2))
    g.data.copy_(h.data)
    factor = torch.randn(70, N).double()
    (layer.scores(h) * factor).sum().backward()
    ((g @ other.decode().T) * factor).sum().backward()
    assert torch.allclose(h.grad, g.grad)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad)


def test_topk_finds_every_row_when_asked_for_all(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq)
    assert sorted(layer.topk(torch.randn(D), N).indices.tolist()) == list(range(N))
    with pytest.raises(ShapeError, match="k is 301: give a number from 1 to the 300 rows"):
        layer.topk(torch.randn(D), 301)
    with pytest.raises(ShapeError, match=r"\(2, 5\) do not match rows of 12 dimensions"):
        layer.scores(torch.randn(2, 5))


def test_topk_treats_nan_and_infinity_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqr_compress.nn.search.BLOCK_ROWS", 64)
    table = random_table(SPECS["kept"])
    table.tensors["kept_rows"][0, 0] = torch.nan
    table.tensors["kept_rows"][2, :] = torch.inf
    h = torch.rand(3, D) + 0.1
    wanted = (h @ table.decode().T).topk(4)
    found = CompressedEmbedding(table).topk(h, 4)
    assert torch.equal(found.indices, wanted.indices)
    low = CompressedEmbedding(table).topk(-h, N)
    assert torch.equal(low.indices[:, -1], torch.full((3,), 200))


def test_scores_in_half_precision_have_the_dtype_of_the_queries(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq).half()
    assert layer.scores(torch.randn(3, D).half()).dtype == torch.float16
    assert layer.topk(torch.randn(3, D).bfloat16(), 3).values.dtype == torch.bfloat16


# ---- graphs


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("name", ["pq5", "prq", "kept", "cqr", "int8"])  # codes across bytes, sums, apart, hashed
def test_torch_compile_takes_the_whole_forward_and_backward(name: str, bag: bool) -> None:
    torch.compiler.reset()
    table = random_table(SPECS[name])
    layer = (CompressedEmbeddingBag if bag else CompressedEmbedding)(table, padding_idx=5).float()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.repeat(3, 1)):
        assert torch.allclose(compiled(ids), other(ids), atol=1e-5)
        compiled(ids).square().sum().backward()
        other(ids).square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-3)


def test_torch_compile_takes_products_with_the_weight(pq: CompressedTable) -> None:
    torch.compiler.reset()
    layer = CompressedEmbedding(pq)

    def score(h: Tensor) -> Tensor:
        return h @ layer.weight.T + layer.scores(h)

    h = torch.randn(5, D)
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(h), 2 * h @ pq.decode().T, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # torch before 2.7 warns of constants
def test_torch_export_gives_a_program_for_any_batch(table: CompressedTable) -> None:
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(CompressedEmbedding(table), (IDS,), dynamic_shapes=({0: batch, 1: None},))
    ids = IDS.repeat(5, 1)
    assert torch.allclose(program.module()(ids), dense(table)(ids), atol=1e-6)


STRICT = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="torch before 2.7 does not tell a strict export from a compilation",
)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=STRICT)])
@pytest.mark.parametrize("name", ["prq", "kept", "int4"])
def test_torch_export_gives_products_for_any_number_of_queries(name: str, strict: bool) -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CompressedEmbedding(random_table(SPECS[name]))

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.layer.scores(h), h @ self.layer.weight.T, self.layer.topk(h, 7).values

    model, h = Best(), torch.randn(150, D)  # more than a block of queries
    varying = ({0: torch.export.Dim("queries", min=2, max=1000)},)
    program = torch.export.export(model, (h[:9],), dynamic_shapes=varying, strict=strict)
    scores = h @ dense(random_table(SPECS[name])).weight.T
    for found, wanted in zip(program.module()(h), (scores, scores, scores.topk(7).values), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=STRICT)])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_torch_export_gives_bags_of_any_size(mode: str, strict: bool) -> None:
    table = random_table(SPECS["kept"])
    layer = CompressedEmbeddingBag(table, mode=mode, padding_idx=5)
    other = nn.EmbeddingBag(N, D, mode=mode, padding_idx=5, _weight=table.decode())
    ids, offsets = IDS.flatten(), torch.tensor([0, 2, 2, 7])
    varying = ({0: torch.export.Dim("ids", min=2, max=1000)}, {0: torch.export.Dim("bags", min=2, max=100)})
    program = torch.export.export(layer, (ids, offsets), dynamic_shapes=varying, strict=strict)
    more = torch.cat([ids, ids, torch.full((9,), 5)]), torch.tensor([0, 1, 1, 9, 20, 24])
    assert torch.allclose(program.module()(*more), other(*more), atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.jit, "trace"), reason="this torch has no torch.jit.trace")
def test_a_trace_serves_other_ids_and_can_be_saved(table: CompressedTable) -> None:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", "`torch.jit.*", category)
        traced = torch.jit.trace(CompressedEmbedding(table, padding_idx=0), (IDS,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    ids = IDS.flip(0).repeat(2, 1)
    assert torch.allclose(loaded(ids), dense(table)(ids), atol=1e-6)


def test_autocast_does_not_touch_the_rows(table: CompressedTable) -> None:
    layer = CompressedEmbedding(table)
    with torch.autocast("cpu", torch.bfloat16):
        rows = layer(IDS)
    assert torch.equal(rows, layer(IDS))


@pytest.mark.usefixtures("process_group")
def test_a_layer_takes_part_in_ddp() -> None:
    for name in ("kept", "one_zero", "int8", "trellis_pca"):
        layer = CompressedEmbedding(random_table(SPECS[name])).float()
        wrapped = nn.parallel.DistributedDataParallel(layer)
        wrapped(IDS).sum().backward()
        alone = CompressedEmbedding(random_table(SPECS[name])).float()
        alone(IDS).sum().backward()
        for a, b in zip(layer.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad)


def test_an_optimizer_trains_a_layer(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq).float()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    goal = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(0))
    first = float((layer(IDS) - goal).square().mean().detach())
    for _ in range(60):
        optimizer.zero_grad()
        (layer(IDS) - goal).square().mean().backward()
        optimizer.step()
    assert float((layer(IDS) - goal).square().mean().detach()) < 0.3 * first
    assert cqr.CompressedTable(layer.table().spec, layer.table().tensors).decode(0, 1).abs().sum() == 0


def test_specs_of_this_file_are_what_they_say() -> None:
    assert replace(SPECS["pq8"], method="pq").nbytes == N * 3 + 3 * 256 * 4 * 2  # type: ignore[arg-type]


# ---- what surrounds a layer


@pytest.mark.parametrize("name", ["pq8", "int8"])
def test_defaults_of_torch_do_not_reach_the_lookup(name: str) -> None:
    table = random_table(SPECS[name])
    layer = CompressedEmbedding(table)
    expected = layer(IDS)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(layer(IDS), expected)
        torch.set_default_dtype(torch.float16)
        layer(IDS.repeat(3000, 1)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(layer(IDS), expected)


def test_codes_of_another_dtype_are_refused(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq).requires_grad_(False)
    layer.load_state_dict({name: t.float() for name, t in layer.state_dict().items()}, assign=True)
    with pytest.raises(ShapeError, match=r"torch.float32.* do not form a table"):
        layer(IDS)


def test_the_stand_in_has_no_values_to_be_taken_by_mistake(pq: CompressedTable) -> None:
    head = nn.Linear(D, N, bias=False)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        head.weight.data = CompressedEmbedding(pq).weight.data
    layer = CompressedEmbedding(pq).requires_grad_(False)
    with pytest.raises(ValueError, match="non-leaf"):
        head.weight = layer.weight
    assert layer.weight.device.type == "cpu" and layer.weight.is_cpu and not layer.weight.is_meta


def test_requires_grad_of_the_weight_is_that_of_the_table(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq)
    layer.weight.requires_grad = False
    assert not layer.codebooks.requires_grad and not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    assert layer.codebooks.requires_grad and layer.weight.requires_grad
    assert layer.weight.detach().requires_grad_(True).requires_grad
    layer.weight.detach().requires_grad_(False)
    assert layer.codebooks.requires_grad, "a detached copy leaves the table as it is"
    layer(IDS).sum().backward()
    layer.weight.grad = None
    assert layer.codebooks.grad is None


def test_lists_and_outputs_that_would_write_are_refused(pq: CompressedTable) -> None:
    layer = CompressedEmbedding(pq)
    with pytest.raises(WeightWriteError):
        torch._foreach_mul_([layer.weight], 0.0)
    with pytest.raises(WeightWriteError):
        torch.nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("name", ["pq8", "hash"])
def test_recorded_and_mapped_lookups_depend_on_their_ids(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    table = random_table(SPECS[name])
    layer, rows = CompressedEmbedding(table).requires_grad_(False), table.decode()
    graph = make_fx(layer)(IDS)
    assert torch.allclose(graph(IDS.flip(0)), rows[IDS.flip(0)], atol=1e-6)
    assert torch.allclose(torch.vmap(layer)(IDS), rows[IDS], atol=1e-6)


def test_second_derivatives_are_those_of_the_formula() -> None:
    layers = [CompressedEmbedding(random_table(SPECS["pq8"])).float() for _ in range(2)]
    layers[1].double()
    found = []
    for layer in layers:
        rows = layer(IDS).double()
        (first,) = torch.autograd.grad(rows.pow(3).sum(), layer.codebooks, create_graph=True)
        first.square().sum().backward()
        found.append(layer.codebooks.grad.double())
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-1)


def test_hashed_tables_refuse_ids_that_are_not_integers() -> None:
    with pytest.raises(RuntimeError, match=r"give int32 or int64 ids"):
        CompressedEmbedding(random_table(SPECS["hash"]))(torch.tensor([1.5]))


def test_gradients_are_not_shortened_by_max_norm() -> None:
    table = random_table(SPECS["float32"])
    layer, plain, oracle = (
        CompressedEmbedding(table, max_norm=0.5),
        CompressedEmbedding(table),
        dense(table, max_norm=0.5),
    )
    oracle(IDS).square().sum().backward()
    layer(IDS).square().sum().backward()
    plain.decode().backward(oracle.weight.grad)
    assert torch.allclose(layer.codebooks.grad, plain.codebooks.grad, atol=1e-4)


def test_padding_outside_the_table_is_refused_by_functional_lookups(pq: CompressedTable) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        F.embedding(IDS, CompressedEmbedding(pq).weight, N + 5)
