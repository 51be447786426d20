"""Sketches that train, and clusterings that keep their promises."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress import ClusterOptions, ClusterSchedule, CQREmbedding, CQREmbeddingBag
from cqr_compress.clustering.cluster_layer import pointers
from cqr_compress.clustering.entropy import pointer_entropies
from cqr_compress.clustering.gradients import Moments, Prior, RowGradients
from cqr_compress.clustering.observe import backpropagate, observed
from cqr_compress.errors import NonFiniteError, ShapeError, SpecError, TableNotFoundError
from cqr_compress.finetuning.fisher import FisherMatrix
from cqr_compress.integrations.steps import schedule_of
from cqr_compress.table.random_tables import SKETCHES, sketch_table

N, D, K = 700, 16, 16
IDS = torch.arange(N)


def layer(seed: int = 0, **arguments: Any) -> CQREmbedding:
    """A layer whose rows differ, as after some training."""
    made = CQREmbedding(N, D, codebook_size=K, seed=seed, **({"num_columns": 4, "helper": True} | arguments))
    with torch.no_grad():
        made.codebooks.normal_(generator=torch.Generator().manual_seed(seed))
    return made


class Pairs(nn.Module):
    """Scores a user and an item by the product of their rows, as GMF does."""

    def __init__(self, users: nn.Module, items: nn.Module) -> None:
        super().__init__()
        self.users, self.items, self.bias = users, items, nn.Parameter(torch.zeros(()))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1) + self.bias


@pytest.fixture
def ratings() -> tuple[Tensor, Tensor, Tensor]:
    """Labels from 8 planted groups of users and of items."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(8, 8, generator=generator) * 3
    user, item = torch.randint(N, (2, 20_000), generator=generator)
    chance = taste[user % 8, item % 8].sigmoid()
    return user, item, torch.bernoulli(chance, generator=generator)


# sketches


@pytest.mark.parametrize("method", SKETCHES)
def test_a_sketch_trains_and_a_fit_to_its_own_labels_lowers_the_loss(method: str) -> None:
    table = sketch_table(method, N, D, 32, seed=3)
    assert table.spec.num_parameters == table.spec.num_levels * 32 * D  # type: ignore[union-attr]
    made = cqr.CompressedEmbedding(table)
    wanted = torch.randn(32, D, generator=torch.Generator().manual_seed(1))[IDS % 32]
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(made(IDS), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.99


def test_sketches_differ_for_another_seed_and_agree_for_the_same() -> None:
    for method in SKETCHES:
        first, same, other = (sketch_table(method, N, D, 32, seed=s).decode() for s in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)


def test_layers_without_a_seed_differ_and_follow_that_of_torch() -> None:
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append([CQREmbedding(N, D).decode().detach() for _ in range(2)])
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
    assert not torch.equal(made[0][0], made[0][1]) and not torch.equal(made[0][0], made[2][0])


def test_codewords_begin_within_their_scale() -> None:
    values = sketch_table("ce", N, D, 256, init_scale=0.5).tensors["codebooks"]
    assert 0.12 < float(values.max()) <= 0.125 and -0.125 <= float(values.min()) < -0.12


def test_clustering_of_values_whose_squares_overflow_ends() -> None:
    made = CQREmbedding(N, 128, codebook_size=K, seed=0)
    with torch.no_grad():
        made.codebooks.mul_(1e27)
    cqr.cluster_(nn.Sequential(made))
    assert int(pointers(made).max()) < K


def test_an_unknown_sketch_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="'bloom' is not one of hash, qr, qr_concat, hash_embeddings, ce"):
        sketch_table("bloom", N, D, 32)


def test_a_model_of_dense_layers_becomes_one_of_sketches() -> None:
    model = Pairs(nn.Embedding(N, D), nn.EmbeddingBag(N, D))
    cqr.swap_embeddings_(
        model, {"users.weight": sketch_table("cqr", N, D, K), "items.weight": sketch_table("cqr_helper", N, D, K)}
    )
    assert [c.name for c in cqr.cluster_(model)] == ["users", "items"]


