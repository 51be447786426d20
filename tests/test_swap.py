"""A compressed file in the user's own model: the same outputs as the dense file's, everything else untouched."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding, CompressedEmbeddingBag, CompressedTable, ConvertOptions
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import SwapError, TableNotFoundError, TableRefusedError, WeightWriteError
from cqr_compress.model.load import load_checkpoint


class Scaled(nn.Embedding):
    """A subclass as transformers has them."""

    def __init__(self, n: int, d: int, scale: float) -> None:
        super().__init__(n, d)
        self.scale = nn.Buffer(torch.tensor(scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale.to(self.weight.dtype)


class Functional(nn.Embedding):
    """A subclass that uses its weight itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx) + self.weight[0]


class Model(nn.Module):
    """Layers of every kind: plain, bag, subclasses, tied head, tied layer, shared layer, bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(1200, 16, padding_idx=0)
        self.bag = nn.EmbeddingBag(1100, 16, mode="sum", padding_idx=1)
        self.scaled = Scaled(1300, 16, 3.0)
        self.functional = Functional(1050, 16, padding_idx=2)
        self.relation = nn.Parameter(torch.randn(1150, 16))
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.again = nn.ModuleDict({"item": self.item})
        self.decoder = nn.Embedding(1200, 16)
        self.decoder.weight = self.item.weight
        self.head = nn.Linear(16, 1200)
        self.head.weight = self.item.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.item(ids) + self.bag(ids[:, None]) + self.scaled(ids) + self.functional(ids)
        h = h + self.relation[ids] + self.again["item"](ids) + self.decoder(ids)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.head(h) + h @ self.item.weight.T


pytestmark = pytest.mark.filterwarnings("ignore:.* shares its values with:cqr_compress.errors.CqrCompressWarning")
TABLES = ["item.weight", "bag.weight", "scaled.weight", "functional.weight", "relation"]
IDS = torch.randint(1050, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's checkpoint, compressed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    torch.save(Model().state_dict(), folder / "ckpt.pt")
    cqr.convert(
        folder / "ckpt.pt", folder / "small.safetensors", ConvertOptions(method="pq", ratio=4), tables=TABLES
    )
    return folder / "small.safetensors"


@pytest.fixture
def loaded(small: Path) -> Model:
    model = Model()
    cqr.load_compressed(model, small)
    return model


@pytest.fixture
def exported(small: Path) -> Model:
    model = Model()
    model.load_state_dict(cqr.load_dense_state_dict(small))
    return model


def tables_of(path: Path) -> dict[str, CompressedTable]:
    with open_checkpoint(path) as checkpoint:
        opened = CompressedFile.from_checkpoint(checkpoint)
        return {name: opened.table(name) for name in opened.specs}


def snapshot(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return repr(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[str, dict[str, Tensor]]) -> None:
    after = snapshot(model)
    assert after[0] == before[0] and after[1].keys() == before[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(after[1].values(), before[1].values(), strict=True))


def test_outputs_equal_those_of_the_exported_dense_model(loaded: Model, exported: Model) -> None:
    assert torch.allclose(loaded(IDS), exported(IDS), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS), exported(IDS), atol=1e-5)
    assert torch.allclose(loaded.eval()(IDS.int()), exported.eval()(IDS.int()), atol=1e-5)


def test_gradients_of_other_tensors_equal_those_of_the_dense_model(loaded: Model, exported: Model) -> None:
    for model in (loaded, exported):
        F.cross_entropy(model(IDS), IDS).backward()
    for name in ("head.bias", "blocks.0.weight", "blocks.1.bias"):
        assert torch.allclose(loaded.get_parameter(name).grad, exported.get_parameter(name).grad, atol=1e-5)
    assert loaded.item.codebooks.grad.abs().sum() > 0


def test_layers_are_swapped_in_place_and_tied_ones_stay_one(small: Path) -> None:
    model = Model()
    before = dict(model.named_modules())
    done = cqr.load_compressed(model, small)
    assert done.missing == done.unexpected == ()
    assert set(done.tables) == {*TABLES, "decoder.weight", "head.weight"}
    assert type(model.item) is CompressedEmbedding and type(model.bag) is CompressedEmbeddingBag
    assert all(dict(model.named_modules())[path] is module for path, module in before.items())
    assert model.again["item"] is model.item and model.decoder.owner is model.item
    assert isinstance(model, Model) and isinstance(model.scaled, Scaled) and isinstance(model.head, nn.Linear)
    assert model.item.padding_idx == 0 and model.decoder.padding_idx is None
    assert model.decoder.nbytes == model.decoder.num_parameters == 0


def test_the_model_holds_the_bytes_of_the_file_and_no_dense_table(loaded: Model, small: Path) -> None:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*loaded.parameters(), *loaded.buffers()]
    }
    resident = sum(size for pointer, size in storages.items() if pointer)
    specs = cqr.inspect(small)
    others = sum(
        t.nbytes for t in [*loaded.blocks.parameters(), loaded.head.bias, loaded.steps, loaded.scaled.scale]
    )
    assert resident == sum(table.bytes_after for table in specs.tables) + others


def test_the_state_dict_is_the_file(loaded: Model, small: Path) -> None:
    with open_checkpoint(small) as checkpoint:
        in_file = {name: entry.stored.read().clone() for name, entry in checkpoint.entries.items()}
    assert all(in_file.pop(name).shape == (0,) for name in TABLES)
    state = {k: v for k, v in loaded.state_dict().items() if not k.startswith("again.")}
    state = {k.replace("relation_compressed.", "relation."): v for k, v in state.items()}
    assert state.keys() == in_file.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in in_file.items())
    other = Model()
    cqr.load_compressed(other, small)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(other(IDS), loaded(IDS))


def test_a_layer_loads_its_tensors_from_the_file_as_from_a_state_dict(small: Path) -> None:
    layer = CompressedEmbedding(tables_of(small)["item.weight"])
    state = {name[5:]: tensor for name, tensor in load_file(small).items() if name.startswith("item.")}
    assert state["weight"].numel() == 0
    layer.load_state_dict(state, strict=True)
    layer.load_state_dict(load_file(small), strict=False)


def test_loading_does_not_hold_on_to_the_file(small: Path, tmp_path: Path, exported: Model) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(small.read_bytes())
    with cqr.init_empty_weights():
        model = Model()
    cqr.load_compressed(model, path)
    with path.open("r+b") as file:
        file.truncate(1)
    assert torch.allclose(model(IDS), exported(IDS), atol=1e-5)


def test_copies_and_pickles_of_a_loaded_model_work(loaded: Model) -> None:
    expected = loaded(IDS)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(other(IDS), expected)
        assert other.decoder.owner is other.item is not loaded.item and type(other) is type(loaded)
        other.item.codebooks.data.zero_()
    assert torch.equal(loaded(IDS), expected)


def test_tied_layers_move_together(loaded: Model) -> None:
    codes = loaded.item.codes
    loaded.half().bfloat16()
    assert loaded.decoder(IDS).dtype == loaded.head.weight.dtype == torch.bfloat16
    assert loaded.item.codes.data_ptr() == codes.data_ptr() and loaded(IDS).dtype == torch.bfloat16


def test_hooks_and_references_survive(small: Path) -> None:
    model = Model()
    seen: list[Tensor] = []
    model.item.register_forward_hook(lambda module, args, output: seen.append(output))
    held = [model.item]
    cqr.load_compressed(model, small)
    held[0](IDS)
    assert len(seen) == 1 and held[0] is model.item


def test_weights_stay_frozen_and_keep_their_dtype(small: Path) -> None:
    model = Model().half()
    model.item.weight.requires_grad_(False)
    cqr.load_compressed(model, small)
    assert not model.item.codebooks.requires_grad and model.bag.codebooks.requires_grad
    assert model.item(IDS).dtype == model.relation.dtype == torch.float16
    exported = Model().half()
    exported.load_state_dict(cqr.load_dense_state_dict(small))
    assert torch.allclose(model(IDS), exported(IDS), atol=0.1, rtol=0.02)


def test_decompress_gives_the_dense_model_back(loaded: Model, exported: Model) -> None:
    names = cqr.decompress_(loaded)
    assert set(names) == {*TABLES, "decoder.weight", "head.weight"}
    assert type(loaded) is Model and type(loaded.item) is nn.Embedding and type(loaded.scaled) is Scaled
    assert type(loaded.bag) is nn.EmbeddingBag and type(loaded.head) is nn.Linear
    assert loaded.head.weight is loaded.item.weight is loaded.decoder.weight
    assert list(loaded.state_dict()) == list(exported.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), exported.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(IDS), exported(IDS)) and repr(loaded) == repr(exported)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in exported.named_parameters()]
    assert cqr.decompress_(loaded) == []
    copy.deepcopy(loaded), pickle.dumps(loaded)


def test_a_file_can_be_loaded_again_and_after_decompression(loaded: Model, small: Path) -> None:
    expected = loaded(IDS)
    for parameter in loaded.parameters():
        parameter.data.zero_()
    assert cqr.load_compressed(loaded, small).missing == ()
    assert torch.equal(loaded(IDS), expected)
    cqr.decompress_(loaded)
    cqr.load_compressed(loaded, small)
    assert torch.equal(loaded(IDS), expected)


def test_building_on_meta_needs_no_dense_table(small: Path, exported: Model) -> None:
    with cqr.init_empty_weights():
        model = Model()
    assert all(p.is_meta for p in model.parameters()) and not model.steps.is_meta
    assert model.head.weight is model.item.weight
    assert not nn.Linear(2, 2).weight.is_meta
    cqr.load_compressed(model, small)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.allclose(model(IDS), exported(IDS), atol=1e-5)


def test_a_model_made_on_the_meta_device_is_refused_where_a_buffer_would_stay_empty(small: Path) -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(SwapError, match=r"on the meta device are not in the file: 'scaled.scale'"):
        cqr.load_compressed(model, small)


def test_device_moves_the_whole_model(small: Path) -> None:
    model = Model()
    cqr.load_compressed(model, small, device="meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_tied_dense_tensors_stay_tied_on_meta(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(2000, 8)
            self.a = nn.Linear(8, 8, bias=False)
            self.b = nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

    torch.save(Tied().state_dict(), tmp_path / "t.pt")
    cqr.convert(tmp_path / "t.pt", tmp_path / "t.safetensors", ConvertOptions(ratio=4), tables=["table.weight"])
    with cqr.init_empty_weights():
        model = Tied()
    cqr.load_compressed(model, tmp_path / "t.safetensors")
    assert model.a.weight is model.b.weight and not model.a.weight.is_meta


# ---- what does not fit


def refusal(action: Callable[[], Any], model: nn.Module) -> str:
    before = snapshot(model)
    with pytest.raises(SwapError) as caught:
        action()
    assert_unchanged(model, before)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed_and_nothing_changes(small: Path) -> None:
    model = Model()
    model.item = nn.Embedding(1200, 8)
    del model.bag
    model.extra = nn.Linear(2, 2)
    model.blocks[0] = nn.Linear(16, 4)
    message = refusal(lambda: cqr.load_compressed(model, small), model)
    assert "'item.weight': the table is 1200 x 16, the tensor is 1200 x 8" in message
    assert "the model has no layer for these tables of the file: 'bag.weight'" in message
    assert "the file does not have these tensors of the model: 'extra.bias', 'extra.weight'" in message
    assert "'blocks.0.weight' is [16, 16] in the file and [4, 16] in the model" in message
    assert "layers: item.weight, scaled.weight, functional.weight, again.item.weight, decoder.weight." in message


def test_not_strict_loads_what_fits_and_says_what_did_not(small: Path, exported: Model) -> None:
    model = Model()
    del model.bag
    model.extra = nn.Linear(2, 2)
    done = cqr.load_compressed(model, small, strict=False)
    assert done.missing == ("extra.bias", "extra.weight") and done.unexpected == ("bag.weight",)
    assert torch.equal(model.item(IDS), exported.item(IDS))
    model.blocks[0] = nn.Linear(16, 4)
    assert "'blocks.0.weight'" in refusal(lambda: cqr.load_compressed(model, small, strict=False), model)


def test_other_programs_fail_instead_of_leaving_random_rows(small: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"size mismatch for item.weight: .*torch.Size\(\[0\]\) from checkpoint"
    ):
        Model().load_state_dict(load_file(small), strict=False)
    with safe_open(small, "pt") as file:
        assert file.metadata()["format"] == "pt"


class Positions(nn.Module):
    """Computes positions, as encoders do whose older files contain them."""

    _keys_to_ignore_on_load_unexpected = (r"^pooler\.", r"token_mask$")

    def __init__(self, length: int = 512) -> None:
        super().__init__()
        self.item = nn.Embedding(1200, 16)
        self.register_buffer("position_ids", torch.arange(length)[None], persistent=False)


class Encoder(nn.Module):
    def __init__(self, length: int = 512) -> None:
        super().__init__()
        self.inner = Positions(length)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A file with tensors that the model computes or ignores, and its dense source."""
    computed = {
        "inner.position_ids": torch.arange(512)[None],
        "inner.pooler.weight": torch.randn(3, 3),
        "inner.x.token_mask": torch.zeros(2),
    }
    torch.save(Encoder().state_dict() | computed, tmp_path / "older.pt")
    cqr.convert(
        tmp_path / "older.pt", tmp_path / "older.safetensors", tables=["inner.item.weight"], ratio=4, effort="fast"
    )
    return tmp_path / "older.safetensors"


