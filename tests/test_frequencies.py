"""How often ids are used: files of counts, and what they do to a conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cqr_compress as cqr
from cqr_compress.commands import convert as convert_module
from cqr_compress.errors import CheckpointError, CqrCompressError, ShapeError, SpecError, TableNotFoundError
from cqr_compress.planning.frequencies import read_frequencies
from cqr_compress.planning.token_frequencies import token_frequencies

ROWS = {"a.weight": 4, "b.weight": 6}


def test_each_kind_of_file_gives_the_same_counts(tmp_path: Path) -> None:
    counts = torch.tensor([5.0, 0.0, 1.0, 2.5])
    np.save(tmp_path / "c.npy", counts.numpy())
    save_file({"a.weight": counts}, tmp_path / "c.safetensors")
    (tmp_path / "c.csv").write_text("table,id,count\na.weight,0,5\na.weight,2,1\na.weight,3,2\na.weight,3,0.5\n")
    (tmp_path / "d.csv").write_bytes(
        b"\xef\xbb\xbfid, count\r\n0, 5\r\n2,1\r\n\r\n3,2.5\r\n"
    )  # as spreadsheets write
    for given in (
        tmp_path / "c.npy", str(tmp_path / "c.safetensors"), [tmp_path / "c.csv"], {"a.weight": counts},
        [f"a.weight={tmp_path / 'd.csv'}"], f"a.weight={tmp_path / 'c.npy'}", f"a.weight={tmp_path / 'c.safetensors'}",
    ):  # fmt: skip
        found = read_frequencies(given, ROWS)
        assert list(found) == ["a.weight"] and torch.equal(found["a.weight"], counts)
    assert torch.equal(read_frequencies(tmp_path / "d.csv", {"a.weight": 4})["a.weight"], counts)
    assert read_frequencies((), ROWS) == {}


def test_integer_counts_are_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.arange(6, dtype=np.uint16))
    assert read_frequencies(tmp_path / "c.npy", ROWS)["b.weight"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("c.csv", "user,n\n1,2\n", CheckpointError, "begins with 'user,n': its first line has to be id,count"),
        ("c.csv", "table,id,count\nc,1,2\n", TableNotFoundError, "frequencies of 'c' in .*: no such table. The tables are a.weight, b.weight"),
        ("c.csv", "table,id,count\na.weight,4,2\n", ShapeError, "has ids from 4 to 4, but 'a.weight' has 4 rows"),
        ("c.csv", "table,id,count\na.weight,1\n", CheckpointError, "line 2 has 2 cells, the first 3"),
        ("c.csv", "table,id,count\na.weight,x,1\n", CheckpointError, "cannot read"),
        ("c.csv", "id,count\n1,1\n", TableNotFoundError, "it matches a.weight, b.weight. Pass TABLE="),
        ("c.csv", "table,id,count\n", CheckpointError, "contains no counts"),
        ("c.csv", "table,id,count\na.weight,0,-1\n", ShapeError, "give finite numbers of at least 0"),
        ("c.csv", "table,id,count\na.weight,0,nan\n", ShapeError, "give finite numbers of at least 0"),
        ("c.npy", "not numpy", CheckpointError, "cannot read numbers"),
        ("c.txt", "1", SpecError, "frequencies are read from .npy, .safetensors or .csv"),
        ("c.safetensors", "zzz", CheckpointError, "c.safetensors"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_reason(
    name: str, content: str, error: type[CqrCompressError], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_frequencies(tmp_path / name, ROWS)


def test_a_long_name_is_no_file() -> None:
    with pytest.raises(CheckpointError, match="no such file of frequencies"):
        read_frequencies("a" * 300 + "=x.npy", ROWS)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_counts_outside_the_range_of_float32_are_scaled(tmp_path: Path, scale: float) -> None:
    np.save(tmp_path / "counts.npy", scale * np.arange(4.0))
    counts = read_frequencies(tmp_path / "counts.npy", {"emb.weight": 4})["emb.weight"]
    assert torch.allclose(counts / counts[3], torch.arange(4.0) / 3)


def test_counts_of_no_table_or_given_twice_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.ones(5))
    with pytest.raises(TableNotFoundError, match="of 5 numbers: it matches none of the tables"):
        read_frequencies(tmp_path / "c.npy", ROWS)
    np.save(tmp_path / "a.npy", np.ones(4))
    with pytest.raises(SpecError, match="'a.weight' has frequencies from two files"):
        read_frequencies([tmp_path / "a.npy", f"a.weight={tmp_path / 'a.npy'}"], ROWS)
    with pytest.raises(ShapeError, match=r"have shape \(2, 2\): the table has 4 rows"):
        read_frequencies({"a.weight": torch.ones(2, 2)}, ROWS)
    with pytest.raises(CheckpointError, match="no such file"):
        read_frequencies(tmp_path / "none.npy", ROWS)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="cannot read numbers"):
        read_frequencies(tmp_path / "o.npy", ROWS)


def zipf(count: int) -> Tensor:
    return 1e4 / torch.arange(1, count + 1)


@pytest.mark.parametrize("method", ["pq", "rq", "prq", "hash", "qr", "cqr", "auto"])
def test_a_weighted_fit_has_less_weighted_error(method: str, table: Tensor) -> None:
    from torch import nn

    def error(frequencies: Any) -> float:
        model = nn.ModuleDict({"emb": nn.Embedding.from_pretrained(table.clone())})
        options = cqr.ConvertOptions(method=method, ratio=6, effort="fast")
        (told,) = cqr.compress_(model, options, frequencies=frequencies)
        weights = zipf(3000)[:, None]
        lost = (model["emb"](torch.arange(3000)) - table).square() * weights
        found = float(lost.sum() / (table.square() * weights).sum())
        if frequencies:
            assert told.quality is not None and told.quality.weighted_relative_mse is not None
            assert abs(told.quality.weighted_relative_mse - found) < 0.05 * found + 1e-3
        return found

    assert error({"emb.weight": zipf(3000)}) < 0.97 * error({})


def test_the_command_line_takes_counts_and_reports_the_weighted_error(cli: Callable[..., Any], ckpt: Path, tmp_path: Path) -> None:  # fmt: skip
    np.save(tmp_path / "counts.npy", zipf(3000).numpy())
    args = ["convert", ckpt, "-o", "s.safetensors", "--method", "pq", "--ratio", "8", "--frequencies"]
    assert "weighted" in cli(*args, "counts.npy").stdout
    assert "weighted" in cli("inspect", "s.safetensors").stdout
    assert "no such file of frequencies: 'none.npy'" in cli(*args, "none.npy", "--force", code=1).stderr
    cli(*args, "item_embedding.weight=counts.npy", "--force")


VOCABULARY = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    ".",
    "the",
    "of",
    "##ing",
    *(f"word{i}" for i in range(1200)),
]


def tokenizer_json(folder: Path, **changes: Any) -> None:
    content = {
        "model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(VOCABULARY)}},
        "added_tokens": [{"id": i, "content": VOCABULARY[i], "special": True} for i in (0, 2, 3)],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))


def unigram_json(folder: Path) -> None:
    pieces = [[token, -float(i)] for i, token in enumerate(VOCABULARY)]
    tokenizer_json(folder, model={"type": "Unigram", "vocab": pieces})


def vocab_txt(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def test_word_vectors_have_no_tokenizer(tmp_path: Path) -> None:
    vocab_txt(tmp_path)
    lines = [f"w{i} {' '.join(map(str, row))}" for i, row in enumerate(torch.randn(1208, 4).tolist())]
    (tmp_path / "v.txt").write_text("1208 4\n" + "\n".join(lines) + "\n")
    report = cqr.convert(tmp_path / "v.txt", method="pq", num_columns=2, n_bits=4)
    assert "tokenizer" not in report.tables[0].reason and report.tables[0].weighted_relative_mse is None


@pytest.mark.parametrize("others", [{}, {"layer.weight": torch.ones(8, 8)}])
def test_a_table_that_no_layer_reads_is_weighted_less(
    others: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_txt(tmp_path)
    torch.save({"embedding.weight": torch.randn(1208, 8)} | others, tmp_path / "m.pt")
    found: list[dict[str, Tensor]] = []

    def estimate(*arguments: Any) -> dict[str, Tensor]:
        found.append(token_frequencies(*arguments))
        return found[0]

    monkeypatch.setattr(convert_module, "token_frequencies", estimate)
    cqr.convert(tmp_path / "m.pt", method="pq", num_columns=2, n_bits=4, dry_run=True)
    (weights,) = (each["embedding.weight"] for each in found)
    roots = token_frequencies(tmp_path / "m.pt", {"embedding.weight": 1208})["embedding.weight"]
    assert torch.equal(weights, roots if others else roots.sqrt())


@pytest.mark.parametrize("written", [tokenizer_json, unigram_json, vocab_txt])
@pytest.mark.parametrize("num_rows", [1208, 1216])
def test_frequencies_of_tokens_follow_their_order(
    written: Callable[..., None], num_rows: int, tmp_path: Path
) -> None:
    written(tmp_path)
    found = token_frequencies(tmp_path / "model.safetensors", {"words": num_rows, "positions": 512, "other": 9000})
    assert list(found) == ["words"] and found["words"].shape == (num_rows,)
    counts = found["words"].tolist()
    at = {token: counts[i] for i, token in enumerate(VOCABULARY)}
    assert at["[CLS]"] == at["the"] > at["of"] > at["##ing"] > at["word0"] > at["word1"] > at["word1199"]
    assert at["the"] > at["."] > at["word99"]
    assert at["[unused0]"] == at["[PAD]"] == min(counts) > 0 and counts[1208:] == [at["[PAD]"]] * (num_rows - 1208)


@pytest.mark.parametrize(
    "content",
    ["[", "[]", '{"model": 3}', '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": [3]}}',
     '{"model": {"vocab": {"a": 99999999999}}}', '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.warns(cqr.CqrCompressWarning, match=r"'tokenizer.json' is ignored"):
        assert token_frequencies(tmp_path / "a.pt", {"words": 4}) == {}


def test_rows_of_language_tables_are_weighted_by_default(tmp_path: Path, table: Tensor) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer_json(folder)
    torch.save({"words.embedding.weight": table[:1208]}, folder / "a.pt")
    given = np.ones(1208)
    np.save(tmp_path / "ones.npy", given)
    options: dict[str, Any] = {"ratio": 8, "method": "trellis", "force": True}
    by_order = cqr.convert(folder / "a.pt", tmp_path / "a.safetensors", **options).tables[0]
    without = cqr.convert(folder / "a.pt", tmp_path / "b.safetensors", prior="none", **options).tables[0]
    counted = cqr.convert(
        folder / "a.pt", tmp_path / "c.safetensors", frequencies=tmp_path / "ones.npy", **options
    ).tables[0]
    assert by_order.weighted_relative_mse is not None and "tokenizer" in by_order.reason
    assert without.weighted_relative_mse is None and "tokenizer" not in without.reason
    assert (
        counted.weighted_relative_mse == pytest.approx(counted.relative_mse) and "tokenizer" not in counted.reason
    )


def test_other_tables_of_few_rows_are_not_taken_for_those_of_a_small_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(f"token{i}" for i in range(30)))
    sizes = {"words": 30, "padded": 32, "positions": 512}
    assert token_frequencies(tmp_path / "a.pt", sizes).keys() == {"words", "padded"}
    for empty in ("", "\n"):
        (tmp_path / "vocab.txt").write_text(empty)
        assert token_frequencies(tmp_path / "a.pt", {"words": 5}) == {}


def test_a_token_that_ends_a_line_elsewhere_does_not_shift_the_ids(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("[PAD]\r\na\u2028b\r\n\x85\r\nword\r\n".encode())
    assert len(token_frequencies(tmp_path / "a.pt", {"words": 4})["words"]) == 4
    (tmp_path / "vocab.txt").write_bytes("\u2028\n\x0b\nword\nrare".encode())
    assert token_frequencies(tmp_path / "a.pt", {"words": 4}).keys() == {"words"}
    assert token_frequencies(tmp_path / "a.pt", {"words": 3}) == {}
