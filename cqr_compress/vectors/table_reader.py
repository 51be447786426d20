"""Rows of compressed tables as `table` decodes them, with numpy or the library of the wheel: without torch.

`table.spec` describes the layouts and their tensors in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cqr_compress.errors import FormatError
from cqr_compress.vectors.compiled_rows import CompiledRows

_PRIME = 2**31 - 1
_BLOCK = 128
"""Rows for each entry of `tier_starts`."""
_BYTES = frozenset(["codes", "row_tiers", "row_gain", "dim_rates"])
Array = NDArray[Any]


class TableReader:
    """Decodes rows of a table.

    Attributes:
        shape: (N, D).
    """

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        """Prepare the tensors of a table.

        Args:
            spec: the table's spec as in the header of the file.
            tensors: its tensors by short name, as in the file.

        Raises:
            FormatError: a layout that is decoded by torch only: codes that are computed from ids; or tensors that
                do not belong to the spec.
        """
        self._spec, self._tensors = spec, dict(tensors)
        self.shape: tuple[int, int] = (spec["num_embeddings"], spec["embedding_dim"])
        if spec["kind"] == "codebook" and set(spec["code_sources"]) != {"stored"}:
            raise FormatError(f"tables of method {spec['method']!r} are decoded by torch: use cqr.load_compressed")
        _check(spec, self._tensors)
        self._tensors = {short: self._tensors[short] for short in _shapes(spec)}  # others are not checked
        if spec["kind"] == "codebook":
            self._prepare_codebook()
        elif spec["kind"] == "trellis":
            self._prepare_trellis()
        kept = self._tensors.get("kept_ids", np.empty(0, np.int64)).astype(np.int64)
        self._exact, self._zero = kept[: spec["num_kept_rows"]], kept[spec["num_kept_rows"] :]
        self._apart = frozenset(kept.tolist())
        self._compiled = CompiledRows.of(spec, self._tensors)

    def row(self, id: int) -> NDArray[np.float32]:
        """Decode the row of an id in [0, N): (D,) float32."""
        if self._compiled is None or id in self._apart:
            one: NDArray[np.float32] = self.rows(np.array([id]))[0]
            return one
        row = self._compiled.row(id)
        return self._rotated(row) if self._spec["kind"] == "codebook" else row

    def rows(self, ids: Array) -> NDArray[np.float32]:
        """Decode rows: ids (B,) integers in [0, N) to (B, D) float32."""
        kind = self._spec["kind"]
        if self._compiled is None:
            decode = {
                "codebook": self._codebook_rows,
                "trellis": self._trellis_rows,
                "rowwise": self._rowwise_rows,
            }
            rows: Array = decode[kind](ids).astype(np.float32, copy=False)
        else:
            rows = self._compiled.rows(ids)
            rows = self._rotated(rows) if kind == "codebook" else rows
        for stored, values in ((self._exact, self._tensors.get("kept_rows")), (self._zero, None)):
            if not len(stored):
                continue
            at = np.minimum(np.searchsorted(stored, ids), len(stored) - 1)
            hit = stored[at] == ids
            rows[hit] = 0.0 if values is None else values[at[hit]]
        return rows

    def _prepare_codebook(self) -> None:
        tensors = self._tensors
        if self._spec["codebook_dtype"] == "int8":
            scale = tensors["codebook_scale"].astype(np.float32)[:, :, None]
            tensors["codebooks"] = tensors["codebooks"].astype(np.float32) * scale
            self._normalize_rotation()
        tensors["codebooks"] = tensors["codebooks"].astype(np.float32)
        if "rotation" in tensors:
            tensors["rotation"] = tensors["rotation"].astype(np.float32)

    def _codebook_rows(self, ids: Array) -> Array:
        codebooks = self._tensors["codebooks"]
        C, L, K, S = codebooks.shape
        n_bits = max(1, (K - 1).bit_length())
        codes = _unpack(self._tensors["codes"][ids], C * L, n_bits).reshape(len(ids), C, L)
        rows = np.zeros((len(ids), C, S), np.float32)
        for level in range(L):
            rows += codebooks[np.arange(C), level, codes[:, :, level]]
        return self._rotated(rows.reshape(len(ids), C * S))

    def _rowwise_rows(self, ids: Array) -> Array:
        tensors, spec = self._tensors, self._spec
        codes = _unpack(tensors["codes"][ids], spec["embedding_dim"], spec["n_bits"]).astype(np.float32)
        scale, offset = (tensors[name][ids].astype(np.float32)[:, None] for name in ("row_scale", "row_offset"))
        return offset + scale * codes

    def _prepare_trellis(self) -> None:
        spec, tensors = self._spec, self._tensors
        if spec["rotation"]:
            self._normalize_rotation()
        for name in ("dim_scale", "row_mean", "gain_range", "state_values"):
            if name in tensors:
                tensors[name] = tensors[name].astype(np.float32)
        if "state_values" not in tensors:
            tensors["state_values"] = seeded_values(spec["window"], spec["seed"])
        rates, sizes = tensors["dim_rates"].astype(np.int64), spec["tier_nbytes"]
        first_bits = rates.cumsum(1) - rates
        self._first_bytes = [bits // 8 % size for bits, size in zip(first_bits, sizes, strict=True)]
        self._first_bits = [(bits % 8).astype(np.int32) for bits in first_bits]
        self._rings = [np.arange(size + 2) % size for size in sizes]
        if len(sizes) > 1:
            tiers = np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3  # of the four rows of a byte
            self._before = np.pad(np.array([*sizes, 0, 0])[tiers].cumsum(1), ((0, 0), (1, 0)))
            ends = self._before[:, 4].take(tensors["row_tiers"]).cumsum()
            self._starts = np.concatenate([[0], ends[:-1]]).astype(np.uint32 if ends[-1] < 2**32 else np.int64)
        if spec["gain_bits"]:
            low, log_ratio = tensors["gain_range"]
            self._gains = low * np.exp(np.arange(256, dtype=np.float32) / 255 * log_ratio)

    def _trellis_rows(self, ids: Array) -> Array:
        spec, tensors = self._spec, self._tensors
        tiers, first = self._places(np.asarray(ids, np.int64))
        if len(tiers) == 1:
            rows = self._trellis_values(int(tiers[0]), first)
        else:
            rows = np.empty((len(tiers), len(self._first_bits[0])), np.float32)
            for tier in range(len(spec["tier_nbytes"])):
                here = np.flatnonzero(tiers == tier)
                if len(here):
                    rows[here] = self._trellis_values(tier, first[here])
        if spec["gain_bits"]:
            rows *= self._gains[tensors["row_gain"][ids]][:, None]
        rows = self._rotated(rows)
        rows += tensors["row_mean"]
        return rows

    def _trellis_values(self, tier: int, first: Array) -> Array:
        """Decode rows of a tier whose codes begin at the bytes `first` (B,): (B, P), in the order of the codes."""
        ring = self._tensors["codes"].reshape(-1)[first[:, None] + self._rings[tier]].astype(np.int32)
        words = ring[:, :-2] | ring[:, 1:-1] << 8 | ring[:, 2:] << 16
        states = words.take(self._first_bytes[tier], axis=1)
        states >>= self._first_bits[tier]
        states &= 2 ** self._spec["window"] - 1
        values: Array = self._tensors["state_values"].take(states)
        values *= self._tensors["dim_scale"][tier]
        return values

    def _places(self, ids: Array) -> tuple[Array, Array]:
        """Return the tiers of rows, and the first bytes of their codes."""
        sizes = self._spec["tier_nbytes"]
        if len(sizes) == 1:
            return np.zeros_like(ids), ids * sizes[0]
        four, place = ids // 4, ids % 4
        byte = self._tensors["row_tiers"][four]
        first = self._starts[four] + self._before[byte, place]
        return byte >> (2 * place).astype(np.uint8) & 3, first

    def _normalize_rotation(self) -> None:
        if "rotation" in self._tensors:
            rotation = self._tensors["rotation"].astype(np.float64)
            norm = np.maximum(np.linalg.norm(rotation, axis=1, keepdims=True), 1)
            self._tensors["rotation"] = (rotation / norm).astype(np.float32)

    def _rotated(self, rows: Array) -> Array:
        rotation = self._tensors.get("rotation")
        return rows if rotation is None else rows @ rotation


def _check(spec: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Refuse tensors that do not belong to a spec: decoding would fail, or read other bytes.

    Raises:
        FormatError: a tensor that is missing, of another shape or type, or has values that are out of range.
    """
    try:
        shapes = _shapes(spec)
        found = {short: tensors[short].shape for short in shapes}
        are_bytes = all(tensors[short].dtype == np.uint8 for short in shapes.keys() & _BYTES)
        kept = tensors["kept_ids"].astype(np.int64) if "kept_ids" in shapes else np.empty(0, np.int64)
        parts = np.split(kept, [spec["num_kept_rows"]])
        ids = all(
            not len(p) or ((np.diff(p) > 0).all() and p[0] >= 0 and p[-1] < spec["num_embeddings"]) for p in parts
        )
        if found != shapes or not are_bytes or not ids:
            raise ValueError("its tensors have other shapes, types or ids than it says")
        if spec["kind"] == "trellis":
            rates = tensors["dim_rates"].astype(np.int64)
            if rates.sum(1).tolist() != [8 * size for size in spec["tier_nbytes"]] or rates.max() > 8:
                raise ValueError("its rates are not those of its rows")
            if len(spec["tier_nbytes"]) > 1:
                _check_tiers(spec, tensors)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as e:
        raise FormatError(f"the compressed table is damaged: {type(e).__name__}: {e}") from e