# the layer


def test_a_layer_counts_the_parameters_and_bytes_of_the_paper() -> None:
    plain = CQREmbedding(100_000, 32, codebook_size=256)
    assert plain.num_parameters == 256 * 32
    assert plain.nbytes == 256 * 32 * 4 + 100_000 * 8
    paper = CQREmbedding(100_000, 32, codebook_size=4096, preset="paper")
    assert paper.num_parameters == 2 * 4096 * 32
    assert paper.nbytes == 2 * 4096 * 32 * 4 + 100_000 * 4 * 12 // 8


def test_the_row_of_an_id_is_pointer_plus_helper() -> None:
    from cqr_compress.table.hashing import hash_ids

    made = layer(seed=5)
    helper = hash_ids(IDS, K, made.spec.seed, range(1, 8, 2))
    h = pointers(made)
    assert torch.equal(h.long(), hash_ids(IDS, K, 5, range(0, 8, 2)))
    books = made.codebooks.detach()
    rows = [books[c, 0][h[:, c].long()] + books[c, 1][helper[:, c]] for c in range(4)]
    assert torch.allclose(made(IDS), torch.cat(rows, 1))


def test_a_padding_row_stays_zero() -> None:
    made = layer(padding_idx=-1)
    assert made.padding_idx == N - 1
    out = made(torch.tensor([[3, N - 1]]))
    assert not out[0, 1].any() and out[0, 0].any()
    out.sum().backward()
    made.cluster()
    assert not made(torch.tensor([N - 1])).any()


def test_a_bag_equals_that_of_the_decoded_rows() -> None:
    bag = CQREmbeddingBag(N, D, mode="sum", codebook_size=K, padding_idx=0)
    dense = nn.EmbeddingBag.from_pretrained(bag.decode().detach(), mode="sum", padding_idx=0)
    ids, offsets = torch.tensor([1, 2, 0, 699, 5]), torch.tensor([0, 2, 2])
    assert torch.allclose(bag(ids, offsets), dense(ids, offsets), atol=1e-6)
    bag.cluster()
    assert torch.allclose(bag(ids, offsets).norm(), bag.decode()[ids].sum(0).norm(), rtol=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "best"}, "preset 'best' is not one of default, paper"),
        ({"codebook_size": 100}, "codebook_size 100 is not a power of two"),
        ({"num_columns": 5}, "16 is not divisible by 5. Choose num_columns from 1, 2, 4, 8, 16"),
        ({"padding_idx": 700}, "padding_idx 700 is outside the table of 700 rows"),
        ({"sparse": True}, "does not support sparse gradients"),
    ],
)
def test_settings_that_no_layer_can_have_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CQREmbedding(N, D, **arguments)


@pytest.mark.parametrize("helper", [False, True])
def test_a_state_dict_carries_pointers_and_hashes_to_another_process(helper: bool, tmp_path: Path) -> None:
    made = layer(helper=helper)
    made.cluster()
    with torch.no_grad():
        made.codebooks.add_(torch.randn(made.codebooks.shape))  # the helper is not zero after training
    torch.save(made.state_dict(), tmp_path / "s.pt")
    other = CQREmbedding(N, D, codebook_size=K, num_columns=4, helper=helper, seed=9)
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert torch.equal(other(IDS), made(IDS))
    assert torch.equal(copy.deepcopy(made)(IDS), made(IDS))
    assert ("hash_seed" in made.state_dict()) == helper


# clustering


