"""Layers, searches, clustering and fine-tuning on a CUDA device give what they give on the CPU."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_clustering import Pairs
from test_clustering import layer as sketch
from test_nn import IDS, SPECS, D, N, random_table
from test_tuning import bce, compressed, task
from test_tuning import dense as dense  # a fixture
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding, CompressedEmbeddingBag
from cqr_compress.kernel import gpu
from cqr_compress.nn import search
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.spec import CodebookSpec, TrellisSpec
from cqr_compress.table.trellis import seeded_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(params=SPECS, ids=list(SPECS))
def layers(request: pytest.FixtureRequest) -> tuple[CompressedEmbedding, CompressedEmbedding]:
    """A layer in float32 on the CPU, and its copy on the device."""
    layer = CompressedEmbedding(random_table(SPECS[request.param])).float()
    return layer, copy.deepcopy(layer).cuda()


def test_rows_and_gradients_equal_those_of_the_cpu(
    layers: tuple[CompressedEmbedding, CompressedEmbedding],
) -> None:
    layer, other = layers
    factor = torch.randn(*IDS.shape, D)
    found = other(IDS.cuda())
    assert found.is_cuda and torch.allclose(found.cpu(), layer(IDS), rtol=1e-5, atol=1e-4)
    assert torch.allclose(other.decode().cpu(), layer.decode(), rtol=1e-5, atol=1e-4)
    (layer(IDS) * factor).sum().backward()
    (found * factor.cuda()).sum().backward()
    for (name, a), b in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-2), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_without_gradients_equal_those_of_the_cpu(
    layers: tuple[CompressedEmbedding, CompressedEmbedding], dtype: torch.dtype
) -> None:
    layer, other = layers
    ids = torch.randint(N, (1000,), dtype=dtype)
    ids[: len(layer.table().exact_ids)] = layer.table().exact_ids.to(dtype)
    with torch.no_grad():
        found, rows = other(ids.cuda()), layer(ids)
        assert torch.allclose(found.cpu(), rows, rtol=1e-5, atol=1e-4)
        assert torch.allclose(other(ids[:1].cuda()), found[:1], rtol=1e-5, atol=1e-4)
        assert other(ids[:0].cuda()).shape == (0, D)
        half = copy.deepcopy(other).half()(ids.cuda())
        assert half.dtype == torch.float16
        assert torch.allclose(half.cpu().float(), rows, rtol=1e-2, atol=0.02 * float(rows.abs().max()))


def test_a_lookup_is_at_most_four_kernels(layers: tuple[CompressedEmbedding, CompressedEmbedding]) -> None:
    _, layer = layers
    if gpu.supports(layer.spec, layer.table_tensors(), IDS.cuda().flatten()):
        ids = IDS.cuda()
        with torch.no_grad():
            layer(ids)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
            ) as profile:
                layer(ids)
        launched = [
            event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        assert 0 < len(launched) <= 4, launched
    else:
        assert isinstance(layer.spec, CodebookSpec) and "quotient" in layer.spec.code_sources


@pytest.mark.parametrize("sizes", [(3, 16), (2, 3, 5, 9)])
def test_tiers_of_many_rows_equal_those_of_the_cpu(sizes: tuple[int, ...]) -> None:
    rows = 100_003
    shares = (rows - (len(sizes) - 1) * 1000, *[1000] * (len(sizes) - 1))
    spec = TrellisSpec(
        method="trellis", num_embeddings=rows, embedding_dim=40, tier_nbytes=sizes, tier_rows=shares, gain_bits=8
    )
    layer = CompressedEmbedding(random_table(spec)).float()
    ids = torch.randint(rows, (5000,))
    with torch.no_grad():
        found = copy.deepcopy(layer).cuda()(ids.cuda())
        assert torch.allclose(found.cpu(), layer(ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["pq8", "int8", "trellis", "trellis_tiers"])
@pytest.mark.parametrize("wrong", [-1, N])
def test_an_id_outside_the_table_is_a_device_side_assert(name: str, wrong: int) -> None:
    code = f"""
