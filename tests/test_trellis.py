"""Trellis-coded tables: the ring of bits, the search, the fit, and its error beside the rate-distortion bound."""

import itertools
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import cqr_compress as cqr
from cqr_compress.errors import FormatError, ShapeError, SpecError
from cqr_compress.kernel import ops, trellis_ops
from cqr_compress.kernel.trellis_ops import TrellisCodes, TrellisValues
from cqr_compress.quantize.base import FitEffort, importance_of
from cqr_compress.quantize.rates import WINDOWS, allocate
from cqr_compress.quantize.trellis_fit import fit_trellis
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.decode import decode_rows
from cqr_compress.table.spec import TrellisSpec, spec_from_json
from cqr_compress.table.trellis import gain_table, pack_states, seeded_values, window_states

needs_library = pytest.mark.skipif(not ops.available(), reason="no compiled library")


@st.composite
def rings(draw: st.DrawFn, smallest: int = 0) -> tuple[Tensor, int]:
    """Rates of 1 to 40 dimensions that add up to whole bytes, and a window that fits the ring."""
    rates = draw(st.lists(st.integers(smallest, 8), min_size=2, max_size=40))
    rest = -sum(rates) % 8
    for d in range(len(rates)):
        added = min(rest, 8 - rates[d])
        rates[d], rest = rates[d] + added, rest - added
    total = sum(rates)
    if rest or total == 0:
        return draw(rings(smallest))
    return torch.tensor(rates, dtype=torch.uint8), draw(st.integers(4, min(16, total)))


def states_by_definition(codes: Tensor, rates: Tensor, window: int) -> Tensor:
    """Windows of the bits of a row as one long integer, written twice."""
    rows = []
    for row in codes.tolist():
        bits = int.from_bytes(bytes(row), "little")
        ring = bits | bits << 8 * len(row) | bits << 16 * len(row)
        starts = itertools.accumulate(rates.tolist()[:-1], initial=0)
        rows.append([ring >> start & (2**window - 1) for start in starts])
    return torch.tensor(rows, dtype=torch.int32)


@settings(deadline=None, max_examples=150)
@given(rings(), st.integers(0, 2**31), st.integers(0, 9))
def test_windows_of_the_ring_are_read_and_written(ring: tuple[Tensor, int], seed: int, num_rows: int) -> None:
    rates, window = ring
    row_nbytes = int(rates.sum()) // 8
    codes = torch.randint(256, (num_rows, row_nbytes), generator=torch.Generator().manual_seed(seed)).byte()
    states = window_states(codes, rates[None], window)
    assert torch.equal(states, states_by_definition(codes, rates, window).view(num_rows, len(rates)))
    if window >= 8:  # else a state does not contain all bits of a dimension
        assert torch.equal(pack_states(states, rates, row_nbytes), codes)
    if ops.available():
        ids = torch.randint(max(1, num_rows), (13 if num_rows else 0,))
        found = trellis_ops.trellis_states(ids, TrellisCodes(codes, rates[None], window, (row_nbytes,), num_rows))
        assert found is not None and torch.equal(found, states[ids])


