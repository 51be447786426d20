"""Encoders and language models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cqr_compress as cqr
from cqr_compress import CompressedEmbedding

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
IDS = torch.randint(5, 2000, (3, 17), generator=torch.Generator().manual_seed(0))


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and float((a - b).abs().max().detach()) < 1e-5


def built(cls: Any, config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return cls(config)

    return build


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    import os

    folder = Path(os.environ.get("CQR_COMPRESS_MINILM", "minilm"))
    if not (folder / "model.safetensors").exists():
        pytest.skip("set CQR_COMPRESS_MINILM to the folder of all-MiniLM-L6-v2")
    return folder


def test_minilm_gives_the_vectors_of_the_exported_encoder(minilm: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(minilm)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm / "tokenizer.json"), pad_token="[PAD]"
    )
    batch = tokenizer(
        ["Small files load fast.", "A table of codes, and codebooks"], padding=True, return_tensors="pt"
    )
    small, dense = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    cqr.convert(minilm / "model.safetensors", small, cqr.ConvertOptions(method="pq", ratio=16))
    cqr.export(small, dense)
    reference = transformers.AutoModel.from_config(config).eval()
    reference.load_state_dict(safetensors_torch.load_file(dense), strict=False)
    with cqr.init_empty_weights():
        model = transformers.AutoModel.from_config(config).eval()
    loaded = cqr.load_compressed(model, small)
    assert loaded.tables == ("embeddings.word_embeddings.weight",)
    assert loaded.skipped == ("embeddings.position_ids",)
    with torch.no_grad():
        assert_close(model(**batch).last_hidden_state, reference(**batch).last_hidden_state)
    assert not any(p.numel() == 30522 * 384 for p in model.parameters())


def test_from_pretrained_refuses_a_compressed_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=3000, **sizes))
    model.save_pretrained(tmp_path)
    cqr.convert(tmp_path / "model.safetensors", tmp_path / "small.safetensors", ratio=4)
    (tmp_path / "small.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises((RuntimeError, OSError, ValueError)):  # of the sizes; of the format before version 5
        transformers.BertModel.from_pretrained(tmp_path)


@pytest.fixture
def gpt2() -> Callable[[], nn.Module]:
    config = transformers.GPT2Config(vocab_size=2000, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return built(transformers.GPT2LMHeadModel, config)


def test_a_tied_gpt2_gives_the_same_logits_and_text(load_both: Any, gpt2: Callable[[], nn.Module]) -> None:
    dense, model = load_both(gpt2(), gpt2, ["transformer.wte.weight"])
    assert_close(model(IDS).logits, dense(IDS).logits)
    with torch.no_grad():
        assert_close(model(IDS).logits, dense(IDS).logits)
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **settings), dense.generate(IDS, **settings))
    loss, wanted = model(IDS, labels=IDS).loss, dense(IDS, labels=IDS).loss
    loss.backward()
    wanted.backward()
    assert_close(loss, wanted)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert_close(model.get_parameter(name).grad, dense.get_parameter(name).grad)
    assert model.transformer.wte.codebooks.grad.abs().sum() > 0


def test_tie_weights_may_be_called_again(load_both: Any, gpt2: Callable[[], nn.Module]) -> None:
    dense, model = load_both(gpt2(), gpt2, ["transformer.wte.weight"])
    model.tie_weights()
    assert_close(model(IDS).logits, dense(IDS).logits)
    assert model.get_input_embeddings() is model.transformer.wte
    assert type(model.transformer.wte) is CompressedEmbedding
    cqr.decompress_(model)
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_close(model(IDS).logits, dense(IDS).logits)


def test_a_pretrained_folder_is_converted_and_loaded(tmp_path: Path, gpt2: Callable[[], nn.Module]) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "hub")
    cqr.convert(tmp_path / "hub", tmp_path / "s.safetensors", cqr.ConvertOptions(method="pq", ratio=8))
    dense = gpt2()
    dense.load_state_dict(cqr.load_dense_state_dict(tmp_path / "s.safetensors"), strict=False)
    cqr.load_compressed(model, tmp_path / "s.safetensors")
    assert_close(model.eval()(IDS).logits, dense.eval()(IDS).logits)


def test_a_tied_t5_gives_the_same_logits(load_both: Any) -> None:
    config = transformers.T5Config(
        vocab_size=2000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    build = built(transformers.T5ForConditionalGeneration, config)
    dense, model = load_both(build(), build, ["shared.weight"])
    assert_close(model(input_ids=IDS, labels=IDS).logits, dense(input_ids=IDS, labels=IDS).logits)
    with torch.no_grad():
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(IDS, **settings), dense.generate(IDS, **settings))
    held = {id(m.owner) for m in model.modules() if isinstance(m, CompressedEmbedding)}
    assert len(held) == 1, "the shared table is held once"


@pytest.mark.parametrize("name", ["Bart", "Gemma3"])
def test_scaled_embeddings_keep_their_scale(load_both: Any, name: str) -> None:
    if name == "Bart":
        config = transformers.BartConfig(
            vocab_size=2000, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, scale_embedding=True,
        )  # fmt: skip
        build, table = built(transformers.BartForConditionalGeneration, config), "model.shared.weight"
    else:
        config = transformers.Gemma3TextConfig(
            vocab_size=2000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16,
        )  # fmt: skip
        build, table = built(transformers.Gemma3ForCausalLM, config), "model.embed_tokens.weight"
    dense, model = load_both(build(), build, [table])
    assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    copied = copy.deepcopy(model)
    assert_close(copied(input_ids=IDS).logits, dense(input_ids=IDS).logits)


def test_half_precision_keeps_working(load_both: Any, gpt2: Callable[[], nn.Module]) -> None:
    dense, model = load_both(gpt2(), gpt2, ["transformer.wte.weight"])
    logits = model.bfloat16()(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert float((logits - dense.bfloat16()(IDS).logits).abs().max().detach()) < 0.05