@pytest.mark.parametrize("helper", [False, True])
def test_after_clustering_every_row_is_its_centroid_whatever_the_block(helper: bool) -> None:
    before = layer(helper=helper).decode().detach()
    results = []
    for block_bytes in (1, 3000, 10_000, 2**24):
        made = layer(helper=helper)
        told = made.cluster(options=ClusterOptions(block_bytes=block_bytes))
        h, centroids = pointers(made).long(), made.codebooks.detach()[:, 0]  # (C, K, S)
        expected = torch.cat([centroids[c][h[:, c]] for c in range(4)], 1)
        assert torch.equal(made(IDS), expected)
        if helper:
            assert not made.codebooks[:, 1].any() and made.spec.seed != 0
        for c in range(4):  # nearest of all
            distance = torch.cdist(before[:, 4 * c : 4 * c + 4].double(), centroids[c].double())
            best = distance.min(1).values
            assert torch.allclose(distance.gather(1, h[:, c : c + 1])[:, 0], best, atol=1e-5)
        error = float((expected - before).square().sum() / before.square().sum())
        assert math.isclose(error, told.relative_error, rel_tol=1e-4)
        results.append((expected, error))
    for rows, error in results:
        assert torch.equal(rows, results[0][0]) and error == results[0][1]


def test_another_clustering_differs_by_seed_and_helpers_are_hashed_anew() -> None:
    first, second, other = layer(), layer(), layer()
    first.cluster(), second.cluster(), other.cluster(options=ClusterOptions(seed=1))
    assert torch.equal(first.codebooks, second.codebooks) and not torch.equal(first.codebooks, other.codebooks)
    seeds = {0, first.spec.seed}
    first.cluster()
    assert first.spec.seed not in seeds


def test_no_more_ids_than_codewords_lose_nothing() -> None:
    made = CQREmbedding(12, D, codebook_size=K, preset="paper")
    before = made.decode().detach()
    made.cluster()
    assert torch.allclose(made.decode(), before, atol=1e-6)


def test_k_means_sees_the_sample_and_all_ids_are_assigned() -> None:
    made = layer(num_columns=1, helper=True)
    before = made.decode().detach()
    told = made.cluster(options=ClusterOptions(points_per_centroid=5))
    nearest = torch.cdist(before, made.codebooks.detach()[0, 0]).argmin(1)
    assert torch.equal(pointers(made)[:, 0].long(), nearest)
    everything = layer(num_columns=1, helper=True).cluster()
    assert everything.relative_error < told.relative_error


def test_ids_that_occur_often_lie_nearer_to_their_centroids() -> None:
    counts = torch.ones(N)
    counts[:40] = 1000.0
    plain, weighted = layer(), layer()
    before = plain.decode().detach()
    plain.cluster()
    weighted.cluster(counts=counts)
    errors = [(x.decode().detach()[:40] - before[:40]).square().sum() for x in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "counts",
    [torch.ones(N - 1), -torch.ones(N), torch.zeros(N), torch.full((N,), math.nan), torch.full((N,), math.inf)],
)
def test_counts_that_do_not_fit_are_refused(counts: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"give \(700,\) finite numbers of at least 0"):
        layer().cluster(counts=counts)


@pytest.mark.parametrize("kind", ["reset", "keep"])
def test_what_the_optimizer_holds_for_codebooks_is_reset_or_kept(kind: str) -> None:
    model = Pairs(layer(), nn.Embedding(N, D))
    optimizer = torch.optim.Adam(model.parameters())
    model(IDS, IDS).sum().backward()
    optimizer.step()
    cqr.cluster_(model, optimizer=optimizer, optimizer_state=kind)
    assert (model.users.codebooks in optimizer.state) == (kind == "keep")  # type: ignore[comparison-overlap]
    assert model.items.weight in optimizer.state  # type: ignore[comparison-overlap]
    model(IDS, IDS).sum().backward()
    optimizer.step()  # goes on


def test_tied_layers_are_clustered_once() -> None:
    model = Pairs(nn.Embedding(N, D), nn.Embedding(N, D))
    model.items.weight = model.users.weight
    cqr.swap_embeddings_(model, {"users.weight": sketch_table("cqr", N, D, K)})
    assert [told.name for told in cqr.cluster_(model)] == ["users"]
    assert torch.equal(model.users(IDS), model.items(IDS))