@needs_library
@settings(deadline=None, max_examples=60)
@given(
    rings(),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 90),
    st.integers(0, 300),
)
def test_compiled_rows_equal_those_of_torch(
    ring: tuple[Tensor, int], seed: int, with_gain: bool, with_mean: bool, more: int | None, num_ids: int
) -> None:
    rates, window = ring
    generator = torch.Generator().manual_seed(seed)
    N, P, row_nbytes = 7, len(rates), int(rates.sum()) // 8
    D = P if more is None else P + more
    codes = torch.randint(256, (N, row_nbytes), generator=generator).byte()
    values, scale, mean = (torch.randn(n, generator=generator) for n in (2**window, P, D))
    scale, mean = (t.half() if seed % 2 and ops.has_half() else t for t in (scale, mean))
    rotation = None if more is None else torch.randn(P, D, generator=generator) / P**0.5
    gain = torch.randint(256, (N,), generator=generator).byte()
    gain_range = torch.tensor([0.5, 1.5]).to(scale.dtype)
    ids = torch.randint(N, (num_ids,), generator=generator)
    wanted = values[window_states(codes, rates[None], window)] * scale
    wanted = wanted * gain_table(gain_range.float())[gain.long()][:, None] if with_gain else wanted
    wanted = (wanted if rotation is None else wanted @ rotation) + (mean if with_mean else 0.0)
    by = TrellisValues(
        values,
        scale[None],
        mean if with_mean else None,
        *((gain, gain_range) if with_gain else (None, None)),
        rotation,
    )
    given_codes = TrellisCodes(codes, rates[None], window, (row_nbytes,), N)
    found = trellis_ops.trellis_lookup(ids, given_codes, by)
    assert found is not None and torch.allclose(found, wanted[ids], rtol=1e-4, atol=1e-5)
    for each in range(min(3, num_ids)):  # independent of the batch, to the bit
        alone = trellis_ops.trellis_lookup(ids[each : each + 1].clone(), given_codes, by)
        assert alone is not None and torch.equal(alone[0], found[each])