import torch
from test_nn import SPECS, random_table
from cqr_compress import CompressedEmbedding
with torch.no_grad():
    layer = CompressedEmbedding(random_table(SPECS[{name!r}])).cuda()
    layer(torch.tensor([0, 1], device="cuda"))
    torch.cuda.synchronize()
    print("right", flush=True)
    layer(torch.tensor([0, {wrong}], device="cuda"))
    torch.cuda.synchronize()
"""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here, check=False)
    assert ran.stdout == "right\n" and "device-side assert" in ran.stderr, ran.stderr[-2000:]


def test_scores_and_best_rows_equal_those_of_the_cpu(
    layers: tuple[CompressedEmbedding, CompressedEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = layers
    h = torch.randn(5, D)
    with torch.no_grad():
        scores = layer.scores(h)
        atol = 1e-5 * float(scores.abs().max())
        assert torch.allclose(other.scores(h.cuda()).cpu(), scores, rtol=1e-4, atol=atol)
        values, indices = other.topk(h.cuda(), 10)
        assert torch.allclose(values.cpu(), scores.topk(10).values, rtol=1e-4, atol=atol)
        assert torch.allclose(scores.gather(1, indices.cpu()), values.cpu(), rtol=1e-4, atol=atol)
        monkeypatch.setattr(search, "GPU_BLOCK_VALUES", 1)
        monkeypatch.setattr(search, "BLOCK_ROWS", 64)
        values, indices = other.topk(h.cuda(), 70)
        assert torch.allclose(values.cpu(), scores.topk(70).values, rtol=1e-4, atol=atol)
        assert torch.allclose(scores.gather(1, indices.cpu()), values.cpu(), rtol=1e-4, atol=atol)
        assert torch.allclose(other.scores(h.cuda()).cpu(), scores, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", ["pq8", "cqr", "int8", "trellis_pca", "trellis_tiers"])
def test_bags_equal_those_of_the_cpu(name: str, mode: str) -> None:
    bag = CompressedEmbeddingBag(random_table(SPECS[name]), mode=mode, padding_idx=5).float()
    ids, offsets = torch.randint(N, (40,)), torch.tensor([0, 3, 3, 20])
    found = copy.deepcopy(bag).cuda()(ids.cuda(), offsets.cuda())
    assert torch.allclose(found.cpu(), bag(ids, offsets), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_give_the_dtypes_of_the_dense_layer(
    layers: tuple[CompressedEmbedding, CompressedEmbedding], dtype: torch.dtype
) -> None:
    _, layer = layers
    layer.requires_grad_(False)
    wanted = layer(IDS.cuda())
    with torch.autocast("cuda", dtype):
        assert torch.equal(layer(IDS.cuda()), wanted) and wanted.dtype == torch.float32
    half = copy.deepcopy(layer).to(dtype)(IDS.cuda())
    assert half.dtype == dtype
    size = float(wanted.abs().max())
    assert float((half.float() - wanted).abs().max()) < 0.05 * size


@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize("name", ["pq5", "prq", "kept", "cqr", "int8", "rank", "trellis_pca", "trellis_tiers"])
def test_compiled_layers_equal_those_that_are_not(name: str) -> None:
    torch.compiler.reset()
    layer = CompressedEmbedding(random_table(SPECS[name])).float().cuda()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for ids in (IDS.cuda(), IDS.repeat(3, 1).cuda()):
        found = compiled(ids)
        assert torch.allclose(found, other(ids), rtol=1e-5, atol=1e-4)
        found.square().sum().backward()
        other(ids).square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-2 * float(b.grad.abs().max()))


@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize("name", ["pq8", "trellis_tiers"])
def test_graphs_that_are_captured_give_the_same_rows(name: str) -> None:
    torch.compiler.reset()
    layer = CompressedEmbedding(random_table(SPECS[name])).float().cuda()
    compiled = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            ids = torch.randint(N, IDS.shape, generator=torch.Generator().manual_seed(seed)).cuda()
            assert torch.allclose(compiled(ids), layer(ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["pq8", "cqr", "int8", "trellis_gain"])
def test_a_lookup_does_not_decode_the_table(name: str) -> None:
    size = 50_000
    layer = CompressedEmbedding(random_table(replace(SPECS[name], num_embeddings=size))).cuda()
    ids = torch.zeros(16, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        layer(ids)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(ids)
    assert torch.cuda.max_memory_allocated() - before < size * D * 4 / 10


@pytest.mark.parametrize("rates", [[2] * 16, [1, 2, 3, 8, 4, 1, 2, 3], [1] * 64])
def test_searches_find_paths_of_the_same_cost(rates: list[int]) -> None:
    rows, weights = torch.randn(200, len(rates)), torch.rand(len(rates)) + 0.5
    values = seeded_values(8, 0)
    costs = []
    for device in ("cpu", "cuda"):
        states, codes = search_paths(
            rows.to(device), weights.to(device), torch.tensor(rates, dtype=torch.uint8), 8, values.to(device)
        )
        assert codes.shape == (200, sum(rates) // 8)
        costs.append(((values[states.cpu().long()] - rows).square() * weights).sum(1))
    assert torch.allclose(costs[0], costs[1], rtol=1e-4)


@pytest.mark.parametrize("method", ["pq", "rq", "prq", "trellis", "int8", "auto"])
def test_a_model_on_the_device_stays_there(method: str, table: Tensor) -> None:
    model = nn.Sequential(nn.Embedding.from_pretrained(table, freeze=False))
    other = copy.deepcopy(model).cuda()
    options = cqr.ConvertOptions(method=method, ratio=None if method == "int8" else 8)
    cqr.compress_(model, options)
    cqr.compress_(other, options)
    ids = torch.arange(len(table))
    found = other(ids.cuda())
    assert found.is_cuda
    errors = [float((rows.detach().cpu() - table).square().mean()) for rows in (model(ids), found)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_sketches_train_and_are_clustered() -> None:
    model = Pairs(sketch(0), sketch(1)).cuda()
    user, item = torch.randint(100, (500,)).cuda(), torch.randint(100, (500,)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = cqr.ClusterSchedule(model, steps=[3], optimizer=optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(user, item).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert all(p.is_cuda and bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "pq", "num_columns": 4, "n_bits": 4},
        {"method": "trellis", "bits_per_dim": 1.0},
        {"method": "cqr", "num_columns": 4, "n_bits": 3, "helper": "stored"},
    ],
)
@pytest.mark.parametrize("trained", ["auto", "train"])
def test_what_is_tuned_on_the_device_has_its_metric_on_the_cpu(
    asked: dict[str, object], trained: str, dense: Path, tmp_path: Path
) -> None:
    if asked["method"] == "cqr" and trained == "train":
        pytest.skip("codes that are hashed are not trained")
    small = compressed(dense, tmp_path, **asked)

    def on_its_device(model: nn.Module) -> dict[str, float]:
        return bce(copy.deepcopy(model).cpu())

    def moved(epoch: int) -> object:
        for batch in task().train_batches(epoch):
            yield tuple(values.cuda() for values in batch)

    options = cqr.FinetuneOptions(epochs=2, codes=trained)
    tuning = task(train_batches=moved, evaluate=on_its_device)
    output = tmp_path / "tuned.safetensors"
    report = cqr.finetune(small, output, tuning, options, original=dense, device="cuda")
    assert report.after["bce"] <= report.before["bce"]
    model = task().model()
    cqr.load_compressed(model, output)
    with torch.no_grad():
        found = bce(model.eval())
    assert found["bce"] == pytest.approx(report.after["bce"], rel=1e-3)