def test_tensors_that_the_model_computes_are_skipped_with_a_note(older: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "cqr_compress")
    model = Encoder()
    done = cqr.load_compressed(model, older)
    assert set(done.skipped) == {"inner.position_ids", "inner.pooler.weight", "inner.x.token_mask"}
    assert done.unexpected == done.missing == ()
    assert "skipped 'inner.position_ids' of the file, which the model computes itself or ignores" in caplog.text
    assert torch.equal(model.inner.position_ids, torch.arange(512)[None])
    cqr.save_compressed(model, older.with_name("again.safetensors"), template=older)
    assert set(cqr.load_dense_state_dict(older.with_name("again.safetensors"))) == set(
        cqr.load_dense_state_dict(older)
    )


def test_a_dense_checkpoint_with_computed_tensors_loads_too(older: Path) -> None:
    model = Encoder()
    load_checkpoint(model, older.with_name("older.pt"))
    assert torch.equal(model.inner.item.weight, torch.load(older.with_name("older.pt"))["inner.item.weight"])


def test_only_tensors_of_the_same_shape_and_path_are_skipped(older: Path, tmp_path: Path) -> None:
    message = refusal(lambda: cqr.load_compressed(model, older), model := Encoder(length=256))
    assert "the model does not have these tensors of the file: 'inner.position_ids'" in message
    torch.save(Encoder().state_dict() | {"pooler.weight": torch.randn(3, 3)}, tmp_path / "other.pt")
    cqr.convert(
        tmp_path / "other.pt", tmp_path / "other.safetensors", tables=["inner.item.weight"], ratio=4, effort="fast"
    )
    message = refusal(lambda: cqr.load_compressed(model, tmp_path / "other.safetensors"), model := Encoder())
    assert "the model does not have these tensors of the file: 'pooler.weight'" in message