def cost(states: Tensor, rows: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    return ((rows - values[states.long()]).square() * weights).sum(1, dtype=torch.float64)


def searches(rows: Tensor, weights: Tensor, rates: Tensor, window: int, values: Tensor) -> dict[str, Tensor]:
    """States by the compiled search, where there is one, and by torch's; their codes are checked on the way."""
    found = {}
    for name in ("compiled", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "torch":
                patch.setattr("cqr_compress.kernel.ops.available", lambda: False)
            states, codes = search_paths(rows, weights, rates, window, values)
        assert torch.equal(window_states(codes, rates[None], window), states)
        found[name] = states
    return found


@settings(deadline=None, max_examples=60)
@given(rings(smallest=1), st.integers(0, 2**31), st.integers(0, 20))
def test_searches_agree(ring: tuple[Tensor, int], seed: int, num_rows: int) -> None:
    rates, window = ring
    window = max(window, 8)
    if int(rates.sum()) < window:
        return
    generator = torch.Generator().manual_seed(seed)
    rows, values = torch.randn(num_rows, len(rates), generator=generator), seeded_values(min(window, 12), seed)
    weights = torch.rand(len(rates), generator=generator) + 0.1
    costs = [
        cost(states, rows, weights, values)
        for states in searches(rows, weights, rates, min(window, 12), values).values()
    ]
    assert torch.allclose(costs[0], costs[1], rtol=1e-5)


@pytest.mark.parametrize("rates", [[2, 2, 2, 2], [1, 3, 0, 4], [4, 4], [1] * 8, [8, 8], [2, 3, 4, 4, 3]])
@pytest.mark.parametrize("window", [8])
def test_a_path_is_the_best_of_all_through_its_seam(rates: list[int], window: int) -> None:
    kept = torch.tensor([rate for rate in rates if rate], dtype=torch.uint8)
    row_nbytes = int(kept.sum()) // 8
    rows, values = torch.randn(20, len(kept)), torch.randn(2**window)
    weights = torch.rand(len(kept)) + 0.5
    every = torch.arange(2 ** (8 * row_nbytes)).view(-1, 1) >> torch.arange(0, 8 * row_nbytes, 8) & 255
    every_state = window_states(every.byte(), kept[None], window)
    for found in searches(rows, weights, kept, window, values).values():
        for row, path, found_cost in zip(rows, found, cost(found, rows, weights, values), strict=True):
            through = every_state[every_state[:, 0] == path[0]]
            best = cost(through, row.expand(len(through), -1), weights, values).min()
            assert math.isclose(float(found_cost), float(best), rel_tol=1e-5)


def test_paths_do_not_depend_on_threads_and_blocks() -> None:
    rates = torch.tensor([3, 2, 1, 2] * 8, dtype=torch.uint8)
    rows, weights, values = torch.randn(500, 32), torch.ones(32), seeded_values(10, 1)
    whole, codes = search_paths(rows, weights, rates, 10, values)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(search_paths(rows, weights, rates, 10, values)[0], whole)
    finally:
        torch.set_num_threads(threads)
    parts = [search_paths(part, weights, rates, 10, values)[1] for part in rows.split(37)]
    assert torch.equal(torch.cat(parts), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_gaussian_values_is_close_to_the_bound(bits: int) -> None:
    rows = torch.randn(150, 128)
    rates = torch.full((128,), bits, dtype=torch.uint8)
    factor = {1: 0.86, 2: 1.05, 3: 1.1, 4: 1.2}[bits]
    values = seeded_values(10, 0)
    states, _ = search_paths(rows / factor, torch.ones(128), rates, 10, values)
    error = (rows - factor * values[states.long()]).square().mean() / rows.square().mean()
    excess_db = 10 * math.log10(float(error) * 4**bits)
    assert 0.3 < excess_db < {1: 0.7, 2: 0.9, 3: 1.1, 4: 1.4}[bits]


def test_rates_are_those_of_reverse_water_filling() -> None:
    variances = torch.tensor([4.0**k for k in range(6, -1, -1)])
    for window in WINDOWS:
        rates = allocate(variances, 21, window)
        assert rates.dtype == torch.uint8 and int(rates.sum()) == 21
        assert torch.all(rates[:-1] >= rates[1:]) and int(rates.max()) <= 8
        assert (allocate(variances, 8 * 7, window) == 8).all()
    equal = allocate(torch.ones(10), 25, 10)
    assert int(equal.max()) - int(equal.min()) <= 1


def fitted(rows: Tensor, **fields: object) -> tuple[TrellisSpec, float, dict[str, Tensor]]:
    """Fit a layout and return its spec, its relative error and its tensors."""
    base = {"method": "trellis", "num_embeddings": len(rows), "embedding_dim": rows.shape[1], "tier_nbytes": (6,)}
    spec = TrellisSpec(**(base | fields))  # type: ignore[arg-type]
    source = _Rows(rows)
    quantizer = fit_trellis(source, spec, FitEffort(refine_rounds=2))
    tensors = {**quantizer.shared_tensors(), **quantizer.encode(rows, 0)}
    for short, shape in spec.body_shapes().items():
        assert tuple(tensors[short].shape) == shape.shape and tensors[short].dtype == shape.dtype, short
    decoded = decode_rows(spec, tensors, torch.arange(len(rows)))
    return spec, float((rows - decoded).square().sum() / rows.square().sum()), tensors


class _Rows:
    def __init__(self, rows: Tensor, weights: Tensor | None = None) -> None:
        self.sample, self.weights = rows, weights
        self.sample_ids, self.stored_apart_ids = torch.arange(len(rows)), torch.empty(0, dtype=torch.int64)

    def importance(self, power: float) -> Tensor:
        energies = (self.sample - self.sample.mean(0)).square().sum(1)
        return importance_of(energies, power, self.weights, self.stored_apart_ids)

    def blocks(self) -> list[tuple[int, Tensor]]:
        return [(0, self.sample)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rotation", [None, "pca"])
@pytest.mark.parametrize("gain_bits", [0, 8])
@pytest.mark.parametrize("value_source", ["seeded", "stored"])
def test_every_layout_is_fitted(
    table: Tensor, window: int, rotation: str | None, gain_bits: int, value_source: str
) -> None:
    _, error, _ = fitted(
        table, window=window, rotation=rotation, gain_bits=gain_bits, value_source=value_source
    )  # fmt: skip
    assert error < (0.06 if rotation else 0.08)


def test_a_rotation_a_gain_and_a_rank_help_where_they_should(table: Tensor) -> None:
    mixed = table @ torch.linalg.qr(torch.randn(16, 16))[0]
    assert fitted(mixed, rotation="pca")[1] < 0.9 * fitted(mixed)[1]
    norms = torch.randn(len(table), 1).exp() * torch.nn.functional.normalize(torch.randn(len(table), 16))
    assert fitted(norms, gain_bits=8, tier_nbytes=(5,))[1] < 0.7 * fitted(norms)[1]
    flat = table[:, :6] @ torch.randn(6, 16)
    assert fitted(flat, rotation="pca", rank=6)[1] < 0.002


def test_a_mean_takes_no_rates(table: Tensor) -> None:
    assert math.isclose(
        fitted(table + 5)[1] * float((table + 5).square().sum()),
        fitted(table)[1] * float(table.square().sum()),
        rel_tol=0.02,
    )


def test_values_have_one_of_each_interval_after_any_number_of_new_bits() -> None:
    for window, seed in itertools.product(WINDOWS, (0, 7)):
        values = seeded_values(window, seed)
        assert torch.equal(values.half().float(), values) and abs(float(values.mean())) < 1e-3
        ranks = values.argsort().argsort()
        for k in range(1, 9):
            if k <= window:
                groups = ranks.view(-1, 2**k) >> (window - k)
                assert torch.equal(groups.sort(1).values, torch.arange(2**k).expand_as(groups))
    assert not torch.equal(seeded_values(10, 0), seeded_values(10, 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 7}, {"window": 17}, {"rotation": "opq"}, {"rank": 4}, {"rotation": "pca", "rank": 16},
        {"tier_nbytes": (17,)}, {"tier_nbytes": (1,)}, {"tier_nbytes": ()}, {"gain_bits": 4}, {"value_source": "drawn"}, {"codebook_dtype": "int8"},
    ],
)  # fmt: skip
def test_invalid_specs_are_refused(fields: dict[str, object]) -> None:
    base = {"kind": "trellis", "method": "trellis", "num_embeddings": 9, "embedding_dim": 16, "tier_nbytes": (4,)}
    assert isinstance(spec_from_json(base), TrellisSpec)
    assert spec_from_json(spec_from_json(base).to_json()) == spec_from_json(base)
    with pytest.raises(SpecError):
        spec_from_json({**base, **fields})


@needs_library
@pytest.mark.parametrize(
    ("rates", "codes"),
    [([9, 7], (3, 2)), ([8, 8], (3, 3)), ([255, 1], (3, 32)), ([8, 0], (3, 2)), ([0, 0, 0], (3, 1))],
)
def test_rates_that_do_not_match_the_codes_are_refused_before_a_read(
    rates: list[int], codes: tuple[int, int]
) -> None:
    given_rates = torch.tensor(rates, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="do not form a table"):
        table = TrellisCodes(torch.zeros(codes).byte(), given_rates[None], 8, codes[1:], codes[0])
        trellis_ops.trellis_states(torch.zeros(2, dtype=torch.int64), table)
    with pytest.raises(ShapeError):
        pack_states(torch.zeros(2, len(rates), dtype=torch.int64), given_rates, codes[1])


@needs_library
@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**62)])
def test_ids_outside_the_table_are_found(bad: int) -> None:
    codes, rates = torch.zeros(5, 2).byte(), torch.tensor([[8, 8]], dtype=torch.uint8)
    assert trellis_ops.trellis_states(torch.tensor([0, bad]), TrellisCodes(codes, rates, 8, (2,), 5)) is None