def _shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of a table have in a file, as `table.spec` describes them."""
    N, D = _whole(spec["num_embeddings"], 1), _whole(spec["embedding_dim"], 1)
    kept, zero = _whole(spec["num_kept_rows"]), _whole(spec["num_zero_rows"])
    shapes: dict[str, tuple[int, ...]] = {"kept_ids": (kept + zero,)} if kept + zero else {}
    if kept:
        shapes["kept_rows"] = (kept, D)
    if spec["kind"] == "rowwise":
        n_bits = _whole(spec["n_bits"], 1, 8)
        return shapes | {"codes": (N, -(-D * n_bits // 8)), "row_scale": (N,), "row_offset": (N,)}
    P = D if spec["rank"] is None else _whole(spec["rank"], 1, D)
    if spec["rotation"]:
        shapes["rotation"] = (P, D)
    elif P != D:
        raise ValueError("its rank has no rotation")
    if spec["kind"] == "codebook":
        C, L, K = (_whole(spec[name], 1) for name in ("num_columns", "num_levels", "codebook_size"))
        if P % C or K & (K - 1) or not 2 <= K <= 2**16:
            raise ValueError(f"{C} columns of {K} codewords do not divide {P} dimensions")
        shapes |= {"codes": (N, -(-C * L * (K - 1).bit_length() // 8)), "codebooks": (C, L, K, P // C)}
        return shapes | ({"codebook_scale": (C, L, P // C)} if spec["codebook_dtype"] == "int8" else {})
    if spec["kind"] != "trellis":
        raise ValueError("its kind is unknown")
    sizes = [_whole(size, 1, D) for size in spec["tier_nbytes"]]
    tiers, window = _whole(len(sizes), 1, 4), _whole(spec["window"], 8, 16)
    _whole(spec["seed"], -(2**63), 2**63)
    shapes |= {"codes": (N, sizes[0]), "dim_rates": (tiers, P), "dim_scale": (tiers, P), "row_mean": (D,)}
    if tiers > 1:
        shapes["codes"] = (sum(n * size for n, size in zip(spec["tier_rows"], sizes, strict=True)),)
        shapes |= {"row_tiers": (-(-N // 4),), "tier_starts": (-(-N // _BLOCK),)}
    if spec["value_source"] == "stored":
        shapes["state_values"] = (2**window,)
    return shapes | ({"row_gain": (N,), "gain_range": (2,)} if spec["gain_bits"] else {})


def _whole(value: Any, least: int = 0, most: int = 2**48) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"it has {str(value)[:80]} in place of an integer from {least} to {most}")
    return value


def _check_tiers(spec: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Check that the codes of all rows follow each other."""
    tiers = (tensors["row_tiers"][:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1)
    sizes = np.array(spec["tier_nbytes"])[tiers[: spec["num_embeddings"]]]
    starts = sizes.cumsum() - sizes
    if sizes.sum() != tensors["codes"].size or not np.array_equal(starts[::_BLOCK], tensors["tier_starts"]):
        raise ValueError("its codes do not follow each other as its tiers say")


def _unpack(packed: Array, num_codes: int, n_bits: int) -> Array:
    """Read codes of `n_bits`, least significant bit first: (B, width) uint8 to (B, num_codes) integers."""
    if n_bits == 8:
        return packed[:, :num_codes]
    bits = np.arange(num_codes) * n_bits
    codes: Array = _words(np.pad(packed, ((0, 0), (0, 2))), bits // 8) >> bits % 8 & 2**n_bits - 1
    return codes


def _words(rows: Array, first: Array) -> Array:
    """Read three bytes from each position `first` (P,) of rows on: (B, P) int32."""
    wide = rows.astype(np.int32)
    words: Array = wide[:, first] | wide[:, first + 1] << 8 | wide[:, first + 2] << 16
    return words


def seeded_values(window: int, seed: int) -> Array:
    """Compute the values of the states of a trellis, as `table.trellis.seeded_values` does."""
    states = np.arange(2**window)
    order = np.zeros_like(states)
    for bit in range(window):
        ids = states >> (bit + 1)
        a, b, c = (_coefficient(seed, bit, index) for index in range(3))
        flip = (b * (ids & 2**30 - 1) % _PRIME + a * (ids >> 30) % _PRIME + c) % _PRIME % 2
        order |= ((states >> bit & 1) ^ flip) << (window - 1 - bit)
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((rank + 0.5) / 2**window) for rank in range(2**window)])
    values = quantiles[order]
    halves: Array = (values / np.sqrt(np.mean(np.square(values)))).astype(np.float16)
    return halves.astype(np.float32)


def _coefficient(seed: int, stream: int, index: int) -> int:
    """Draw a coefficient of a hash function; see `table.hashing`."""
    mask = 2**64 - 1
    state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + index + 1) & mask
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state % (_PRIME - 1) + 1
