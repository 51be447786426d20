import torch

from cqr_compress.table.hashing import hash_ids


def test_hashes_are_a_fixed_function_of_seed_and_stream() -> None:
    # golden values of the file format: hashed codes are not stored
    assert hash_ids(torch.tensor([0, 1, 2, 10**12]), 1000, seed=0)[:, 0].tolist() == [790, 821, 852, 135]


def test_buckets_fill_evenly_and_streams_are_independent() -> None:
    ids = torch.arange(100_000)
    first, second = hash_ids(ids, 100, seed=3, streams=(0, 1)).unbind(1)
    for codes in (first, second):
        counts = torch.bincount(codes, minlength=100)
        assert 700 < int(counts.min()) <= int(counts.max()) < 1300
    assert abs(float((first == second).float().mean()) - 0.01) < 0.003
