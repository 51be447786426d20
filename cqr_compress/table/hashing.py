"""A seeded universal hash of ids, identical on every machine and device.

Hashed codes take no bytes: they are computed from the id and the seed, which is part of the spec.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PRIME = 2**31 - 1
"""A Mersenne prime, of which products of two residues fit in int64."""


def hash_ids(ids: Tensor, num_buckets: int, seed: int, streams: Sequence[int] = (0,)) -> Tensor:
    """Map ids to buckets with polynomial hashes over GF(2**31 - 1).

    h(x) = ((a * x1 + b * x0 + c) mod p) mod num_buckets with x = x1 * 2**30 + x0: a universal family
    (Carter & Wegman 1979, doi:10.1016/0022-0000(79)90044-8), exact in int64 on every device.

    Args:
        ids: (B,) integers in [0, 2**60).
        num_buckets: K, at most 2**31 - 1.
        seed: selects the hash functions of the family.
        streams: n stream numbers, which give independent hash functions with one seed (for columns and levels).

    Returns:
        (B, n) int64 on the device of `ids`, in [0, num_buckets).
    """
    a, b, c = _constant(hash_coefficients(seed, streams), ids.device).unbind(1)
    ids = ids.to(torch.int64)[:, None]
    low, high = ids & (2**30 - 1), ids >> 30
    return (b * low % PRIME + a * high % PRIME + c) % PRIME % num_buckets


def hash_coefficients(seed: int, streams: Iterable[int]) -> list[list[int]]:
    """Return the coefficients (a, b, c) of each stream, all in [1, p)."""
    return [[_coefficient(seed, stream, index) for index in range(3)] for stream in streams]


def _constant(values: list[list[int]], device: torch.device) -> Tensor:
    if torch._C._get_tracing_state() is None:
        return torch.tensor(values, device=device)
    with warnings.catch_warnings():  # torch.jit.trace warns of constants, which are intended here
        warnings.simplefilter("ignore")
        return torch.tensor(values, device=device)


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
    return state % (PRIME - 1) + 1