def test_wrapper_prefixes_come_off_and_others_are_named(small: Path, tmp_path: Path, exported: Model) -> None:
    for prefix in ("module.", "net."):
        torch.save({prefix + k: v for k, v in Model().state_dict().items()}, tmp_path / "p.pt")
        tables = [prefix + name for name in TABLES]
        path = tmp_path / "p.safetensors"
        cqr.convert(tmp_path / "p.pt", path, ConvertOptions(method="pq", ratio=4), tables=tables, force=True)
        model = Model()
        if prefix == "net.":
            message = refusal(functools.partial(cqr.load_compressed, model, path), model)
            assert "The file's names begin with 'net.': pass prefix='net.'." in message
            cqr.load_compressed(model, path, prefix="net.")
        else:
            cqr.load_compressed(model, path)
        dense = Model()
        dense.load_state_dict({k.removeprefix(prefix): v for k, v in cqr.load_dense_state_dict(path).items()})
        assert torch.allclose(model(IDS), dense(IDS), atol=1e-5)


@pytest.mark.usefixtures("process_group")
def test_a_compiled_model_is_unwrapped_and_ddp_is_refused(small: Path) -> None:
    model = torch.compile(Model(), backend="eager")
    cqr.load_compressed(model, small)
    assert isinstance(model.item, CompressedEmbedding)
    wrapped = nn.parallel.DistributedDataParallel(Model())
    with pytest.raises(SwapError, match="DistributedDataParallel keeps references to its parameters"):
        cqr.load_compressed(wrapped, small)


