import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cqr_compress.errors import SpecError
from cqr_compress.kernel import ops
from cqr_compress.quantize.base import FitEffort, Quantizer
from cqr_compress.quantize.code_search import beam_search, encode_rows
from cqr_compress.quantize.kmeans import fit_centroids
from cqr_compress.quantize.normal_equations import solve_codebooks
from cqr_compress.quantize.registry import method_of
from cqr_compress.quantize.rotation import balanced_pca, procrustes
from cqr_compress.table.bitpack import unpack_codes
from cqr_compress.table.codes import computed_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.spec import AnySpec, CodebookSpec, RowwiseSpec
from cqr_compress.table.table import CompressedTable

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rows:
    sample: Tensor
    stored_apart_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weights: Tensor | None = None

    @property
    def sample_ids(self) -> Tensor:
        return torch.arange(len(self.sample))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.sample), 700):
            yield start, self.sample[start : start + 700]


def spec_of(rows: Tensor, C: int = 4, L: int = 1, n_bits: int = 4, **fields: object) -> CodebookSpec:
    values = {
        "method": "pq", "num_embeddings": len(rows), "embedding_dim": rows.shape[1], "num_columns": C,
        "num_levels": L, "codebook_size": 2**n_bits, "code_sources": ("stored",) * L, "codebook_dtype": "float32",
    }  # fmt: skip
    return CodebookSpec(**{**values, **fields})  # type: ignore[arg-type]


def compress(rows: Tensor, spec: AnySpec, effort: FitEffort | None = None) -> tuple[Quantizer, CompressedTable]:
    quantizer = method_of(spec.method).fit(Rows(rows), spec, effort or FitEffort(), lambda: None)
    return quantizer, CompressedTable(spec, {**quantizer.shared_tensors(), **quantizer.encode(rows, 0)})


def error(rows: Tensor, table: CompressedTable) -> float:
    return float((rows - table.decode()).square().sum() / rows.square().sum())


def test_pq_decodes_as_faiss_decodes_the_same_codes_and_codebooks(table: Tensor) -> None:
    spec = spec_of(table, C=4, n_bits=6)
    quantizer, ours = compress(table, spec)
    pq = faiss.ProductQuantizer(16, 4, 6)
    faiss.copy_array_to_vector(quantizer.shared_tensors()["codebooks"].numpy().ravel(), pq.centroids)
    # the bits are packed in faiss's own order, so its decoder reads our codes
    assert np.allclose(pq.decode(ours.tensors["codes"].numpy()), ours.decode().numpy(), atol=1e-6)
    assert (pq.compute_codes(table.numpy()) == ours.tensors["codes"].numpy()).mean() > 0.999


def test_rq_decodes_as_the_sum_of_its_codewords(table: Tensor) -> None:
    spec = spec_of(table, C=2, L=3, n_bits=5, method="prq")
    quantizer, ours = compress(table, spec, FitEffort(refine_rounds=1))
    codes = unpack_codes(ours.tensors["codes"], 6, 5).view(-1, 2, 3).tolist()
    codebooks = quantizer.shared_tensors()["codebooks"]
    for row in (0, 17, 2999):
        halves = [sum(codebooks[c, level, codes[row][c][level]] for level in range(3)) for c in range(2)]
        assert torch.allclose(ours.lookup(torch.tensor([row]))[0], torch.cat(halves), atol=1e-5)


@pytest.mark.parametrize("rotation", [None, "pca", "opq"])
@pytest.mark.parametrize(("C", "L", "rounds"), [(4, 1, 0), (4, 1, 3), (1, 4, 2), (2, 2, 2)])
def test_lookup_equals_rows_of_the_decoded_table(
    table: Tensor, C: int, L: int, rounds: int, rotation: str | None
) -> None:
    _, ours = compress(table, spec_of(table, C, L, rotation=rotation), FitEffort(refine_rounds=rounds, restarts=1))
    ids = torch.tensor([0, 2999, 5, 5, 1234])
    assert torch.allclose(ours.lookup(ids), ours.decode()[ids], atol=1e-5)
    assert torch.allclose(ours.decode(100, 103), ours.decode()[100:103], atol=1e-5)
    assert error(table, ours) < 0.35


def test_each_sub_vector_is_named_by_its_nearest_codeword(table: Tensor) -> None:
    quantizer, ours = compress(table, spec_of(table))
    codebooks = quantizer.shared_tensors()["codebooks"]
    codes = unpack_codes(ours.tensors["codes"], 4, 4)
    for c in range(4):
        distances = torch.cdist(table[:, 4 * c : 4 * c + 4].double(), codebooks[c, 0].double())
        chosen = distances.gather(1, codes[:, c : c + 1].long())[:, 0]
        assert torch.allclose(chosen, distances.min(1).values, atol=1e-5)