def test_a_table_is_converted_within_its_budget(table: Tensor) -> None:
    model = torch.nn.ModuleDict({"item": torch.nn.Embedding.from_pretrained(table)})
    layer = cqr.compress_(model, method="trellis", ratio=8)[0]
    assert isinstance(layer.spec, TrellisSpec) and layer.quality is not None
    assert 0.85 * table.nbytes / 8 < layer.spec.nbytes <= table.nbytes / 8
    assert layer.quality.relative_mse < 0.03


@pytest.mark.parametrize(
    "option", [{"rotation": "opq"}, {"window": 9}, {"n_bits": 4}, {"rank": 8, "rotation": "pca"}]
)
def test_options_of_other_methods_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        cqr.ConvertOptions(method="trellis", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("rotation", [None, "pca"])
def test_constant_columns_and_few_dimensions_are_fitted(rotation: str | None) -> None:
    rows = torch.randn(500, 3)
    rows[:, 1] = 7.0
    _, error, tensors = fitted(rows, rotation=rotation, tier_nbytes=(3,))
    assert error < 1e-4 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert fitted(torch.ones(50, 2), rotation=rotation, tier_nbytes=(2,))[1] < 1e-6


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 0.0012, 0.01, 100.0])
def test_the_error_does_not_depend_on_the_scale_of_a_model(table: Tensor, factor: float) -> None:
    def error(rows: Tensor) -> float:
        model = torch.nn.ModuleDict({"item": torch.nn.Embedding.from_pretrained(rows)})
        quality = cqr.compress_(model, method="trellis", ratio=7, rotation="pca")[0].quality
        assert quality is not None
        return quality.relative_mse

    assert math.isclose(error(table * factor), error(table), rel_tol=0.02)


