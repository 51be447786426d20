import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import TableNotFoundError, TableRefusedError
from cqr_compress.planning.find import Candidate, find_tables, refuse_foreign, with_table_names

TABLES = """
emb_l.0.weight emb_l.25.weight embedding_bags.t_cat_0.weight sparse_arch.embedding_bag_collection.embedding_bags.t.weight
ebc.embeddings.item.weight user_embedding.weight item_embedding.weight token_embedding_table.embedding.weight
embedding.embedding.weight fm.embedding.embedding.weight ffm.embeddings.3.weight embedding_dict.user_id.weight
embedding_user.weight item_embeddings.weight attribute_embeddings.weight position_embeddings.weight item_emb.weight
pos_emb.weight bert.embedding.token.weight model.embed_tokens.weight transformer.wte.weight transformer.wpe.weight
embeddings.word_embeddings.weight bert.embeddings.token_type_embeddings.weight shared.weight tok_embeddings.weight
gpt_neox.embed_in.weight 0.embedding.weight embeddings embedding.weight entity_embedding relation_embedding
ent_embeddings.weight rel_embeddings.weight entity_representations.0._embeddings.weight module.user_emb.weight
_orig_mod.item_embedding.weight _fsdp_wrapped_module.wte.weight query_embedding.weight video_embedding.weight
key_emb.weight vocab_embed.weight origin_embedding.weight user_embed.0.weight decoder.embed_tokens.weight
user_embeddings user_id_embedding.weight emb.item.weight uid_lookup.weight roberta.embeddings.position_embeddings.weight
""".split()

FALSE_FRIENDS = """
patch_embed.proj.weight vit.embeddings.patch_embeddings.projection.weight lm_head.weight exp_avg.item_embedding.weight
embedding_norm.weight encoder.layer.0.attention.query.weight mlp.0.weight fc.weight out_proj.weight classifier.weight
embed_out.weight embeddings.LayerNorm.weight embedding_hidden_mapping_in.weight embed_proj.weight time_embed.mlp.weight
top_l.0.weight bot_l.2.weight transformer.h.0.attn.c_attn.weight rotary_emb.inv_freq decoder.weight head.weight
model.layers.0.mlp.gate_proj.weight optimizer.state.0.item_embedding conv1.weight
""".split()


