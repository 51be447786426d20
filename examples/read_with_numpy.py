"""Read a compressed file with numpy and safetensors alone: the format, for readers in other languages.

    python examples/read_with_numpy.py small.safetensors [-o dense.npz]

The metadata key "cqr_compress" is JSON; tables[NAME].spec has the layout of a table. Its tensors are NAME.codes
and so on, where a final ".weight" of NAME is left out. Bits are least significant first everywhere. Kinds of specs
(digits of ids as codes, which `convert` never makes, are not read here):

    codebook   row = concatenation over columns of the sums over levels of codebooks[column, level, code], rotated
    rowwise    row = row_offset + row_scale * codes
    trellis    row = row_mean + gain * (values[state] * dim_scale) times rotation
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
from safetensors import safe_open

P = 2**31 - 1


def unpack(packed, first_bits, num_bits):
    """Read num_bits from each of the bits first_bits (M,) on, of rows of bytes (B, W): (B, M)."""
    wide = np.pad(packed, ((0, 0), (0, 2))).astype(np.int32)
    byte = first_bits // 8
    return (wide[:, byte] | wide[:, byte + 1] << 8 | wide[:, byte + 2] << 16) >> first_bits % 8 & 2**num_bits - 1


def codebook_rows(spec, t, ids):
    """Sum codewords over levels, concatenate columns, rotate."""
    codebooks = t["codebooks"].astype(np.float32)  # (C, L, K, S)
    if spec["codebook_dtype"] == "int8":
        codebooks *= t["codebook_scale"].astype(np.float32)[:, :, None]
    columns, codes = np.arange(len(codebooks)), codes_of(spec, t, ids)
    rows = sum(codebooks[columns, level, codes[:, :, level]] for level in range(codes.shape[2]))
    return rotate(rows.reshape(len(ids), -1), t)


def codes_of(spec, t, ids):
    """Unpack stored codes, and compute those that ids give: (B, C, L)."""
    C, K, sources = spec["num_columns"], spec["codebook_size"], spec["code_sources"]
    n, stored = max(1, (K - 1).bit_length()), np.array(sources) == "stored"
    given = {"quotient": ids // -(-spec["num_embeddings"] // K), "remainder": ids % K}
    codes = np.stack([np.tile(given.get(source, ids)[:, None], C) for source in sources], 2)
    if stored.any():
        codes[:, :, stored] = unpack(t["codes"][ids], np.arange(C * stored.sum()) * n, n).reshape(len(ids), C, -1)
    for column, level in np.argwhere([[source == "hashed" for source in sources]] * C).tolist():
        _, b, c = (coefficient(spec["seed"], column * len(sources) + level, index) for index in range(3))
        codes[:, column, level] = (b * ids % P + c) % P % K  # ids below 2**30
    return codes


def coefficient(seed, stream, index):
    """Draw a number of a hash function by splitmix64."""
    mask = 2**64 - 1
    state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + index + 1) & mask
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state % (P - 1) + 1


def rotate(rows, t):
    """Multiply by the rotation, whose rows are normalized where they are integers."""
    if "rotation" not in t:
        return rows
    rotation = t["rotation"].astype(np.float32)
    if t["rotation"].dtype == np.int8:
        rotation /= np.maximum(np.linalg.norm(rotation, axis=1, keepdims=True), 1)
    return rows @ rotation


def rowwise_rows(spec, t, ids):
    """Scale integers and add an offset."""
    codes = unpack(t["codes"][ids], np.arange(spec["embedding_dim"]) * spec["n_bits"], spec["n_bits"])
    return t["row_offset"][ids, None].astype(np.float32) + t["row_scale"][ids, None].astype(np.float32) * codes


def trellis_rows(spec, t, ids):
    """Read the windows of a ring of bits, one for each dimension, and look their values up."""
    sizes = np.array(spec["tier_nbytes"])
    every = np.zeros(spec["num_embeddings"], int)
    if len(sizes) > 1:  # 2 bits for each row
        every = (t["row_tiers"][:, None] >> 2 * np.arange(4, dtype=np.uint8) & 3).reshape(-1)[: len(every)]
    tiers, first = every[ids], (sizes[every].cumsum() - sizes[every])[ids]
    values = t["state_values"] if "state_values" in t else seeded_values(spec["window"], spec["seed"])
    rows = np.zeros((len(ids), t["dim_rates"].shape[1]), np.float32)
    for tier, size in enumerate(sizes):
        here = np.flatnonzero(tiers == tier)
        rates = t["dim_rates"][tier].astype(int)
        ring = t["codes"].reshape(-1)[first[here, None] + np.arange(size + 2) % size]
        states = unpack(ring, (rates.cumsum() - rates) % (8 * size), spec["window"])
        rows[here] = values[states].astype(np.float32) * t["dim_scale"][tier].astype(np.float32)
    if spec["gain_bits"]:
        low, log_ratio = t["gain_range"].astype(np.float32)
        rows *= low * np.exp(t["row_gain"][ids, None].astype(np.float32) / 255 * log_ratio)
    return rotate(rows, t) + t["row_mean"].astype(np.float32)


def seeded_values(window, seed):
    """Quantiles of a normal distribution, in an order that is a nested scramble of the reversed bits."""
    states = np.arange(2**window)
    order = np.zeros_like(states)
    for bit in range(window):
        _, b, c = (coefficient(seed, bit, index) for index in range(3))
        flip = (b * (states >> (bit + 1)) % P + c) % P % 2
        order |= ((states >> bit & 1) ^ flip) << (window - 1 - bit)
    values = np.array([NormalDist().inv_cdf((i + 0.5) / 2**window) for i in range(2**window)])[order]
    return (values / np.sqrt((values**2).mean())).astype(np.float16)


def rows_of(spec, tensors, ids):
    """Decode rows of a table: ids (B,) to (B, D) float32."""
    decode = {"codebook": codebook_rows, "rowwise": rowwise_rows, "trellis": trellis_rows}[spec["kind"]]
    rows = decode(spec, tensors, ids)
    kept = tensors.get("kept_ids", np.empty(0, int))  # ids of exact rows, then of rows of zeros
    for i, row in enumerate(kept):
        rows[ids == row] = tensors["kept_rows"][i] if i < spec["num_kept_rows"] else 0
    return rows


def read(path):
    """Return specs and tensors of all tables of a file, by name."""
    with safe_open(path, "np") as file:
        tables = json.loads(file.metadata()["cqr_compress"])["tables"]
        names, found = set(file.keys()), {}
        for name, table in tables.items():
            start = "" if name == "weight" else name.removesuffix(".weight") + "."
            own = [n for n in names if n.startswith(start) and n != name and "." not in n.removeprefix(start)]
            found[name] = table["spec"], {n.removeprefix(start): file.get_tensor(n) for n in own}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read a compressed file with numpy.")
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="write the decoded tables to an .npz file")
    args = parser.parse_args()
    tables = {n: rows_of(s, t, np.arange(s["num_embeddings"])) for n, (s, t) in read(args.file).items()}
    for name, rows in tables.items():
        print(f"{name} {rows.shape[0]} x {rows.shape[1]}: {rows[0, :4]} ...")
    if args.output:
        np.savez(args.output, **tables)
