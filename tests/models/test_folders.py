"""Folders that transformers and sentence-transformers load: converted, saved, refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from warm_process import WarmPython

import cqr_compress as cqr
from cqr_compress.cli.app import app
from cqr_compress.commands import convert_folder as folders
from cqr_compress.errors import (
    CheckpointError,
    CqrCompressError,
    OutputError,
    OutputExistsError,
    TableNotFoundError,
)

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.randint(5, 3000, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS = [
    cqr.ConvertOptions(method="trellis", ratio=8),
    cqr.ConvertOptions(method="pq", ratio=8, codebook_dtype="int8"),
    cqr.ConvertOptions(method="int8"),
]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder of BertForMaskedLM, whose output head is tied, with files that belong to it."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=3000, **SIZES))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(3000)) + "\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def exported_logits(folder: Path, tmp_path: Path) -> Tensor:
    """Logits of the dense model that a compressed folder's weights are exported to."""
    dense = tmp_path / "dense"
    dense.mkdir()
    cqr.export(
        next(p for p in sorted(folder.glob("model.safetensors*"), reverse=True)), dense / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (dense / "config.json").write_text(json.dumps(config))
    return logits(transformers.BertForMaskedLM.from_pretrained(dense))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.method)
@pytest.mark.parametrize("shard_bytes", [None, 30_000])
def test_a_folder_is_converted_loaded_and_saved(
    bert: Path, tmp_path: Path, options: cqr.ConvertOptions, shard_bytes: int | None
) -> None:
    small = tmp_path / "small"
    report = cqr.convert_folder(bert, small, options, shard_bytes=shard_bytes)
    assert {"vocab.txt", "config.json", "README.md"} <= set(report.copied) and report.left_out == (
        "pytorch_model.bin",
    )
    config = json.loads((small / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "cqr_compress" and list(config["tables"]) == [
        "bert.embeddings.word_embeddings.weight"
    ]
    assert (
        (small / "README.md")
        .read_text()
        .startswith("---\nlicense: mit\n---\n# A model\n\n## Compressed embedding")
    )
    assert Path(report.reports[0].file).exists()
    model = transformers.BertForMaskedLM.from_pretrained(small)
    assert isinstance(model.bert.embeddings.word_embeddings, cqr.CompressedEmbedding)
    assert not any(p.numel() == 3000 * 32 for p in model.parameters()) and model.config.quantization_config
    wanted = exported_logits(small, tmp_path)
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    base = transformers.AutoModel.from_pretrained(small)  # without the prefix of the file's names
    with torch.no_grad():
        assert torch.allclose(base.eval()(IDS)[0], model.bert(IDS)[0], atol=1e-6)
    assert torch.allclose(logits(model.dequantize()), wanted, atol=1e-5)


def test_what_is_pushed_to_the_hub_is_a_compressed_model(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local part: the commit that would be uploaded."""
    hub, pushed = transformers.utils.hub, tmp_path / "pushed"
    pushed.mkdir()

    class Api:
        def create_repo(self, repo_id: str, **_: object) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[Any], **_: object) -> None:
            for each in operations:
                shutil.copyfile(each.path_or_fileobj, pushed / each.path_in_repo)

    card = SimpleNamespace(save=lambda path: Path(path).write_text("# A model\n"))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", Api)
    else:  # before 5.24
        monkeypatch.setattr(hub, "create_repo", Api().create_repo)
        monkeypatch.setattr(hub, "create_commit", Api().create_commit)
    cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    model.push_to_hub("me/small")
    assert (
        json.loads((pushed / "config.json").read_text())["quantization_config"]["quant_method"] == "cqr_compress"
    )
    assert (pushed / "model.safetensors").stat().st_size < (bert / "model.safetensors").stat().st_size / 2
    assert torch.equal(logits(transformers.BertForMaskedLM.from_pretrained(pushed)), logits(model))


@pytest.mark.parametrize("shard_bytes", [None, 30_000])
def test_a_table_that_an_encoder_and_a_decoder_share(tmp_path: Path, shard_bytes: int | None) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=3000, **sizes)).save_pretrained(
        tmp_path / "t5"
    )
    cqr.convert_folder(tmp_path / "t5", tmp_path / "small", method="pq", ratio=8, shard_bytes=shard_bytes)
    model, about = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not about["missing_keys"]
    model.eval()
    cqr.export(
        next(p for p in sorted((tmp_path / "small").glob("model.safetensors*"), reverse=True)),
        tmp_path / "t5" / "model.safetensors",
        force=True,
    )
    dense = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    with torch.no_grad():
        wanted = dense(input_ids=IDS, decoder_input_ids=IDS).logits
        assert torch.allclose(model(input_ids=IDS, decoder_input_ids=IDS).logits, wanted, atol=1e-4)


def test_a_loaded_model_trains(bert: Path, tmp_path: Path) -> None:
    cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    model(IDS, labels=IDS).loss.backward()
    assert model.bert.embeddings.word_embeddings.codebooks.grad.abs().sum() > 0


def test_a_folder_loads_in_half_precision(bert: Path, tmp_path: Path) -> None:
    cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    model = transformers.AutoModel.from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16)
    assert model.eval()(IDS)[0].dtype == torch.bfloat16


def test_loading_without_this_package_fails(bert: Path, tmp_path: Path, python: WarmPython) -> None:
    cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    code = f"import transformers; transformers.BertForMaskedLM.from_pretrained({str(tmp_path / 'small')!r})"
    done = python("-c", code)
    assert done.returncode == 1 and "cqr_compress" in done.stderr and "mismatch" in done.stderr
    for first, second in (("cqr_compress", "transformers"), ("transformers.quantizers.auto", "cqr_compress")):
        both = python("-c", f"import {first}, {second}, transformers\n{code}")
        assert both.returncode == 0, both.stderr


def test_the_command_writes_a_folder(bert: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(bert), "-o", str(tmp_path / "small"), "--method", "pq", "--ratio", "8"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and not (tmp_path / "small").exists() and "predicted" in planned.output
    done = CliRunner().invoke(app, arguments)
    assert (
        done.exit_code == 0 and "AutoModel.from_pretrained" in done.output and "pytorch_model.bin" in done.output
    )
    assert not list(tmp_path.glob(".*partial*"))


def test_outputs_are_protected(bert: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"

    def convert(output: Path = small, **options: Any) -> cqr.FolderReport:
        return cqr.convert_folder(bert, output, method="pq", ratio=8, **options)

    for inside in (bert, bert / "small", tmp_path):
        with pytest.raises(OutputError, match="give another folder"):
            convert(inside)
    with pytest.raises(OutputError, match="no such folder"):
        convert(tmp_path / "no" / "small")
    small.mkdir()
    (small / "precious").write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        convert()
    with pytest.raises(OutputError, match="no folder that `convert` wrote"):
        convert(force=True)
    (small / "precious").unlink()
    convert()  # an empty folder is taken
    before = (small / "model.safetensors").read_bytes()
    with pytest.raises(TableNotFoundError):
        convert(force=True, exclude=["*"])
    assert (small / "model.safetensors").read_bytes() == before
    convert(force=True, seed=1)
    with pytest.raises(CheckpointError, match="quantization_config already|already compressed"):
        cqr.convert_folder(small, tmp_path / "twice", method="pq", ratio=8)
    assert not list(tmp_path.glob(".*partial*")) and not (tmp_path / "twice").exists()


def test_links_that_leave_the_folder_are_not_copied(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (bert / "notes.txt").symlink_to(tmp_path / "secret")
    report = cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    assert "notes.txt" in report.left_out and not (tmp_path / "small" / "notes.txt").exists()


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"quantization_config": {"quant_method": "x"}}'])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_config_is_refused_before_the_work(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, dry_run: bool
) -> None:
    (bert / "config.json").write_text(content)
    work = folders.convert
    monkeypatch.setattr(folders, "convert", lambda *a, **options: work(*a, **{**options, "dry_run": True}))
    with pytest.raises(CheckpointError, match="config.json"):
        cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8, dry_run=dry_run)
    assert not list(tmp_path.glob("*small*"))
    (bert / "more").mkdir()  # a module without tables may have any config
    for file in (bert / "model.safetensors", bert / "config.json"):
        file.rename(bert / "more" / file.name)
    with pytest.raises(TableNotFoundError):
        cqr.convert_folder(bert / "more", tmp_path / "small", method="pq", ratio=8, exclude=["*"])


def test_an_interrupt_leaves_the_earlier_folder(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    cqr.convert_folder(bert, small, method="pq", ratio=8)
    before = sorted(path.name for path in tmp_path.iterdir()), (small / "model.safetensors").read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    rename = Path.rename

    def interrupted_rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and target.name == "small":
            raise KeyboardInterrupt
        return rename(self, target)

    for owner, name, action in ((folders, "convert", interrupt), (Path, "rename", interrupted_rename)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, action)
            with pytest.raises(KeyboardInterrupt):
                cqr.convert_folder(bert, small, method="pq", ratio=8, force=True, seed=1)
        assert (sorted(p.name for p in tmp_path.iterdir()), (small / "model.safetensors").read_bytes()) == before


def test_a_folder_around_an_output_is_not_replaced(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    cqr.convert_folder(bert, tmp_path / "models" / "small", method="pq", ratio=8)
    (tmp_path / "models" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="no folder that `convert` wrote"):
        cqr.convert_folder(bert, tmp_path / "models", method="pq", ratio=8, force=True)
    assert (tmp_path / "models" / "precious").exists()


def test_an_output_is_a_link_or_the_working_folder(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for force in (False, True):
        cqr.convert_folder(bert, link, method="pq", ratio=8, force=force)
        assert link.is_symlink() and (real / "model.safetensors").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "link", "real"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cqr.convert_folder(bert, ".", method="pq", ratio=8)
    assert (tmp_path / "here" / "model.safetensors").exists()
    (tmp_path / "nothing").symlink_to(tmp_path / "none")
    with pytest.raises(OutputError, match="link to a folder that does not exist"):
        cqr.convert_folder(bert, tmp_path / "nothing", method="pq", ratio=8)


def test_odd_files_of_a_folder(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (bert / "2_Linked").symlink_to(tmp_path / "other")
    (bert / "dangling.txt").symlink_to(bert / "none")
    (bert / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(bert / "pipe")
    (bert / "README.md").write_bytes(b"caf\xe9\n")
    report = cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    assert {"2_Linked", "dangling.txt", "loop.txt", "pipe"} <= set(report.left_out)
    assert (tmp_path / "small" / "README.md").read_bytes().startswith(b"caf\xe9\n\n## Compressed")


def test_a_model_of_another_size_is_refused(bert: Path, tmp_path: Path) -> None:
    cqr.convert_folder(bert, tmp_path / "small", method="pq", ratio=8)
    config = tmp_path / "small" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 2000}))
    with pytest.raises(CqrCompressError, match="has no 'bert.embeddings.word_embeddings.weight' of 3000 x 32"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """A folder of sentence-transformers with a StaticEmbedding."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(2000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    module = StaticEmbedding(tokenizer, embedding_weights=torch.randn(2000, 16))
    folder = tmp_path / "static"
    sentence_transformers.SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return folder


def test_a_static_embedding_is_loaded_by_sentence_transformers(static: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["w1 w2 w1999", "w7"]
    cqr.convert_folder(static, tmp_path / "small", method="pq", ratio=3, prior="none")
    model = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    table = torch.as_tensor(
        cqr.load_dense_state_dict(next((tmp_path / "small").rglob("model.safetensors")))["embedding.weight"]
    )
    wanted = torch.stack([table[[1, 2, 1999]].mean(0), table[7]])
    assert torch.allclose(torch.as_tensor(model.encode(texts)), wanted, atol=1e-5)
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert (again.encode(texts) == model.encode(texts)).all()