def candidates(tmp_path: Path, state: dict[str, torch.Tensor], **patterns: list[str]) -> dict[str, Candidate]:
    torch.save(state, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        return {c.name: c for c in find_tables(with_table_names(checkpoint), **patterns)}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_a_known_family_is_taken(tmp_path: Path, name: str) -> None:
    found = candidates(tmp_path, {name: torch.zeros(30, 4), "bias": torch.zeros(3)})[name]
    assert found.selected and found.confidence >= 0.7 and found.reason


@pytest.mark.parametrize("name", FALSE_FRIENDS)
def test_a_false_friend_is_left_with_a_reason(tmp_path: Path, name: str) -> None:
    found = candidates(tmp_path, {name: torch.zeros(30_000, 4), "x": torch.zeros(3)})[name]
    assert not found.selected and found.reason


@pytest.mark.parametrize(
    "name",
    [
        "params.embed.embedding", "params.model.embed_tokens.embedding", "params.transformer.wte.embedding",
        "model_weights.item.model.item.embeddings", "layers.layer_0.embeddings",
        "layer_with_weights-0/embeddings/.ATTRIBUTES/VARIABLE_VALUE", "m/user_emb/.ATTRIBUTES/VARIABLE_VALUE",
    ],
)  # fmt: skip
def test_tables_of_flax_keras_and_tensorflow_are_taken_beside_kernels(tmp_path: Path, name: str) -> None:
    others = {"params.out.kernel": torch.zeros(4, 9), "m/out/kernel/.ATTRIBUTES/VARIABLE_VALUE": torch.zeros(4, 9)}
    found = candidates(tmp_path, {name: torch.zeros(3000, 4)} | others)
    assert [each for each, candidate in found.items() if candidate.selected] == [name]
    if not name.endswith("VALUE"):  # in a model of torch it is a parameter of any use
        alone = candidates(tmp_path, {name: torch.zeros(3000, 4), "out.weight": torch.zeros(4, 9)})
        assert not alone[name].selected


def test_a_bias_beside_it_or_a_single_column_says_linear(tmp_path: Path) -> None:
    state = {
        "user_embed.weight": torch.zeros(900, 4), "user_embed.bias": torch.zeros(900),
        "linear.item_embedding.weight": torch.zeros(900, 1), "tall": torch.zeros(20_000, 4),
    }  # fmt: skip
    found = candidates(tmp_path, state)
    assert not any(c.selected for c in found.values())
    assert "it has 'user_embed.bias'" in found["user_embed.weight"].reason
    assert "1 column" in found["linear.item_embedding.weight"].reason
    assert "--tables" in found["tall"].reason


@pytest.mark.parametrize("name", ["user.weight", "item.weight", "items.weight", "movie_id.weight", "P.weight", "V.weight",
    "query_feat.weight", "h_user.weight", "encoder.layers.3.attn.rel_pos_emb.weight", "quantizer.1.codebook.weight",
    "vision.patch_embedder.position_embedding_table.weight"])  # fmt: skip
def test_a_layer_whose_name_says_little_is_taken_for_its_shape(tmp_path: Path, name: str) -> None:
    state = {name: torch.zeros(1500, 8), "mlp.0.weight": torch.zeros(16, 8), "mlp.0.bias": torch.zeros(16)}
    assert [c.name for c in candidates(tmp_path, state).values() if c.selected] == [name]


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"cond.weight": (1500, 8), "next.weight": (8, 1500)}, "neither"),  # its rows are inputs
        ({"layers.0.x.weight": (1500, 8)}, "neither"),  # repeated in numbered layers
        ({"square.weight": (1500, 500)}, "neither"),  # not tall
        ({"guess.weight": (1500, 8), "item_emb.weight": (1500, 8)}, "neither"),  # a head over the table's ids
        ({"to_out.weight": (1500, 8)}, "linear"), ({"proj_out.weight": (1500, 8)}, "linear"),
        ({"unembed.weight": (1500, 8)}, "output head"), ({"time_embed_mapper.weight": (1500, 8)}, "projection"),
        ({"patch_to_embedding.weight": (1500, 8)}, "patches"), ({"patch_embedding.weight": (1500, 8)}, "patches"),
        ({"x_embedder.weight": (1500, 8), "attn.weight": (8, 1500)}, "input size of another layer"),
        ({"conditioning_emb.0.weight": (1500, 8), "conditioning_emb.2.weight": (8, 1500)}, "input size of another"),
    ],
)  # fmt: skip
def test_a_layer_without_bias_that_is_no_lookup_is_left(
    tmp_path: Path, state: dict[str, tuple[int, int]], word: str
) -> None:
    found = candidates(tmp_path, {name: torch.zeros(shape) for name, shape in state.items()})
    first = found[next(iter(state))]
    assert not first.selected and word in first.reason


@pytest.mark.parametrize(
    "name",
    [
        "vision.positional_embedding_vlm",
        "gated_positional_embedding.embedding",
        "pos_embed",
        "query_embeddings",
        "codebook",
    ],
)
def test_a_bare_parameter_is_taken_only_where_its_name_means_a_lookup(tmp_path: Path, name: str) -> None:
    state = {
        name: torch.zeros(1500, 8),
        "entity_embedding": torch.zeros(1500, 8),
        "d.user_emb": torch.zeros(1600, 8),
    }
    found = candidates(tmp_path, state)
    assert [c.name for c in found.values() if c.selected] == ["entity_embedding", "d.user_emb"]
    assert "the weight of no layer" in found[name].reason


