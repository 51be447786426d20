import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cqr_compress.errors import ShapeError
from cqr_compress.table.bitpack import pack_codes, packed_width, unpack_codes


@given(n_bits=st.integers(1, 16), rows=st.integers(0, 9), num_codes=st.integers(1, 23), seed=st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(n_bits: int, rows: int, num_codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**n_bits, (rows, num_codes), generator=generator, dtype=torch.int32)
    packed = pack_codes(codes, n_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(num_codes, n_bits))
    assert torch.equal(unpack_codes(packed, num_codes, n_bits).int(), codes)


@pytest.mark.parametrize("n_bits", range(1, 17))
def test_the_largest_code_survives_in_every_position(n_bits: int) -> None:
    codes = torch.full((2, 17), 2**n_bits - 1, dtype=torch.int32)
    assert torch.equal(unpack_codes(pack_codes(codes, n_bits), 17, n_bits).int(), codes)


def test_packing_is_least_significant_bit_first_without_gaps() -> None:
    # 1 + 2 * 8 + 3 * 64 = 209: a golden value of the file format
    assert pack_codes(torch.tensor([[1, 2, 3]]), 3).tolist() == [[209, 0]]


def test_a_code_too_large_for_its_bits_is_refused() -> None:
    with pytest.raises(ShapeError, match="from 0 to 16 into 4 bits: the range is 0 to 15"):
        pack_codes(torch.tensor([[0, 16]]), 4)


def test_a_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="they take 2"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)