def test_rows_that_are_codewords_decode_to_themselves(table: Tensor) -> None:
    quantizer, _ = compress(table, spec_of(table))
    codebooks = quantizer.shared_tensors()["codebooks"]
    rows = codebooks[:, 0].transpose(0, 1).reshape(16, 16)
    codes = encode_rows(rows, codebooks, FitEffort(), 0)
    assert torch.equal(decode_codes(codes, codebooks), rows)


@pytest.mark.parametrize("method", [("pq", 4, 1), ("rq", 1, 3)])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_no_more_rows_than_codewords_gives_error_zero(method: tuple[str, int, int], n: int) -> None:
    rows = torch.randn(n, 16, generator=torch.Generator().manual_seed(3))
    _, ours = compress(rows, spec_of(rows, method[1], method[2]), FitEffort(refine_rounds=2))
    assert torch.equal(ours.decode(), rows)


def test_a_wider_beam_and_more_levels_do_not_raise_the_error(table: Tensor) -> None:
    errors = [error(table, compress(table, spec_of(table, 1, L), FitEffort(beam=4))[1]) for L in (1, 2, 4, 6)]
    assert all(b < a for a, b in itertools.pairwise(errors))
    codebooks = compress(table, spec_of(table, 1, 4))[0].shared_tensors()["codebooks"]
    by_beam = [
        float((table - decode_codes(beam_search(table, codebooks[0], beam)[:, None], codebooks)).square().sum())
        for beam in (1, 4, 16)
    ]
    assert by_beam[2] <= by_beam[1] * 1.001 <= by_beam[0] * 1.002


def test_refinement_lowers_the_error_of_residual_codebooks(table: Tensor) -> None:
    spec = spec_of(table, 1, 4)
    residual = table.clone()
    for level in range(4):  # the textbook quantizer, with the k-means of faiss
        clustering = faiss.Clustering(residual.shape[1], spec.codebook_size)
        clustering.niter, clustering.seed = 25, level + 1
        clustering.train(residual.numpy(), faiss.IndexFlatL2(residual.shape[1]))
        centroids = torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(spec.codebook_size, -1))
        residual -= centroids[torch.cdist(residual, centroids).argmin(1)]
    textbook = float(residual.square().sum() / table.square().sum())
    refined = error(table, compress(table, spec, FitEffort(refine_rounds=4, restarts=1))[1])
    assert refined < 0.9 * textbook


def test_beam_search_with_a_full_beam_is_exhaustive() -> None:
    generator = torch.Generator().manual_seed(4)
    rows, codebooks = torch.randn(30, 3, generator=generator), torch.randn(3, 4, 3, generator=generator)
    sums = (codebooks[0][:, None, None] + codebooks[1][None, :, None] + codebooks[2][None, None]).view(-1, 3)
    best = torch.cdist(rows, sums).min(1).values
    found = decode_codes(beam_search(rows, codebooks, beam=64)[:, None], codebooks[None])
    assert torch.allclose((rows - found).norm(dim=1), best, atol=1e-5)


def test_solved_codebooks_are_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, codes = torch.randn(400, 3, generator=generator), torch.randint(8, (400, 2), generator=generator)
    design = torch.zeros(400, 16)
    design.scatter_(1, codes + torch.tensor([0, 8]), 1.0)
    expected = torch.linalg.lstsq(design.double(), rows.double(), driver="gelsd").solution
    solved = solve_codebooks(rows, codes, torch.zeros(2, 8, 3)).view(16, 3)
    assert torch.allclose(design @ solved, (design.double() @ expected).float(), atol=1e-3)


@pytest.mark.parametrize("rotation", ["opq", "pca"])
def test_a_rotation_helps_where_variance_is_uneven(table: Tensor, rotation: str) -> None:
    mixed = table @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(6)))[0]
    effort = FitEffort(refine_rounds=6)
    plain, rotated = (
        error(mixed, compress(mixed, spec_of(mixed, rotation=r), effort)[1]) for r in (None, rotation)
    )
    assert rotated < plain


@pytest.mark.parametrize("rotation", ["opq", "pca"])
def test_a_rank_puts_the_codes_where_the_energy_is(rotation: str) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(3000, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    rows += 0.01 * torch.randn(3000, 16, generator=generator)
    effort = FitEffort(refine_rounds=4)
    (_, whole), (_, low) = (
        compress(rows, spec_of(rows, rotation=rotation, rank=rank), effort) for rank in (None, 4)
    )
    assert low.tensors["rotation"].shape == (4, 16) and low.tensors["codebooks"].shape == (4, 1, 16, 1)
    assert low.spec.nbytes < whole.spec.nbytes
    assert error(rows, low) < 1.01 * error(rows, whole)
    basis = low.tensors["rotation"]
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-5)