def test_an_untied_head_of_the_file_unties_the_model(tmp_path: Path, small: Path) -> None:
    state = Model().state_dict()
    torch.save(state, tmp_path / "u.pt")
    request = ConvertOptions(method="pq", ratio=4)
    path = tmp_path / "u.safetensors"
    cqr.convert(tmp_path / "u.pt", path, request, tables=TABLES, untie=True)
    model = Model()
    cqr.load_compressed(model, path)
    assert torch.equal(model.head.weight, state["item.weight"]) and type(model.head) is nn.Linear
    assert type(model.item) is CompressedEmbedding and type(model.decoder) is nn.Embedding
    assert torch.equal(model.decoder.weight, state["item.weight"])


def test_a_model_that_does_not_tie_gets_layers_of_its_own(small: Path, exported: Model) -> None:
    model = Model()
    model.decoder = nn.Embedding(1200, 16)
    model.head = nn.Linear(16, 1200)
    cqr.load_compressed(model, small)
    assert type(model.decoder) is CompressedEmbedding and model.decoder.owner is model.decoder
    assert type(model.head) is nn.Linear and isinstance(model.head._parameters["weight"], nn.Parameter)
    assert torch.allclose(model(IDS), exported(IDS), atol=1e-5)
    model.decoder.codebooks.data.zero_()
    assert torch.allclose(model.item(IDS), exported.item(IDS), atol=1e-6)