def test_tables_with_more_levels_are_refused_by_name() -> None:
    model = Pairs(nn.Embedding(N, D), nn.Embedding(N, D))
    cqr.compress_(model, cqr.ConvertOptions(method="cqr", helper="stored", num_columns=4, n_bits=4, min_rows=0))
    with pytest.raises(TableNotFoundError, match="'users' is cqr 4x4b, stored helper; 'items' is"):
        cqr.cluster_(model)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(TableNotFoundError, match="Pairs has no layer with one level of stored codes"):
        cqr.cluster_(Pairs(nn.Embedding(N, D), nn.Embedding(N, D)))


@pytest.mark.parametrize("rotated", [{}, {"rotation": "opq"}, {"rotation": "opq", "rank": 8}])
def test_compressed_tables_are_clustered_on(rotated: dict[str, Any]) -> None:
    model = Pairs(nn.Embedding(N, D), nn.Embedding(N, D))
    cqr.compress_(model, cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4, min_rows=0, **rotated))
    with torch.no_grad():
        before = model.users(IDS)
    cqr.cluster_(model)
    assert F.mse_loss(model.users(IDS), before) < 0.1 * before.square().mean()  # nearly the same centroids


# gradients


class Losses:
    """Begins passes over the ratings, and counts them."""

    def __init__(self, model: nn.Module, ratings: tuple[Tensor, Tensor, Tensor]) -> None:
        self.model, self.ratings, self.passes = model, ratings, 0

    def __call__(self) -> Iterator[Tensor]:
        self.passes += 1
        for user, item, label in zip(*(t.split(512) for t in self.ratings), strict=True):
            yield F.binary_cross_entropy_with_logits(self.model(user, item), label, reduction="none")


@pytest.mark.parametrize("rotation", [None, "opq"])
def test_gradients_and_curvature_are_those_of_single_occurrences(rotation: str | None) -> None:
    made: Any = layer()
    if rotation:
        model = nn.ModuleList([nn.Embedding(N, D)])
        cqr.compress_(model, cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4, rotation="opq", min_rows=0))
        made = model[0]
    ids = torch.tensor([3, 5, 3, 9])
    scale = torch.tensor([1.0, 2.0, -3.0, 0.5])[:, None]
    sums = RowGradients.zeros(made, slice(4, 12))
    with observed({made: sums}):
        ((made(ids) ** 2).sum(1, keepdim=True) * scale).sum().backward()
    gradient = 2 * scale * made(ids).detach()
    transposed = gradient @ made.rotation.detach().float().T if rotation else gradient
    expected, fisher = torch.zeros(N, D), torch.zeros(N)
    expected.index_add_(0, ids, transposed)
    fisher.index_add_(0, ids, transposed.square().mean(1))
    assert torch.allclose(sums.gradient, expected[:, 4:12], atol=1e-4)
    assert torch.allclose(sums.fisher, fisher, rtol=1e-4)
    assert sums.counts[[3, 5, 9]].tolist() == [2, 1, 1] and sums.counts.sum() == 4
    assert made.codebooks.grad is None and made.observer is None


