"""Base class of layers over a compressed table: its tensors, their decoded rows, and `weight`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cqr_compress.errors import CqrCompressWarning, RowIndexError, ShapeError, WeightWriteError
from cqr_compress.nn.lookup import lookup_compiled, replace_exact_rows, unrotated_rows
from cqr_compress.nn.search import TopK, search_scores, search_topk
from cqr_compress.nn.table_weight import TableWeight
from cqr_compress.table.base_spec import dtype_name
from cqr_compress.table.blocks import BLOCK_BYTES, GPU_BLOCK_BYTES, row_blocks
from cqr_compress.table.decode import decode, decode_all, gather_rows
from cqr_compress.table.spec import HASHED, AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.table import CompressedTable
from cqr_compress.table.tracing import is_intercepted, is_tracing
from cqr_compress.table.trellis import seeded_values
from cqr_compress.table.trellis_spec import SEEDED_VALUES

_LIKE = "_like"
_VALUES = "_values"
"""Buffer with the values of a trellis that are computed from the seed; the file has none."""
_SEED = "hash_seed"
"""Buffer with the seed of a layer's hash functions, if `reseed` changed it."""


class Observer(Protocol):
    """Observer of each use of a layer's rows, which can replace the result that the model receives."""

    def on_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return the rows (B, D) to use for ids (B,), given the rows that were looked up."""

    def on_matmul(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Return the products (..., V) of queries (..., D) with rows (V, D) of ids (V,)."""