def test_files_that_are_not_compressed_are_refused(tmp_path: Path) -> None:
    torch.save(Model().state_dict(), tmp_path / "d.pt")
    with pytest.raises(cqr.CqrCompressError, match="is not a compressed checkpoint"):
        cqr.load_compressed(Model(), tmp_path / "d.pt")


# ---- swap_embeddings_


def test_swapping_refuses_all_that_cannot_work_at_once(small: Path) -> None:
    class OwnWeight(nn.Embedding):
        @property
        def weight(self) -> Tensor:
            return self._weight

        @weight.setter
        def weight(self, value: Tensor) -> None:
            self._parameters["weight"] = value
            self._weight = value

    table = tables_of(small)["item.weight"]
    model = nn.ModuleDict({"a": OwnWeight(1200, 16), "b": nn.Embedding(1200, 8), "c": nn.Linear(16, 4)})
    message = refusal(
        lambda: cqr.swap_embeddings_(model, {f"{name}.weight": table for name in "abcd"} | {"c.bias": table}),
        model,
    )
    assert "'a.weight': OwnWeight defines its own `weight`" in message
    assert "'b.weight': the table is 1200 x 16, the tensor is 1200 x 8" in message
    assert "'c.weight': the table is 1200 x 16, the tensor is 4 x 16" in message
    assert "'d.weight': the model has no such tensor" in message
    assert "'c.bias': the table is 1200 x 16, the tensor is 4" in message
    assert "Its embedding layers: a.weight, b.weight." in message