@pytest.mark.parametrize(
    ("taken", "beside"),
    [
        ("codebook.embed", ["codebook.cluster_size", "codebook.inited", "codebook.embed_avg"]),
        ("codebook.embed_sum", ["codebook.cluster_usage", "codebook.initialized"]),
        ("vq.embedding.weight", ["vq.ema_cluster_size", "vq.ema_w"]),
        ("vq.codebook.weight", ["vq.codebook.cluster_size"]),
    ],
)
def test_codebooks_with_running_averages_are_no_tables(tmp_path: Path, taken: str, beside: list[str]) -> None:
    shapes = {"embed_avg": (1500, 8), "ema_w": (1500, 8), "inited": (1,), "initialized": (1,)}
    state = {name: torch.zeros(shapes.get(name.rpartition(".")[2], (1500,))) for name in beside}
    found = candidates(tmp_path, {taken: torch.zeros(1500, 8), **state})
    assert not any(c.selected for c in found.values())
    assert f"running average: it has {beside[0]!r}" in found[taken].reason


def test_a_weight_with_an_integer_copy_is_no_plain_embedding_layer(tmp_path: Path) -> None:
    state = {
        "word_embeddings.weight": torch.zeros(1500, 8), "word_embeddings.weight_integer": torch.zeros(1500, 8),
        "word_embeddings.weight_scaling_factor": torch.zeros(1), "user_cluster": torch.zeros(1500),
        "user_embedding.weight": torch.zeros(1500, 8),
    }  # fmt: skip
    found = candidates(tmp_path, state)
    assert [c.name for c in found.values() if c.selected] == ["user_embedding.weight"]
    assert "it has 'word_embeddings.weight_integer'" in found["word_embeddings.weight"].reason


def test_what_is_left_unnamed_is_taken_when_named(tmp_path: Path) -> None:
    state = {"codebook.embed": torch.zeros(30, 8), "codebook.cluster_size": torch.zeros(30)}
    found = candidates(tmp_path, state, tables=["codebook.embed"])
    assert found["codebook.embed"].selected and found["codebook.embed"].named


def test_integer_and_3d_tensors_are_no_candidates(tmp_path: Path) -> None:
    state = {"item_emb.weight": torch.zeros(9, 4, dtype=torch.int64), "emb.weight": torch.zeros(3, 4, 2)}
    assert candidates(tmp_path, state) == {}


def test_patterns_take_and_leave_tables(tmp_path: Path, model_state: dict[str, torch.Tensor]) -> None:
    chosen = candidates(tmp_path, model_state, tables=["out*"])
    assert [c.name for c in chosen.values() if c.selected] == ["out.weight"]
    chosen = candidates(tmp_path, model_state, tables=["re:^(item|user)"], exclude=["user_embedding"])
    assert [c.name for c in chosen.values() if c.selected] == ["item_embedding.weight"]


@pytest.mark.parametrize("option", ["tables", "exclude"])
def test_a_pattern_that_matches_nothing_lists_the_nearest_names(
    tmp_path: Path, model_state: dict[str, torch.Tensor], option: str
) -> None:
    with pytest.raises(
        TableNotFoundError, match=r"'item_embeding.\*' matches no .* Nearest: item_embedding.weight"
    ):
        candidates(tmp_path, model_state, **{option: ["item_embeding.*"]})
    with pytest.raises(TableNotFoundError, match="not a regular expression"):
        candidates(tmp_path, model_state, **{option: ["re:("]})


