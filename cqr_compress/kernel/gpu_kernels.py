"""Lookups on a GPU, in Triton; imported where `gpu` has found that it works.

A program decodes BLOCK_ROWS rows of the batch. BLOCK_DIM is the next power of two of the dimensions. Sizes of a
table are arguments that Triton does not specialize: tables of a model share the compiled kernels.

An id outside the table raises a device-side assert, as in nn.Embedding.
"""

from __future__ import annotations

import triton
import triton.language as tl

TIER_BLOCK = tl.constexpr(128)
"""Rows for each entry of `starts`, as in `table.trellis_spec`."""
PRIME = tl.constexpr(2**31 - 1)
"""Modulus of the hash, as in `table.hashing`."""


@triton.jit(debug=True)
def _batch_ids(ids, num_ids, num_rows, BLOCK_ROWS: tl.constexpr):
    """Load the ids of a program: places in the batch (R,) int64, which of them exist, and ids (R,) int64."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = at < num_ids
    row = tl.load(ids + at, mask=exists, other=0).to(tl.int64)
    tl.device_assert((row >= 0) & (row < num_rows), "an id is outside the table")
    return at, exists, row


@triton.jit
def _of_tier(tier, first, second, third, fourth):
    return tl.where(tier == 0, first, tl.where(tier == 1, second, tl.where(tier == 2, third, fourth)))


@triton.jit(
    debug=True,
    do_not_specialize=[
        "num_ids",
        "num_rows",
        "dim",
        "window",
        "num_bytes",
        "width_0",
        "width_1",
        "width_2",
        "width_3",
    ],
)
def trellis_kernel(
    out, ids, num_ids, num_rows, dim, window, codes, num_bytes, rates, width_0, width_1, width_2, width_3,
    row_tiers, starts, values, scale, mean, gains, gain_range,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Decode rows (B, P) before the rotation, or their states without values.

    The tensors are those of `TrellisSpec`; row_tiers, mean and gains are None where a table has none.
    """
    at, exists, row = _batch_ids(ids, num_ids, num_rows, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = exists[:, None] & (d < dim)
    if row_tiers is not None:
        block, place = row // TIER_BLOCK, (row % TIER_BLOCK).to(tl.int32)
        byte = tl.arange(0, TIER_BLOCK // 4)[None, :]
        at_byte = block[:, None] * (TIER_BLOCK // 4) + byte
        packed = tl.load(row_tiers + at_byte, mask=4 * at_byte < num_rows, other=0).to(tl.int32)
        before = tl.zeros_like(packed)
        for within in tl.static_range(4):
            width = _of_tier(packed >> 2 * within & 3, width_0, width_1, width_2, width_3)
            before += tl.where(4 * byte + within < place[:, None], width, 0)
        tier = tl.load(row_tiers + row // 4).to(tl.int32) >> (2 * (row % 4)).to(tl.int32) & 3
        first = tl.load(starts + block).to(tl.int64) + tl.sum(before, axis=1)
        width = _of_tier(tier, width_0, width_1, width_2, width_3)
        tl.device_assert((first >= 0) & (first + width <= num_bytes) & (width > 0), "codes are outside the table")
        of_dim = tier[:, None] * dim + d
        rate = tl.load(rates + of_dim, mask=d < dim, other=0).to(tl.int32)
        bit = tl.cumsum(rate, axis=1) - rate
        width = width[:, None]
    else:
        first = row * width_0
        of_dim = d
        rate = tl.load(rates + d, mask=d < dim, other=0).to(tl.int32)
        bit = tl.cumsum(rate, axis=1) - rate
        width = width_0
    state = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.int32)
    for offset in tl.static_range(3):
        read = tl.load(codes + first[:, None] + ((bit >> 3) + offset) % width, mask=inside, other=0)
        state |= read.to(tl.int32) << 8 * offset
    state = (state >> (bit & 7)) & ((1 << window) - 1)
    target = out + at[:, None] * dim + d
    if values is None:
        tl.store(target, state, mask=inside)
    else:
        decoded = tl.load(values + state).to(tl.float32) * tl.load(scale + of_dim, mask=d < dim, other=0).to(
            tl.float32
        )
        if gains is not None:
            code = tl.load(gains + row).to(tl.float32)
            low, log_ratio = tl.load(gain_range).to(tl.float32), tl.load(gain_range + 1).to(tl.float32)
            decoded *= (low * tl.exp(code / 255 * log_ratio))[:, None]
        if mean is not None:
            decoded += tl.load(mean + d, mask=d < dim, other=0).to(tl.float32)
        tl.store(target, decoded, mask=inside)


@triton.jit(
    debug=True,
    do_not_specialize=[
        "num_ids", "num_rows", "dim", "width", "n_bits", "num_levels", "num_stored", "codebook_size", "sub_dim"
    ],
)  # fmt: skip
def codebook_kernel(
    out, ids, num_ids, num_rows, dim, codes, width, n_bits, num_levels, num_stored, codebooks, codebook_size,
    sub_dim, coefficients, CODE_BYTES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Sum the codewords of rows (B, P) before the rotation.

    Levels with stored codes come before hashed ones; without either, codes or coefficients are None.
    """
    at, exists, row = _batch_ids(ids, num_ids, num_rows, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = exists[:, None] & (d < dim)
    column, within = d // sub_dim, d % sub_dim
    decoded = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    if codes is not None:
        for level in range(num_stored):
            bit = (column * num_stored + level) * n_bits
            byte = bit >> 3
            code = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.int32)
            for offset in tl.static_range(CODE_BYTES):
                held = inside & (byte + offset < width)
                read = tl.load(codes + row[:, None] * width + byte + offset, mask=held, other=0)
                code |= read.to(tl.int32) << 8 * offset
            code = (code >> (bit & 7)) & ((1 << n_bits) - 1)
            word = ((column * num_levels + level).to(tl.int64) * codebook_size + code) * sub_dim + within
            decoded += tl.load(codebooks + word, mask=inside, other=0).to(tl.float32)
    if coefficients is not None:
        for level in range(num_stored, num_levels):
            low, high = (row & (1 << 30) - 1)[:, None], (row >> 30)[:, None]
            codebook = column * num_levels + level
            a = tl.load(coefficients + 3 * codebook, mask=d < dim, other=0)
            b = tl.load(coefficients + 3 * codebook + 1, mask=d < dim, other=0)
            c = tl.load(coefficients + 3 * codebook + 2, mask=d < dim, other=0)
            code = (b * low % PRIME + a * high % PRIME + c) % PRIME % codebook_size
            word = (codebook.to(tl.int64) * codebook_size + code) * sub_dim + within
            decoded += tl.load(codebooks + word, mask=inside, other=0).to(tl.float32)
    tl.store(out + at[:, None] * dim + d, decoded, mask=inside)


@triton.jit(debug=True, do_not_specialize=["num_ids", "num_rows", "dim", "width"])
def integer_kernel(
    out, ids, num_ids, num_rows, dim, codes, width, scale, offset, N_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Decode rows (B, D) of 8 or 4 bits a value."""
    at, exists, row = _batch_ids(ids, num_ids, num_rows, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = exists[:, None] & (d < dim)
    code = tl.load(codes + row[:, None] * width + d * N_BITS // 8, mask=inside, other=0)
    if N_BITS == 4:
        code = code >> (d % 2 * 4).to(tl.uint8) & 15
    factor = tl.load(scale + row).to(tl.float32)[:, None]
    decoded = tl.load(offset + row).to(tl.float32)[:, None] + factor * code.to(tl.float32)
    tl.store(out + at[:, None] * dim + d, decoded, mask=inside)


@triton.jit
def _find(sorted_ids, count, row, steps):
    """Find rows (R,) in a sorted list: the places of the last entries that are not larger, and which are equal."""
    place = tl.zeros_like(row)
    for step in range(steps):
        probe = tl.minimum(place + (1 << (steps - 1 - step)), count - 1)
        place = tl.where(tl.load(sorted_ids + probe).to(tl.int64) <= row, probe, place)
    return place, tl.load(sorted_ids + place).to(tl.int64) == row


@triton.jit(
    debug=True,
    do_not_specialize=["num_ids", "num_rows", "dim", "num_kept", "kept_steps", "num_zero", "zero_steps"],
)
def exact_kernel(
    rows, ids, num_ids, num_rows, dim, kept_ids, kept_rows, num_kept, kept_steps, num_zero, zero_steps,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Overwrite rows (B, D) of ids that are stored apart; `kept_ids` has two sorted lists, exact and zero rows."""
    at, exists, row = _batch_ids(ids, num_ids, num_rows, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)[None, :]
    target = rows + at[:, None] * dim + d
    inside = exists[:, None] & (d < dim)
    if kept_rows is not None:
        place, found = _find(kept_ids, num_kept, row, kept_steps)
        exact = tl.load(kept_rows + place[:, None] * dim + d, mask=inside & found[:, None], other=0)
        tl.store(target, exact.to(rows.dtype.element_ty), mask=inside & found[:, None])
    if num_zero > 0:
        place, found = _find(kept_ids + num_kept, num_zero, row, zero_steps)
        zeros = tl.zeros((BLOCK_ROWS, BLOCK_DIM), rows.dtype.element_ty)
        tl.store(target, zeros, mask=inside & found[:, None])