def test_two_tables_for_one_tied_weight_are_refused(small: Path) -> None:
    model, table = Model(), tables_of(small)["item.weight"]
    message = refusal(lambda: cqr.swap_embeddings_(model, {"item.weight": table, "head.weight": table}), model)
    assert "'head.weight': the model ties it to another table, 'item.weight'" in message


def test_the_model_itself_can_be_the_layer(small: Path) -> None:
    layer = nn.Embedding(1200, 16)
    assert cqr.swap_embeddings_(layer, {"weight": tables_of(small)["item.weight"]}) == ["weight"]
    assert type(layer) is CompressedEmbedding


def test_sparse_gradients_are_given_up_with_a_warning(small: Path) -> None:
    layer = nn.EmbeddingBag(1200, 16, mode="sum", sparse=True)
    with pytest.warns(UserWarning, match="sparse=True has no effect"):
        cqr.swap_embeddings_(layer, {"weight": tables_of(small)["item.weight"]})
    layer(IDS[None]).sum().backward()
    assert not layer.codebooks.grad.is_sparse


def test_assigning_and_tying_again(loaded: Model) -> None:
    loaded.head.weight = loaded.item.weight
    loaded.item.weight = loaded.head.weight
    loaded.relation = loaded.relation
    with pytest.raises(WeightWriteError):
        loaded.head.weight = nn.Parameter(torch.zeros(1200, 16))
    with pytest.raises(WeightWriteError):
        loaded.relation = nn.Parameter(torch.zeros(1150, 16))
    with pytest.raises(ValueError, match="non-leaf"):
        loaded.blocks[0].weight = loaded.item.weight
    assert isinstance(loaded.get_parameter("head.weight"), nn.Parameter)


def test_products_of_a_tied_head_do_not_decode(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressedEmbedding, "decode", lambda self: pytest.fail("decoded"))
    with torch.no_grad():
        assert loaded.head(torch.randn(3, 16)).shape == (3, 1200)


@pytest.mark.filterwarnings("ignore:(?s).*created when tracing:UserWarning")  # torch before 2.7, this and the next
@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")
def test_a_loaded_model_compiles_and_exports(loaded: Model) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IDS), loaded(IDS), atol=1e-4)
    program = torch.export.export(loaded, (IDS,))
    assert torch.allclose(program.module()(IDS), loaded(IDS), atol=1e-4)


# ---- compress_


def test_a_live_model_is_compressed_without_a_file() -> None:
    torch.manual_seed(0)
    model = Model()
    dense = copy.deepcopy(model)
    done = cqr.compress_(model, ratio=4.0, effort="fast")
    assert [layer.name for layer in done] == ["item.weight", "bag.weight", "scaled.weight", "functional.weight"]
    assert all(layer.spec is not None and layer.quality is not None for layer in done)
    assert all(layer.spec.dense_nbytes / layer.spec.nbytes >= 4 for layer in done if layer.spec)
    assert type(model.item) is CompressedEmbedding and isinstance(model._parameters.get("relation"), nn.Parameter)
    error = (model.item.weight - dense.item.weight).square().sum() / dense.item.weight.square().sum()
    assert float(error.detach()) == pytest.approx(done[0].quality.relative_mse, rel=1e-3)
    assert torch.equal(model.item(torch.tensor([0])), torch.zeros(1, 16))


def test_a_request_and_patterns_choose_what_is_compressed() -> None:
    model = Model()
    done = cqr.compress_(model, ConvertOptions(method="int8"), tables=["re:item|relation"])
    assert [layer.name for layer in done] == ["item.weight", "relation"] and type(model.bag) is nn.EmbeddingBag
    assert done[0].spec is not None and done[0].spec.method == "int8"
    again = cqr.compress_(model, ConvertOptions(method="int8"), exclude=["bag.*"])
    assert [layer.name for layer in again] == ["scaled.weight", "functional.weight"]