def test_procrustes_finds_the_projection_that_rows_were_made_with() -> None:
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(16, 5, generator=generator))[0]
    target = torch.randn(400, 5, generator=generator)
    assert torch.allclose(procrustes(target @ basis.T, target), basis, atol=1e-5)


def test_rotations_are_orthogonal_and_procrustes_recovers_one(table: Tensor) -> None:
    rotation = balanced_pca(table, 4)
    assert torch.allclose(rotation @ rotation.T, torch.eye(16), atol=1e-5)
    assert torch.allclose(procrustes(table, table @ rotation), rotation, atol=1e-4)
    variances = (table @ rotation).var(0).log().view(4, 4).sum(1)
    unbalanced = (table @ rotation).var(0).sort().values.log().view(4, 4).sum(1)
    assert float(variances.max() - variances.min()) < 0.5 * float(unbalanced.max() - unbalanced.min())


@given(n_bits=st.sampled_from([4, 8]), seed=st.integers(0, 1000), scale=st.sampled_from([1e-2, 1.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_row_wise_integers_stay_within_a_step(n_bits: int, seed: int, scale: float) -> None:
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)) * scale
    spec = RowwiseSpec(
        method=f"int{n_bits}", num_embeddings=40, embedding_dim=7, n_bits=n_bits, scale_dtype="float32"
    )
    _, ours = compress(rows, spec)
    step = (rows.amax(1) - rows.amin(1)) / (2**n_bits - 1)
    # the range is chosen for the least squared error, which the whole range bounds: sqrt(7) half steps
    assert bool(((rows - ours.decode()).norm(dim=1) <= step * 7**0.5 / 2 * 1.001 + 1e-6).all())


def test_a_constant_row_is_exact_in_row_wise_integers() -> None:
    rows = torch.tensor([[2.0] * 6, [0.0] * 6, [-3.5] * 6])
    spec = RowwiseSpec(method="int4", num_embeddings=3, embedding_dim=6, n_bits=4)
    assert torch.equal(compress(rows, spec)[1].decode(), rows)


def sketch_spec(rows: Tensor, method: str, K: int) -> CodebookSpec:
    sources = ("hashed",) if method == "hash" else ("quotient", "remainder")
    return spec_of(rows, 1, len(sources), method=method, codebook_size=K, code_sources=sources)


@pytest.mark.parametrize("method", ["hash", "qr"])
def test_sketch_codebooks_are_the_least_squares_solution(table: Tensor, method: str) -> None:
    spec = sketch_spec(table, method, 70)
    _, ours = compress(table, spec)
    assert "codes" not in ours.tensors
    codes = computed_codes(spec, torch.arange(3000))[:, 0]
    design = torch.zeros(3000, 70 * spec.num_levels)
    design.scatter_(1, codes + torch.arange(spec.num_levels) * 70, 1.0)
    best = design @ torch.linalg.lstsq(design.double(), table.double(), driver="gelsd").solution.float()
    assert error(table, ours) <= float((table - best).square().sum() / table.square().sum()) * 1.001


def test_quotient_and_remainder_name_every_row_and_use_every_codeword() -> None:
    spec = sketch_spec(torch.zeros(3000, 4), "qr", 55)
    codes = computed_codes(spec, torch.arange(3000))[:, 0]
    assert len(torch.unique(codes, dim=0)) == 3000
    assert int(codes.max()) < 55 and len(codes[:, 1].unique()) == 55 and len(codes[:, 0].unique()) >= 54


@pytest.mark.parametrize(("columns", "size"), [(1, 3000), (2, 55), (3, 15), (4, 8), (12, 2)])
def test_digits_name_every_row_and_use_every_codeword(columns: int, size: int) -> None:
    spec = spec_of(torch.zeros(3000, 12), columns, 1, codebook_size=size, code_sources=("digit",))
    codes = computed_codes(spec, torch.arange(3000))[:, :, 0]
    assert len(torch.unique(codes, dim=0)) == 3000
    assert all(codes[:, c].unique().tolist() == list(range(size)) for c in range(columns))
    with pytest.raises(SpecError, match="fewer than the table's 3000"):
        spec_of(torch.zeros(3000, 12), columns, 1, codebook_size=size - 1, code_sources=("digit",))


@pytest.mark.parametrize("method", ["hash", "qr"])
def test_weighted_sketches_are_the_weighted_least_squares_solution(table: Tensor, method: str) -> None:
    spec = sketch_spec(table, method, 60)
    weights = torch.linspace(0.01, 2.0, 3000)
    quantizer = method_of(method).fit(Rows(table, weights=weights), spec, FitEffort(), lambda: None)
    codes = computed_codes(spec, torch.arange(3000))[:, 0]
    design = torch.zeros(3000, 60 * spec.num_levels)
    design.scatter_(1, codes + torch.arange(spec.num_levels) * 60, 1.0)
    root = weights.sqrt()[:, None]
    best = (
        design
        @ torch.linalg.lstsq((design * root).double(), (table * root).double(), driver="gelsd").solution.float()
    )
    found = decode_codes(codes[:, None], quantizer.shared_tensors()["codebooks"].float())
    errors = [float((weights[:, None] * (table - rows).square()).sum()) for rows in (found, best)]
    assert errors[0] <= errors[1] * 1.001


def test_a_fitted_helper_hash_never_raises_the_error_of_pointers_alone(table: Tensor) -> None:
    plain = spec_of(table, 4, 1, n_bits=4, method="cqr")
    helped = spec_of(table, 4, 2, n_bits=4, method="cqr", code_sources=("stored", "hashed"))
    errors = []
    for spec, rounds in ((plain, 0), (helped, 0), (helped, 1), (helped, 6)):
        errors.append(error(table, compress(table, spec, FitEffort(refine_rounds=rounds))[1]))
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)  # a helper of zeros
    assert errors[3] < errors[2] < errors[1]


