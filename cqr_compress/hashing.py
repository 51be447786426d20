"""A seeded universal hash of ids, the same on every machine and device.

Codes that are hashed cost no bytes: the seed stands in the spec, and the code is computed from the id.
"""

import torch
from torch import Tensor

_PRIME = 2**31 - 1  # Mersenne: products of two residues fit in int64


def hash_ids(ids: Tensor, num_buckets: int, seed: int, stream: int = 0) -> Tensor:
    """Map ids to buckets with a polynomial hash over GF(2**31 - 1).

    h(x) = ((a * x1 + b * x0 + c) mod p) mod num_buckets with x = x1 * 2**30 + x0: a universal family
    (Carter & Wegman 1979, doi:10.1016/0022-0000(79)90044-8), exact in int64 on every device.

    Args:
        ids: any shape, integers in [0, 2**60).
        num_buckets: K, at most 2**31 - 1.
        seed: names the member of the family.
        stream: a second name, for independent hashes under one seed (a column, a level).

    Returns:
        int64 of the shape of `ids`, in [0, num_buckets).
    """
    a, b, c = (_coefficient(seed, stream, index) for index in range(3))
    ids = ids.to(torch.int64)
    low, high = ids & (2**30 - 1), ids >> 30
    return ((b * low % _PRIME + a * high % _PRIME + c) % _PRIME) % num_buckets


def _coefficient(seed: int, stream: int, index: int) -> int:
    """Draw a number in [1, p) by splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""
    mask = 2**64 - 1
    state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + index + 1) & mask
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state % (_PRIME - 1) + 1