def test_a_spec_gives_its_layout_to_every_table() -> None:
    model = Model()
    first = cqr.compress_(
        model, ConvertOptions(method="prq", num_columns=4, num_levels=2, n_bits=4), tables=["item.weight"]
    )
    assert first[0].spec is not None
    done = cqr.compress_(model, first[0].spec, tables=["bag.weight", "scaled.weight"])
    assert [layer.spec.layout for layer in done if layer.spec] == [first[0].spec.layout] * 2
    assert [layer.spec.num_embeddings for layer in done if layer.spec] == [1100, 1300]
    rowwise = cqr.compress_(Model(), ConvertOptions(method="int4"))[0].spec
    assert rowwise is not None and cqr.compress_(Model(), rowwise)[1].spec.method == "int4"
    for method, fixed in (("pq", {"num_columns": 4}), ("rq", {"num_levels": 3})):
        spec = cqr.compress_(Model(), ConvertOptions(method=method, n_bits=4, **fixed))[0].spec
        assert spec is not None and cqr.compress_(Model(), spec)[1].spec.layout == spec.layout
    hashed = cqr.compress_(Model(), ConvertOptions(method="hash", ratio=4))[0].spec
    with pytest.raises(cqr.CqrCompressError, match="give a ratio"):
        cqr.compress_(Model(), hashed)


def test_a_model_without_a_table_is_refused() -> None:
    with pytest.raises(TableNotFoundError, match="Linear has no embedding layer"):
        cqr.compress_(nn.Linear(3, 3), ratio=4.0)
    with pytest.raises(TableNotFoundError, match="no table of 'Embedding' would gain"):
        cqr.compress_(nn.Embedding(1, 1), ratio=4.0)
    model = Model()
    before = snapshot(model)
    with pytest.raises(cqr.CqrCompressError, match="smallest layout"):
        cqr.compress_(model, ratio=10_000.0)
    assert_unchanged(model, before)


# ---- reloading, sharing and names


def converted(model: nn.Module, path: Path, tables: list[str], ratio: float = 4.0) -> Path:
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    cqr.convert(path.with_suffix(".pt"), path, ConvertOptions(method="pq", ratio=ratio), tables=tables, force=True)
    return path


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(1200, 16), nn.Embedding(1200, 16)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_another_table_reaches_all_tied_layers_by_any_of_their_names(tmp_path: Path, name: str) -> None:
    model = Tied()
    cqr.load_compressed(model, converted(Tied(), tmp_path / "one.safetensors", ["a.weight"], 4))
    (table,) = tables_of(converted(Tied(), tmp_path / "two.safetensors", ["a.weight"], 9)).values()
    cqr.swap_embeddings_(model, {name: table})
    rows = table.decode()[IDS]
    assert torch.allclose(model.a(IDS), rows, atol=1e-6) and torch.allclose(model.b(IDS), rows, atol=1e-6)


@pytest.mark.parametrize("table", ["a.weight", "b.weight"])
def test_another_file_reaches_all_tied_layers(tmp_path: Path, table: str) -> None:
    model = Tied()
    cqr.load_compressed(model, converted(Tied(), tmp_path / "one.safetensors", ["a.weight"], 4))
    second = converted(Tied(), tmp_path / "two.safetensors", [table], 9)
    cqr.load_compressed(model, second)
    rows = cqr.load_dense_state_dict(second)["a.weight"]
    assert torch.allclose(model.a(IDS), rows[IDS], atol=1e-6) and torch.equal(model.a(IDS), model.b(IDS))
    assert model.b.spec == model.a.spec
    cqr.decompress_(model)
    assert model.a.weight is model.b.weight and torch.equal(model.a.weight, rows)


def test_a_name_that_is_taken_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = nn.Module()
    model.item = nn.Parameter(torch.randn(1200, 16))
    file = converted(model, tmp_path / "n.safetensors", ["item"])
    model.item_compressed = nn.Linear(2, 2)
    message = refusal(lambda: cqr.load_compressed(model, file, strict=False), model)
    assert "'item': Module already has an attribute 'item_compressed'" in message


