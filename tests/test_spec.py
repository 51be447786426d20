import json

import pytest

from cqr_compress.errors import SpecError
from cqr_compress.table.spec import CodebookSpec, RowwiseSpec, spec_from_json

PQ = CodebookSpec(
    method="pq", num_embeddings=1000, embedding_dim=16, num_columns=4, num_levels=1, codebook_size=16,
    code_sources=("stored",), num_kept_rows=2, num_zero_rows=3,
)  # fmt: skip
INT4 = RowwiseSpec(method="int4", num_embeddings=10, embedding_dim=5, n_bits=4, dtype="bfloat16")


@pytest.mark.parametrize("spec", [PQ, INT4])
def test_a_spec_survives_json(spec: CodebookSpec | RowwiseSpec) -> None:
    assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_bytes_are_the_sum_of_what_is_stored() -> None:
    codes, codebooks, kept_ids, kept_rows = 1000 * 2, 4 * 16 * 4 * 2, 5 * 4, 2 * 16 * 4
    assert PQ.nbytes == codes + codebooks + kept_ids + kept_rows
    assert PQ.num_parameters == 4 * 16 * 4 + 2 * 16
    assert INT4.nbytes == 10 * 3 + 10 * 2 + 10 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_columns": 3}, "16 is not divisible by 3. Choose num_columns from 1, 2, 4, 8, 16"),
        ({"codebook_size": 17}, "not a power of two"),
        ({"code_sources": ["stored", "stored"]}, "for each of 1 levels"),
        ({"code_sources": ["telepathy"]}, "for each of 1 levels"),
        ({"num_columns": "4"}, "field num_columns is '4', not an integer"),
        ({"num_embeddings": True}, "field num_embeddings is True"),
        ({"speed": 3}, "no field speed"),
        ({"kind": "magic"}, "kind 'magic' is not one of codebook, rowwise"),
        ({"num_embeddings": 0}, "is empty"),
        ({"rank": 8}, "rank is 8: it requires a rotation"),
        ({"rank": 16, "rotation": "opq"}, "has to be from 1 to 15"),
        ({"rank": 6, "rotation": "opq"}, "cannot split rows of 6 into 4 columns"),
        ({"rank": "6", "rotation": "opq"}, "field rank is '6', not an integer"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
    ],
)
def test_a_contradictory_spec_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_from_json({**PQ.to_json(), **change})