class TableLayer(nn.Module):
    """Base class of the drop-in layers, whose rows are decoded from a compressed table.

    Floating-point tensors of the table are Parameters, integer tensors are buffers, under the names of
    `spec.tensor_shapes()`: the layer's state_dict contains the same tensors as the file, with int8 codebooks and
    rotations in floating point. Rows are computed in
    float32 (float64 for float64 codebooks) and returned in the layer's dtype, which `.half()`, `.bfloat16()` and
    `.to()` change like the dtype of a weight.

    A layer that is tied to another one has no tensors and reads those of its `owner`.

    Attributes:
        num_embeddings: N, number of rows.
        embedding_dim: D, dimensions of a row.
        padding_idx: row that receives no gradient, or None.
        max_norm: rows with a larger norm are renormalized to this norm, or None.
        norm_type: p of the p-norm for max_norm.
        scale_grad_by_freq: whether gradients are scaled by the inverse frequency of the ids in the batch.
        observer: observer of the layer's lookups and products, or None.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    _spec: AnySpec
    _owner: TableLayer | None
    observer: Observer | None = None
    _names: tuple[str, ...]  # of the table's tensors, cached because a lookup needs them

    def hold_table(
        self,
        table: CompressedTable,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> None:
        """Register the tensors of a table with the layer, without copying those that are already on `device`.

        Args:
            table: the compressed table.
            device: device of the tensors; unchanged if None.
            dtype: dtype of the rows; that of the source if None.
            requires_grad: whether floating-point tensors, such as codebooks, require gradients.
        """
        self._spec, self._owner, self._names = table.spec, None, tuple(table.spec.tensor_shapes())
        self._buffers.pop(_SEED, None)  # of a table that this one replaces
        for short, tensor in table.tensors.items():
            moved = tensor.to(device)
            if moved.is_floating_point() and moved.numel():
                self.register_parameter(short, nn.Parameter(moved, requires_grad))
            else:
                self.register_buffer(short, moved)
        self._buffers.pop(_VALUES, None)
        if isinstance(table.spec, TrellisSpec) and table.spec.value_source == SEEDED_VALUES:
            values = seeded_values(table.spec.window, table.spec.seed)
            self.register_buffer(_VALUES, values.to(device, copy=True), persistent=False)
        like = torch.empty(0, dtype=dtype or table.spec.torch_dtype, device=device)
        self.register_buffer(_LIKE, like, persistent=False)

    def tie_to(self, owner: TableLayer) -> None:
        """Tie the layer to `owner`, whose tensors it reads; `owner` is not registered as a submodule."""
        object.__setattr__(self, "_owner", owner)

    @property
    def owner(self) -> TableLayer:
        """Layer that holds the tensors: this one, or the one that it is tied to."""
        return self._owner or self

    @property
    def spec(self) -> AnySpec:
        """Spec of the table."""
        return self.owner._spec

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return cast(Tensor, self.owner._buffers[_LIKE]).dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return cast(Tensor, self.owner._buffers[_LIKE]).device

    @property
    def nbytes(self) -> int:
        """Bytes of the table's tensors in memory; 0 if they belong to another layer."""
        return 0 if self.owner is not self else sum(t.nbytes for t in self.table_tensors().values())

    @property
    def num_parameters(self) -> int:
        """Trainable scalars of the table; 0 if they belong to another layer."""
        return 0 if self.owner is not self else sum(p.numel() for p in self.parameters(recurse=False))

    def table_tensors(self) -> dict[str, Tensor]:
        """Return the table's tensors in memory, by short name."""
        parameters, buffers = self.owner._parameters, self.owner._buffers
        return {n: cast(Tensor, parameters[n] if n in parameters else buffers[n]) for n in self.owner._names}

    def _lookup_tensors(self) -> dict[str, Tensor]:
        """Return the table's tensors, with those that are computed from a seed."""
        tensors, seeded = self.table_tensors(), self.owner._buffers.get(_VALUES)
        return tensors if seeded is None else {**tensors, "state_values": seeded}

    def table(self) -> CompressedTable:
        """Return the table with the dtypes in memory; its tensors are shared, except converted ones."""
        tensors = {short: tensor.detach() for short, tensor in self.table_tensors().items()}
        dtypes = {
            name: dtype_name(tensors[short].dtype)
            for name, short in self.spec.dtype_sources.items()
            if getattr(self.spec, name) != "int8"
        }
        spec = replace(self.spec, dtype=dtype_name(self.dtype), **dtypes)  # type: ignore[arg-type]
        shapes = spec.tensor_shapes()
        return CompressedTable(spec, {short: t.to(shapes[short].dtype) for short, t in tensors.items()})

    def lookup_rows(self, ids: Tensor) -> Tensor:
        """Decode the rows of ids; differentiable.

        Args:
            ids: (B,) int32 or int64 in [0, N).

        Returns:
            (B, D) in the layer's dtype.

        Raises:
            RowIndexError: an id outside [0, N) (an IndexError); on CUDA a device-side assert, as in nn.Embedding.
        """
        rows = self._lookup_unobserved(ids)
        observer = self.owner.observer
        return rows if observer is None else observer.on_lookup(ids, rows)

    def _lookup_unobserved(self, ids: Tensor) -> Tensor:
        tensors = self._lookup_tensors()
        rows = lookup_compiled(self.spec, tensors, ids)
        if rows is not None:
            return replace_exact_rows(self.spec, tensors, ids, rows.to(self.dtype))
        if ids.is_cpu and not is_tracing():
            ids = ids.clone()  # another thread must not change them after a check
        if not is_tracing() and ("codes" not in tensors or tensors["codes"].ndim == 1):
            self._check_range(ids)
        if "codes" in tensors and tensors["codes"].dtype != torch.uint8:
            raise ShapeError(
                f"codes of {tensors['codes'].dtype} do not form a table: packed codes have to be torch.uint8"
            )
        try:
            here = gather_rows(self.spec, tensors, ids)
        except IndexError:  # out-of-range ids are detected by the gather itself
            if not is_tracing():
                self._check_range(ids)
            raise
        return decode(self.spec, here, ids, self.dtype)

    @torch.no_grad()
    def lookup_unrotated(self, ids: Tensor) -> Tensor:
        """Decode rows before rotation and mean, and without rows that are stored apart.

        Args:
            ids: (B,) int64 in [0, N).

        Returns:
            (B, width) float32.
        """
        return unrotated_rows(self.spec, self._lookup_tensors(), ids).float()

    def reseed(self, seed: int) -> None:
        """Replace the seed of the table's hash functions; with hashed codes, the seed is then in the state_dict.

        Args:
            seed: at least 0; it replaces the seed of the spec.
        """
        owner = self.owner
        spec = owner._spec = replace(cast(CodebookSpec, owner._spec), seed=seed)
        if HASHED in spec.code_sources:
            held = torch.tensor(seed, dtype=torch.int64, device=self.device)
            owner.register_buffer(_SEED, held)

    def decode(self) -> Tensor:
        """Decode all rows, (N, D) in the layer's dtype; differentiable.

        Without gradients, rows are decoded in blocks, which bounds the memory in addition to the result.
        """
        if is_tracing():
            rows, observer = decode_all(self.spec, self._lookup_tensors(), self.dtype), self.owner.observer
            ids = torch.arange(self.num_embeddings, device=self.device)
            return rows if observer is None else observer.on_lookup(ids, rows)
        blocks = (self.lookup_rows(torch.arange(a, b, device=self.device)) for a, b in self._row_blocks())
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.table_tensors().values()):
            return torch.cat(list(blocks))
        out = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.device)
        for (a, b), block in zip(self._row_blocks(), blocks, strict=True):
            out[a:b] = block
        return out

    @property
    def weight(self) -> Any:
        """Rows as a tensor (N, D), decoded when an operation needs their values; differentiable, read-only.

        `layer.weight[ids]` and `F.embedding(ids, layer.weight)` decode the rows of the ids only. Without
        gradients, `h @ layer.weight.T` and `F.linear(h, layer.weight)` do not decode the table. Other operations
        decode all rows. Indexed rows are copies: writing into `layer.weight[3:5]` does not change the table.
        """
        return self.decode() if is_tracing() else TableWeight.from_layer(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._set_weight(value)

    def _set_weight(self, value: Any) -> None:
        """Accept only the layer's own weight, which code that ties weights assigns again."""
        if not (isinstance(value, TableWeight) and value.layer.owner is self.owner):
            raise WeightWriteError(
                f"cannot set the weight of {type(self).__name__}: its rows are compressed. "
                "Call cqr_compress.decompress_(model) first."
            )

    def scores(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        """Compute the inner products of queries with all rows, or those of ids, without decoding the whole table.

        See `search.search_scores` for the algorithm and its memory.

        Args:
            h: (..., D) floating-point queries.
            ids: (V,) ids of the rows, such as sampled negatives; all rows if None.

        Returns:
            (..., N) or (..., V) in the dtype of `h`; equal to `h @ weight.T` up to rounding. Differentiable.
        """
        observer = self.owner.observer if torch.is_grad_enabled() else None
        if ids is None and observer is None:
            return search_scores(self.spec, self._lookup_tensors(), h)
        if ids is None:
            blocks = [torch.arange(a, b, device=self.device) for a, b in self._row_blocks()]
            ids, rows = torch.cat(blocks), torch.cat([self._lookup_unobserved(block) for block in blocks])
        else:
            rows = self._lookup_unobserved(ids)
        rows = rows.to(h.dtype)
        return h @ rows.T if observer is None else observer.on_matmul(h, ids, rows)

    def topk(self, h: Tensor, k: int) -> TopK:
        """Find the k rows with the largest inner product for each query, in bounded memory.

        Args:
            h: (..., D) floating-point queries.
            k: 1 to N.

        Returns:
            `values` (..., k) in the dtype of `h` and `indices` (..., k) int64, in descending order. Not
            differentiable.
        """
        return search_topk(self.spec, self._lookup_tensors(), h, k)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Look up rows of ids of any shape, and apply padding_idx, max_norm and scale_grad_by_freq.

        Args:
            ids: (...) int32 or int64 in [0, N).

        Returns:
            (..., D) in the layer's dtype.
        """
        flat = ids.reshape(-1)
        rows = self.lookup_rows(flat)
        trains = torch.is_grad_enabled() and rows.requires_grad
        if trains or torch._C._get_tracing_state() is not None:
            if self.padding_idx is not None:
                rows = torch.where((flat == self.padding_idx)[:, None], rows.detach(), rows)
            if trains and not is_tracing() and self._is_half():
                rows.register_hook(_warn_of_half)  # type: ignore[no-untyped-call]
            if self.scale_grad_by_freq:
                counts = torch.zeros(self.num_embeddings, dtype=rows.dtype, device=rows.device)
                counts = counts.index_add(0, flat, torch.ones_like(flat, dtype=rows.dtype))
                constant = rows.detach()
                rows = constant + (rows - constant) / counts[flat][:, None]
        if self.max_norm is not None:
            constant = rows.detach()
            length = constant.norm(self.norm_type, dim=1, keepdim=True)
            short = constant * torch.where(length > self.max_norm, self.max_norm / (length + 1e-7), 1.0)
            rows = short + (rows - constant) if trains else short  # gradients are not scaled
        return rows if ids.ndim == 1 else rows.view(*ids.shape, self.embedding_dim)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the seed of the hash functions with the tensors that were trained with it."""
        marker = state_dict.get(prefix + "weight")
        if marker is not None and marker.numel() == 0:  # of a compressed file
            del state_dict[prefix + "weight"]
        seed = state_dict.get(prefix + _SEED)
        if seed is not None and self.owner is self:
            self.reseed(int(seed))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> TableLayer:
        """Keep values that are computed from a seed exact in other dtypes, and after `to_empty`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _VALUES in self._buffers:
            spec = cast(TrellisSpec, self._spec)
            self._buffers[_VALUES] = seeded_values(spec.window, spec.seed).to(self.device, copy=True)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # before nn.Module registers a Parameter
            self._set_weight(value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Describe the arguments of the dense layer, the method and the layout."""
        tied = "" if self.owner is self else ", tied"
        return f"{super().extra_repr()}, {self.spec.method} {self.spec.layout}{tied}"

    def _is_half(self) -> bool:
        """Return whether parameters have less precision than the rows, so that optimizer steps may underflow."""
        half, parameters = (torch.float16, torch.bfloat16), self.owner.parameters(recurse=False)
        return self.dtype not in half and any(p.dtype in half for p in parameters)

    def _row_blocks(self) -> Iterator[tuple[int, int]]:
        return row_blocks(
            self.num_embeddings,
            self.spec.work_width,
            GPU_BLOCK_BYTES if self.device.type == "cuda" else BLOCK_BYTES,
        )

    def _check_range(self, ids: Tensor) -> None:
        """Refuse ids outside the table.

        Raises:
            RowIndexError: an id outside [0, N); the message has the first one.
            RuntimeError: ids that are not int32 or int64.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"indices have dtype {ids.dtype}: give int32 or int64 ids")
        if is_intercepted():  # values must not be read
            return
        if ids.device.type != "cpu":
            torch._assert_async(((ids >= 0) & (ids < self.num_embeddings)).all())
            return
        bad = (ids < 0) | (ids >= self.num_embeddings)
        if bad.any():
            raise RowIndexError(
                f"id {int(ids[bad][0])} is outside the table of {self.num_embeddings} rows: "
                f"give ids from 0 to {self.num_embeddings - 1}"
            )


def _warn_of_half(gradient: Tensor) -> None:
    warnings.warn(
        "gradients of float16 codebooks: Adam's epsilon underflows in it. Call model.float() before training.",
        CqrCompressWarning,
        stacklevel=2,
    )
