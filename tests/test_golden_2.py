"""Files of format version 2 that version 0.2.0 wrote: they open, decode to the same rows, load and are saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import D, N, Net

import cqr_compress as cqr

FOLDER = Path(__file__).parent / "golden" / "0.2.0"
ROWS = load_file(FOLDER / "rows.safetensors")
TABLES = sorted({*ROWS} - {"words"})


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the rounding of products with a rotation, which differs among processors."""
    return torch.allclose(found.float(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", TABLES)
def test_a_file_decodes_to_the_rows_it_had(name: str) -> None:
    dense = cqr.load_dense_state_dict(FOLDER / f"{name}.safetensors")
    assert same(dense["item.weight"], ROWS[name]) and ROWS[name].shape == (N, D)
    assert all(tensor.dtype == torch.float32 for tensor in dense.values())


@pytest.mark.parametrize("name", TABLES)
def test_a_file_loads_and_is_saved_again(name: str, tmp_path: Path) -> None:
    source = FOLDER / f"{name}.safetensors"
    with cqr.init_empty_weights():
        model = Net()
    cqr.load_compressed(model, source, device="cpu")
    with torch.no_grad():
        assert same(model.item(torch.arange(N)), ROWS[name])
    cqr.save_compressed(model, tmp_path / "again.safetensors", source)
    before, after = load_file(source), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


def test_word_vectors_have_their_words() -> None:
    vectors = cqr.load_vectors(FOLDER / "words.safetensors")
    assert vectors.words[:2] == ["wort0", "wort1"] and len(vectors) == 60
    assert same(torch.from_numpy(vectors[vectors.words]), ROWS["words"])