def test_rows_that_almost_equal_the_mean_do_not_spoil_the_gains_of_the_others() -> None:
    rows = (torch.randn(300, 16) * 64 * torch.randn(300, 1).exp()).round() / 64  # sums are exact
    rows = torch.cat([rows, -rows])
    error = fitted(rows, gain_bits=8)[1]
    assert fitted(torch.cat([rows, torch.full((1, 16), 1e-12)]), gain_bits=8)[1] < 1.05 * error < 0.1
    assert fitted(torch.ones(50, 16), gain_bits=8)[1] < 1e-6


@pytest.mark.parametrize("scale", [1e-14, 1e-10, 1.0, 1e14])
def test_the_error_does_not_depend_on_the_scale_of_a_table(table: Tensor, scale: float) -> None:
    error = fitted(table, codebook_dtype="float32")[1]
    assert math.isclose(fitted(table * scale, codebook_dtype="float32")[1], error, rel_tol=0.1)


def test_a_table_of_many_dimensions_takes_no_square_matrix() -> None:
    """A matrix of all pairs of its dimensions would take 13 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fitted(torch.randn(8, 40_000), tier_nbytes=(5000,))[1] < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_the_rank_does_not_depend_on_the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqr_compress.planning.scan._SPECTRUM_ROWS", 300)
    rows = torch.cat([torch.randn(300, 2) @ torch.randn(2, 32), torch.randn(600, 32)])
    model = torch.nn.ModuleDict({"item": torch.nn.Embedding.from_pretrained(rows)})
    layer = cqr.compress_(model, method="trellis", ratio=8, rotation="pca", effort="fast", min_rows=0)[0]
    assert isinstance(layer.spec, TrellisSpec) and layer.spec.width > 24


@needs_library
def test_windows_that_do_not_hold_the_bits_of_a_dimension_are_not_searched() -> None:
    """The number of states that lead to one would be 0, and the search would not end."""
    with pytest.raises(ShapeError, match="do not form a trellis with windows of 7 bits"):
        search_paths(
            torch.randn(3, 2), torch.ones(2), torch.tensor([8, 8], dtype=torch.uint8), 7, torch.randn(128)
        )


@pytest.fixture(scope="module")
def trellis_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trellis")
    rows = torch.randn(60, 16) * torch.randn(60, 1).exp()
    torch.save({"embedding.weight": rows}, folder / "dense.pt")
    convert = {"method": "trellis", "ratio": 2, "min_rows": 0, "tables": ["embedding.weight"]}
    cqr.convert(folder / "dense.pt", folder / "small.safetensors", **convert)
    return folder / "small.safetensors"


def changed(source: Path, to: Path, other: dict[str, Tensor]) -> Path:
    """Write a compressed file with a spec without gains, with other tensors, and without checksums."""
    with safe_open(source, "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    header = json.loads(metadata["cqr_compress"])
    header["tables"]["embedding.weight"]["spec"] |= {"gain_bits": 0, "value_source": "seeded"}
    tensors = {
        name: t for name, t in load_file(source).items() if name.split(".")[1] not in ("row_gain", "gain_range")
    }
    save_file({**tensors, **other}, to, {"format": "cqr_compress", "cqr_compress": json.dumps(header)})
    return to


@pytest.mark.parametrize("change", [lambda rates: rates[0, 0].add_(1), lambda rates: rates[0, 0].fill_(200)])
def test_a_file_with_rates_of_other_rows_is_refused(
    trellis_file: Path, tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    rates = load_file(trellis_file)["embedding.dim_rates"]
    change(rates)
    path = changed(trellis_file, tmp_path / "x.safetensors", {"embedding.dim_rates": rates})
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(60, 16)})
    for read in (
        lambda: cqr.load_dense_state_dict(path),
        lambda: cqr.export(path, tmp_path / "dense.safetensors"),
        lambda: cqr.load_compressed(model, path),
    ):
        with pytest.raises(FormatError, match="dim_rates of table 'embedding.weight' are damaged: rates of at"):
            read()
    assert not (tmp_path / "dense.safetensors").exists() and isinstance(model["embedding"].weight, Tensor)


@pytest.mark.parametrize("short", ["row_gain", "gain_range", "state_values"])
def test_a_tensor_that_the_layout_of_a_trellis_does_not_read_is_refused(
    trellis_file: Path, tmp_path: Path, short: str
) -> None:
    path = changed(trellis_file, tmp_path / "x.safetensors", {f"embedding.{short}": torch.zeros(2)})
    with pytest.raises(FormatError, match=f"'embedding.{short}', which the layout of table .* does not read"):
        cqr.load_dense_state_dict(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rotation", [None, "pca"])
def test_every_codebook_dtype_is_fitted(table: Tensor, dtype: str, rotation: str | None) -> None:
    assert fitted(table, codebook_dtype=dtype, rotation=rotation, gain_bits=8)[1] < 0.08


@pytest.mark.parametrize(("dim", "ratio", "window"), [(1, 2, 8), (5, 8, 8), (16, 12, 8), (16, 6, 10), (64, 8, 12)])
def test_windows_are_shorter_for_rows_of_few_bytes(dim: int, ratio: float, window: int) -> None:
    rows = torch.randn(1000, dim)
    errors = {}
    for asked in (None, 12) if dim > 1 else (None,):
        model = torch.nn.ModuleDict({"item": torch.nn.Embedding.from_pretrained(rows)})
        effort = "normal" if window == 12 else "fast"  # a fast search has windows of up to 10 bits
        layer = cqr.compress_(model, method="trellis", ratio=ratio, window=asked, min_rows=0, effort=effort)[0]
        assert isinstance(layer.spec, TrellisSpec) and layer.quality is not None
        assert layer.spec.window == (asked or window)
        errors[asked] = layer.quality.relative_mse
    assert window == 12 or errors[None] < errors.get(12, 1.0)


def test_threads_of_a_search_share_the_memory() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert [trellis_ops.search_threads(rows, 64, 10) for rows in (0, 20, 40, 1000)] == [1, 1, 2, 4]
        assert [trellis_ops.search_threads(1000, dim, 12) for dim in (30_000, 60_000, 200_000)] == [2, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_a_refit_with_frequencies_lowers_the_weighted_error(trellis_file: Path, tmp_path: Path) -> None:
    original, made_file = trellis_file.with_name("dense.pt"), tmp_path / "x.safetensors"
    (rows,) = (rows for rows in torch.load(original).values() if rows.dim() == 2)
    counts = 1e4 / torch.arange(1, len(rows) + 1)
    report = cqr.refit(trellis_file, made_file, original=original, frequencies={"embedding.weight": counts})
    given, made = load_file(trellis_file), load_file(made_file)
    assert {name: (t.dtype, t.shape) for name, t in given.items()} == {
        n: (t.dtype, t.shape) for n, t in made.items()
    }

    def error(path: Path) -> float:
        decoded = cqr.load_dense_state_dict(path)["embedding.weight"]
        return float(((rows - decoded).square().sum(1) * counts).sum() / (rows.square().sum(1) * counts).sum())

    assert error(made_file) < error(trellis_file)
    assert report.tables[0].weighted_relative_mse == pytest.approx(error(made_file), rel=0.05)


def test_values_made_under_a_mode_are_not_held_for_others() -> None:
    with FakeTensorMode():
        assert isinstance(seeded_values(9, 12345), FakeTensor)
    assert type(seeded_values(9, 12345)) is Tensor