def test_a_subclass_with_a_second_table_and_a_bias_is_handled(tmp_path: Path) -> None:
    class Two(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(1200, 16)
            self.other = nn.Parameter(torch.randn(1300, 16))
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.other[input] + self.bias

    torch.manual_seed(0)
    file = converted(nn.ModuleDict({"t": Two()}), tmp_path / "t.safetensors", ["t.weight", "t.other"])
    dense = nn.ModuleDict({"t": Two()})
    dense.load_state_dict(cqr.load_dense_state_dict(file))
    with cqr.init_empty_weights():
        on_meta = nn.ModuleDict({"t": Two()})
    for model in (nn.ModuleDict({"t": Two()}), on_meta):
        cqr.load_compressed(model, file)
        assert torch.allclose(model["t"](IDS), dense["t"](IDS), atol=1e-5)
        assert torch.allclose(copy.deepcopy(model)["t"](IDS), dense["t"](IDS), atol=1e-5)
        cqr.decompress_(model)
        assert type(model["t"]) is Two and torch.equal(model["t"](IDS), dense["t"](IDS))


def test_a_parameter_that_two_modules_share_stays_shared_on_meta() -> None:
    with cqr.init_empty_weights():
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        shared = nn.Parameter(torch.ones(2, 2))
        first.weight = shared
        second.weight = shared
        nn.LazyLinear(3)
    assert first.weight is second.weight and first.weight.is_meta


@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_is_refused_everywhere(small: Path) -> None:
    wrapped = nn.parallel.DistributedDataParallel(nn.Embedding(1200, 16))
    with pytest.raises(SwapError, match="before wrapping"):
        cqr.compress_(wrapped, ratio=4.0)
    with pytest.raises(SwapError, match="before wrapping"):
        cqr.swap_embeddings_(wrapped, {"module.weight": tables_of(small)["item.weight"]})


class Own(nn.Embedding):
    """A subclass whose own methods and submodules bear names that a layer might use."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__(n, d)
        self.rows = nn.Linear(d, d)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * 4

    def lookup(self, ids: Tensor) -> Tensor:
        return self(ids)

    def project(self, ids: Tensor) -> Tensor:
        return self.rows(self(ids))


class OwnBag(nn.EmbeddingBag):
    def lookup(self, ids: Tensor) -> Tensor:
        return self(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self(ids)


def test_methods_of_a_subclass_do_not_take_the_place_of_the_layers() -> None:
    model = nn.ModuleDict({"own": Own(1100, 16), "bag": OwnBag(1100, 16)})
    dense = copy.deepcopy(model)
    cqr.compress_(model, method="int8")
    ids = torch.arange(50)
    for name, method in (("own", "forward"), ("own", "embed"), ("own", "lookup"), ("own", "project")):
        found, wanted = (getattr(m[name], method)(ids) for m in (model, dense))
        assert torch.allclose(found, wanted, atol=0.1)
    assert torch.allclose(model["bag"].lookup(ids[:, None]), dense["bag"].embed(ids[:, None]), atol=0.1)


@pytest.mark.parametrize("name", ["embed", "lookup", "rows", "table_rows", "items"])
def test_a_submodule_of_a_subclass_keeps_its_name(name: str) -> None:
    class Layer(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(1100, 16)
            self.add_module(name, nn.Linear(16, 3))

        def forward(self, input: Tensor) -> Tensor:
            return getattr(self, name)(super().forward(input))

    model = nn.ModuleDict({"layer": Layer()})
    before = model["layer"](torch.arange(9)).detach()
    cqr.compress_(model, method="int8")
    assert torch.allclose(model["layer"](torch.arange(9)), before, atol=0.1)


def test_a_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(2000, 8), nn.Linear(8, 1))
    with pytest.raises(TableRefusedError, match="'0.weight' is on the meta device, which has no values: load"):
        cqr.compress_(model, method="int8")
    assert isinstance(model[0], nn.Embedding)