def test_a_shared_tensor_stands_under_the_name_that_says_table(tmp_path: Path) -> None:
    table = torch.randn(30, 4)
    found = candidates(tmp_path, {"lm_head.weight": table, "transformer.wte.weight": table})
    assert list(found) == ["transformer.wte.weight"]
    assert found["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert found["transformer.wte.weight"].selected


def test_names_of_many_shared_and_tied_tensors_take_linear_time(tmp_path: Path) -> None:
    num = 3000
    rows = torch.arange(2.0 * num * 8).view(2 * num, 2, 4)
    shared = {f"{kind}{i}.weight": rows[i] for kind in ("m", "user_embedding") for i in range(num)}
    pairs = {f"{i}.{kind}.weight": rows[i].clone() for kind in ("lm_head", "embed_tokens") for i in range(num)}
    for name, state in (("shared", shared), ("pairs", pairs)):
        torch.save(state, tmp_path / f"{name}.pt")
        with open_checkpoint(tmp_path / f"{name}.pt") as checkpoint:
            start = time.process_time()
            named = with_table_names(checkpoint)
            assert time.process_time() - start < 3
        assert len(named.entries) == num and all("embed" in name for name in named.entries)
        to = ("m", "user_embedding") if name == "shared" else ("lm_head", "embed_tokens")
        assert named.aliases == {table.replace(*to[::-1]): table for table in named.entries}


@pytest.mark.parametrize("row", [0, 4999])
def test_tables_that_differ_in_one_value_are_not_tied(tmp_path: Path, row: int) -> None:
    tables = {f"{name}.weight": torch.ones(5000, 4) for name in ("lm_head", "embed_tokens", "1.embed_tokens")}
    tables["embed_tokens.weight"][row, 3] = 2
    torch.save(tables, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert with_table_names(checkpoint).aliases == {"lm_head.weight": "1.embed_tokens.weight"}


def test_equal_tensors_under_a_known_pair_are_tied_and_unequal_ones_are_not(tmp_path: Path) -> None:
    table = torch.randn(30, 4)
    save_file({"lm_head.weight": table, "model.embed_tokens.weight": table.clone()}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert with_table_names(checkpoint).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    save_file({"lm_head.weight": table + 1, "model.embed_tokens.weight": table}, tmp_path / "u.safetensors")
    with open_checkpoint(tmp_path / "u.safetensors") as checkpoint:
        assert with_table_names(checkpoint).aliases == {}


@pytest.mark.parametrize(
    "names", [["emb_l.0.weight_q", "emb_l.0.weight_r"], ["emb_l.0.embs.weight", "emb_l.0.proj.weight"]]
)
def test_dlrm_tricks_are_refused_with_a_reason(tmp_path: Path, names: list[str]) -> None:
    state = {name: torch.zeros(50, 4) for name in names}
    found = candidates(tmp_path, state)
    assert all(not c.selected and "trick" in c.reason for c in found.values())
    with pytest.raises(TableRefusedError, match="trick"):
        candidates(tmp_path, state, tables=[names[0]])


@pytest.mark.parametrize(
    ("names", "tool"),
    [
        (["emb.weight_packed", "emb.weight_qscale"], "row-wise packer"),
        (["embed_tokens.assignments", "embed_tokens.centroids"], "iPQ"),
        (["embeddings", "mapping"], "model2vec"),
        (["embed_tokens.weight.absmax"], "bitsandbytes"),
    ],
)
def test_a_table_quantized_by_another_tool_is_refused_by_name(tmp_path: Path, names: list[str], tool: str) -> None:
    torch.save({name: torch.zeros(5, 4) for name in names}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint, pytest.raises(TableRefusedError, match=tool):
        refuse_foreign(checkpoint)


def test_linear_layers_quantized_by_another_tool_are_no_obstacle(tmp_path: Path) -> None:
    state = {"embed_tokens.weight": torch.zeros(9, 4), "layers.0.mlp.up.qweight": torch.zeros(5, 4)}
    torch.save(state, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        refuse_foreign(checkpoint)


@pytest.mark.parametrize("name", ["s3rec/Beauty-epochs-150.pt", "s3rec/LastFM-epochs-150.pt"])
def test_s3rec_has_its_three_tables_and_nothing_else(shared: object, name: str) -> None:
    with open_checkpoint(shared(name)) as checkpoint:  # type: ignore[operator]
        found = [c.name for c in find_tables(with_table_names(checkpoint)) if c.selected]
    assert found == ["item_embeddings.weight", "attribute_embeddings.weight", "position_embeddings.weight"]