def test_the_same_seed_gives_the_same_bits(table: Tensor) -> None:
    spec, effort = spec_of(table, 2, 2), FitEffort(refine_rounds=2, restarts=2)
    first, second = (compress(table, spec, effort)[1].tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = compress(table, replace(spec, seed=1), effort)[1].tensors
    assert not torch.equal(first["codes"], other["codes"])


def test_centroids_are_the_means_of_their_points() -> None:
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(7))
    centroids = fit_centroids(points, 8, seed=0, iterations=60)
    nearest = torch.cdist(points, centroids).argmin(1)
    means = torch.stack([points[nearest == k].mean(0) for k in range(8)])
    assert torch.allclose(centroids, means, atol=0.05)


@pytest.mark.parametrize("S", [2, 20])
@pytest.mark.parametrize("compiled", [True, False])
def test_centroids_are_as_good_as_those_of_faiss(
    table: Tensor, S: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(ops, "available", lambda: False)
    points = torch.cat([table, table], 1)[:, :S].contiguous()

    def error_of(centroids: Tensor) -> float:
        return float(torch.cdist(points, centroids).min(1).values.square().sum())

    ours, theirs = [], []
    for seed in range(3):
        ours.append(error_of(fit_centroids(points, 64, seed)))
        clustering = faiss.Clustering(S, 64)
        clustering.niter, clustering.seed, clustering.min_points_per_centroid = 25, seed + 1, 1
        clustering.train(points.numpy(), faiss.IndexFlatL2(S))
        theirs.append(error_of(torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(64, S))))
    assert sum(ours) < 1.02 * sum(theirs)


def test_centroids_without_points_take_points_of_others() -> None:
    points = torch.cat([torch.zeros(500, 2), torch.randn(20, 2)])
    centroids = fit_centroids(points, 16, 0)
    assert bool(centroids.isfinite().all()) and len(torch.unique(centroids, dim=0)) > 8
    assert torch.equal(fit_centroids(points, 16, 0), centroids)
    assert bool(fit_centroids(torch.zeros(100, 2), 8, 0).eq(0).all())


@pytest.mark.parametrize("num_centroids", [16, 400])
def test_weights_move_centroids_to_the_few_points_that_count(num_centroids: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4000, 2, generator=generator)
    weights = torch.ones(4000)
    weights[:8] = 1e6
    centroids = fit_centroids(points, num_centroids, 0, weights=weights)
    assert float(torch.cdist(points[:8], centroids).min(1).values.max()) < 1e-2


def test_many_weighted_centroids_take_not_much_longer_than_those_without_weights() -> None:
    points = torch.randn(30_000, 4)
    took = []
    for weights in (None, torch.rand(30_000) + 0.1):
        start = time.process_time()
        fit_centroids(points, 2048, 0, iterations=5, weights=weights)
        took.append(time.process_time() - start)
    assert took[1] < 8 * took[0]


def test_centroids_do_not_depend_on_the_default_dtype_and_device() -> None:
    points = torch.randn(2000, 4)
    weights = torch.rand(2000) + 0.1
    wanted = [fit_centroids(points, K, 0, weights=w) for K in (16, 100) for w in (None, weights)]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = [fit_centroids(points, K, 0, weights=w) for K in (16, 100) for w in (None, weights)]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