@pytest.mark.parametrize("rotation", [None, "opq"])
def test_a_product_with_all_rows_counts_each_example_as_lookups_would(
    rotation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a softmax: gradients of single examples, as if each had looked up all rows."""
    model = nn.ModuleList([nn.Embedding(N, D)])
    cqr.compress_(model, cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4, rotation=rotation, min_rows=0))
    made: Any = model[0]
    generator = torch.Generator().manual_seed(2)
    h, label = torch.randn(3, 2, D, generator=generator), torch.randint(N, (6,), generator=generator)
    monkeypatch.setattr("cqr_compress.clustering.observe._BLOCK_VALUES", 4 * N)  # of four examples
    ways: list[Any] = [
        lambda: h @ made.weight.T,
        lambda: F.linear(h, made.weight),
        lambda: made.scores(h),
        lambda: made.scores(h, IDS.flip(0)).flip(2),
        lambda: (h[:, :, None] * made(IDS.expand(3, 2, N))).sum(3),
    ]
    found = []
    for way in ways:
        sums, curvature = RowGradients.zeros(made, slice(4, 12)), FisherMatrix.zeros(made)
        for one in (sums, curvature):
            with observed({made: one}):
                F.cross_entropy(way().flatten(0, 1), label, reduction="sum").backward()
        assert sums.blocks is not None
        found.append((sums.gradient, sums.fisher, sums.blocks, curvature.matrix.float(), sums.counts))
    for products in found[:-1]:
        for one, other in zip(products[:4], found[-1][:4], strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-4
        assert float(products[4][label].min()) >= 1 > float(products[4][~torch.isin(IDS, label)].max())
    made.codebooks.grad = None
    with observed({made: RowGradients.zeros(made, slice(4, 12))}):
        (h @ made.weight.detach().T).sum()  # seen by nobody
        (made.scores(h[:0]).sum() + made.scores(h, IDS[:0]).sum()).backward()
        made(IDS).sum().backward()
    assert made.codebooks.grad is None


def test_the_target_is_a_newton_step_to_the_maximum_of_a_quadratic_posterior() -> None:
    made = layer()
    rows = made.decode().detach()
    curvature, best = torch.rand(N) * 5, torch.randn(N, D)
    prior = Prior.estimate(Moments.from_rows(rows.split(100)), curvature, prior_weight=2.0)
    assert torch.allclose(prior.mean, rows.mean(0), atol=1e-5)
    p = prior.precision / 2
    assert math.isclose(1 / p, float(rows.square().mean() + (1 / (curvature + p)).mean()), rel_tol=1e-3)
    sums = RowGradients(slice(0, D), curvature[:, None] * (rows - best), curvature, torch.ones(N))
    found = sums.target(IDS, rows, prior, step_size=1.0)
    p = prior.precision
    assert torch.allclose(
        found, (curvature[:, None] * best + p * prior.mean) / (curvature[:, None] + p), atol=1e-4
    )


def test_parameters_keep_their_gradients(ratings: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Pairs(layer(), nn.Embedding(N, D))
    model(IDS, IDS).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    cqr.cluster_(model, Losses(model, ratings))
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_small_buffer_takes_more_passes_with_the_same_result(ratings: tuple[Tensor, Tensor, Tensor]) -> None:
    results, passes = [], []
    for buffer_bytes in (2**30, 2 * 4 * N * 4, 1):
        model = Pairs(layer(), layer(seed=1))
        losses = Losses(model, ratings)
        cqr.cluster_(model, losses, options=ClusterOptions(buffer_bytes=buffer_bytes))
        passes.append(losses.passes)
        results.append([model.users.decode(), model.items.decode()])
    assert passes == [1, 4, 8]
    for users, items in results:
        assert torch.allclose(users, results[0][0], atol=1e-5) and torch.allclose(items, results[0][1], atol=1e-5)


def test_reduced_losses_and_models_that_are_not_reached_are_refused(
    ratings: tuple[Tensor, Tensor, Tensor],
) -> None:
    model = Pairs(layer(), layer(seed=1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match="got one number for a batch. Compute it with reduction='none'"):
        cqr.cluster_(model, lambda: [model(IDS, IDS).mean()])
    with pytest.raises(SpecError, match="losses is a list: give a function"):
        cqr.cluster_(model, [model(IDS, IDS)])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="got no batch"):
        cqr.cluster_(model, list)
    with pytest.raises(SpecError, match="no gradient reached 'items'"):
        cqr.cluster_(model, lambda: [model.users(IDS).sum(1)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.users.observer is None


def test_values_that_are_not_finite_are_refused(ratings: tuple[Tensor, Tensor, Tensor]) -> None:
    made = layer()
    before = made.codes.clone()
    with pytest.raises(NonFiniteError, match="the gradients of layer '' contain NaN or infinity"):
        made.cluster(
            lambda: [made(IDS).sum(1), made(IDS[-1:]).sum(1) * math.nan],
            options=ClusterOptions(points_per_centroid=1),
        )
    with torch.no_grad():
        made.codebooks[0, 0, 0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="the codebooks of layer '' contain NaN or infinity"):
        made.cluster()
    assert torch.equal(made.codes, before)


def test_a_pass_cleans_up_after_an_error_and_works_without_gradients_outside() -> None:
    made = layer()

    def broken() -> Iterator[Tensor]:
        yield made(IDS).sum(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        made.cluster(broken)
    assert made.observer is None
    with torch.no_grad():
        made.cluster(lambda: [made(IDS).square().sum(1)])
    made(IDS).sum().backward()


def test_gradient_informed_clustering_finds_groups_that_hashing_cannot(
    ratings: tuple[Tensor, Tensor, Tensor],
) -> None:
    user, item, label = ratings

    def trained(gradient_informed: bool) -> float:
        torch.manual_seed(0)
        model = Pairs(CQREmbedding(N, D, codebook_size=8), CQREmbedding(N, D, codebook_size=8, seed=1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        schedule = ClusterSchedule.every_epoch(
            model,
            len(user) // 500,
            8,
            optimizer=optimizer,
            losses=Losses(model, ratings) if gradient_informed else None,
        )
        for _ in range(8):
            for part in torch.randperm(len(user)).split(500):
                loss = F.binary_cross_entropy_with_logits(model(user[part], item[part]), label[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return float(F.binary_cross_entropy_with_logits(model(user, item), label))

    assert trained(True) < 0.5 and trained(True) < trained(False) - 0.1


# schedules


def steps_of(schedule: ClusterSchedule) -> tuple[int, ...]:
    return schedule.steps


def test_schedules_name_the_steps_that_they_promise() -> None:
    made = layer()
    assert steps_of(ClusterSchedule.every_epoch(made, 100, 10)) == (100, 200, 300, 400, 500, 600, 700)
    assert steps_of(ClusterSchedule.every_epoch(made, 100, 10, codes_until=0.6))[-1] == 600
    assert steps_of(ClusterSchedule.at_fractions(made, 1000)) == (250, 500)
    assert steps_of(ClusterSchedule(made, [7, 3, 3])) == (3, 7)
    for wrong in (
        lambda: ClusterSchedule(made, [0]), lambda: ClusterSchedule.every_epoch(made, 100, 1),
        lambda: ClusterSchedule.at_fractions(made, 10, (0.0,)), lambda: ClusterSchedule.every_epoch(made, 0, 5),
    ):  # fmt: skip
        with pytest.raises(SpecError):
            wrong()


def test_a_schedule_clusters_at_its_steps_and_goes_on_after_a_restart() -> None:
    made = layer()
    first = ClusterSchedule(made, [2, 4])
    assert [first.step() is not None for _ in range(3)] == [False, True, False]
    second = ClusterSchedule(made, [])
    second.load_state_dict(first.state_dict())
    assert [second.step() is not None for _ in range(3)] == [True, False, False]


def test_no_clustering_is_later_than_the_codes_are_trained() -> None:
    made = layer()
    for epochs, until, wanted in ((4, 0.75, (10, 20, 30)), (1, 0.75, (10, 20)), (1, 0.3, (10,)), (1, 0.1, (4,))):
        assert steps_of(schedule_of(made, 40, epochs, until, {})) == wanted
    for until in (0.0, 2.0):
        with pytest.raises(SpecError):
            schedule_of(made, 40, 4, until, {})


def lightning_steps(callback: Any, total: float, batches: float, steps: range = range(0)) -> tuple[int, ...]:
    """The steps planned for a training by Lightning, of which some steps are then made."""
    trainer = SimpleNamespace(
        estimated_stepping_batches=total, num_training_batches=batches, accumulate_grad_batches=3,
        optimizers=[None], global_step=steps.start,
    )  # fmt: skip
    callback.on_train_start(trainer, layer())
    for step in steps:
        trainer.global_step = step + 1
        callback.on_train_batch_end(trainer, None)
    return steps_of(callback.schedule)


def test_lightning_clusters_after_epochs_of_any_number_of_batches() -> None:
    pytest.importorskip("lightning")
    from cqr_compress.integrations.lightning_callback import ClusterCallback

    assert lightning_steps(ClusterCallback(), 16, 10) == (4, 8, 12)
    assert lightning_steps(ClusterCallback(), 40, math.inf) == (10, 20)  # an iterable without a length
    for total in (math.inf, -1):
        with pytest.raises(SpecError, match="max_steps"):
            lightning_steps(ClusterCallback(), total, math.inf)


def test_lightning_goes_on_with_the_steps_of_a_longer_training() -> None:
    pytest.importorskip("lightning")
    from cqr_compress.integrations.lightning_callback import ClusterCallback

    first = ClusterCallback()
    assert lightning_steps(first, 8, 12, range(5)) == (4,)
    resumed = ClusterCallback()
    resumed.load_state_dict(first.state_dict())
    for callback in (first, resumed):
        assert lightning_steps(callback, 16, 12, range(5, 16)) == (4, 8, 12)
        assert callback.schedule is not None and callback.schedule.steps_done == 16
        assert lightning_steps(callback, 8, 12) == (4,) and callback.schedule.steps_done == 0


# entropies


def test_entropies_tell_independent_pointers_from_copies() -> None:
    grid = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    free = pointer_entropies(grid, 8)
    assert math.isclose(free.h1, 3) and free.h2 is not None and math.isclose(free.h2, 6) and free.max_h1 == 3
    same = pointer_entropies(grid[:, [0, 0]], 8)
    assert same.h2 is not None and math.isclose(same.h2, 3)
    alone = pointer_entropies(torch.zeros(50, 1), 4)
    assert alone.h1 == 0 and alone.h2 is None and alone.dead_codewords == (3,)


def test_entropies_of_large_codebooks_are_counted_in_bounded_memory() -> None:
    codes = torch.arange(5000)[:, None].expand(-1, 2)
    found = pointer_entropies(codes, 2**16)
    assert found.h2 is not None and math.isclose(found.h2, math.log2(5000), rel_tol=1e-6)
    assert found.dead_codewords == (2**16 - 5000,) * 2


def test_a_layer_tells_its_entropies() -> None:
    found = layer(helper=False).entropies()
    assert 3.9 < found.h1 <= 4 and found.h2 is not None and 7.5 < found.h2 <= 8


def test_backpropagation_outside_of_an_observation_touches_nothing() -> None:
    made = layer()
    backpropagate(made, lambda: [made(IDS).sum(1)])
    assert made.codebooks.grad is None


def test_hashes_of_a_converted_file_survive_clustering_saving_and_loading(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, emb: nn.Module) -> None:
            super().__init__()
            self.emb = emb

    torch.save(Model(nn.Embedding(N, D)).state_dict(), tmp_path / "m.pt")
    request = cqr.ConvertOptions(method="cqr", helper="hashed", num_columns=4, n_bits=4, min_rows=0)
    cqr.convert(tmp_path / "m.pt", tmp_path / "s.safetensors", request)
    first, second = Model(nn.Embedding(N, D)), Model(CQREmbedding(N, D, codebook_size=K, preset="paper"))
    for model in (first, second):
        cqr.load_compressed(model, tmp_path / "s.safetensors")
        model.float()
    assert torch.equal(first.emb(IDS), second.emb(IDS))
    with torch.no_grad():
        before = first.emb(IDS)
    cqr.cluster_(first)
    assert not torch.equal(first.emb(IDS), before)
    with torch.no_grad():
        first.emb.codebooks.add_(torch.randn(4, 2, K, 4))  # helpers are not zero after training
    torch.save(first.state_dict(), tmp_path / "t.pt")
    second.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True), strict=True)
    assert torch.equal(first.emb(IDS), second.emb(IDS))
    cqr.load_compressed(first, tmp_path / "s.safetensors")
    assert torch.equal(first.emb(IDS), before) and "emb.hash_seed" not in first.state_dict()
