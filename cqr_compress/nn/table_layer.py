"""What every layer over a compressed table has: its tensors, their decoded rows, and `weight`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cqr_compress.errors import RowIndexError, ShapeError, WeightWriteError
from cqr_compress.nn.autograd import lookup_cpu
from cqr_compress.nn.search import TopK, search_scores, search_topk
from cqr_compress.nn.table_weight import TableWeight
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.decode import PER_ROW, decode, decode_rows, rotated, with_exact_rows
from cqr_compress.table.spec import HASHED, AnySpec, CodebookSpec, dtype_name
from cqr_compress.table.table import CompressedTable
from cqr_compress.table.tracing import is_intercepted, is_tracing

_LIKE = "_like"
_SEED = "hash_seed"
"""Buffer of a layer whose hashes were drawn anew since its table was made."""


class Observer(Protocol):
    """Sees each use of a layer's rows, and gives the model what it goes on with."""

    def on_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        """The rows (B, D) that are used for ids (B,), of what was looked up."""

    def on_matmul(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """The products (..., V) of queries (..., D) with rows (V, D) of ids (V,)."""


class TableLayer(nn.Module):
    """A layer whose rows come from a compressed table; the base of the drop-in layers.

    Floating-point tensors of the table are Parameters, integers are buffers, under the names of
    `spec.tensor_shapes()`: the layer's state_dict is the table as it stands in the file. Rows are computed in
    float32 (float64 where the codebooks are) and returned in the layer's dtype, which `.half()`, `.bfloat16()`
    and `.to()` change as they change that of a weight.

    A layer that is tied to another one holds no tensors and reads those of its `owner`.

    Attributes:
        num_embeddings: N, the rows.
        embedding_dim: D, the columns.
        padding_idx: row that receives no gradient, or None.
        max_norm: rows longer than this are returned with this length, or None.
        norm_type: p of that length.
        scale_grad_by_freq: whether gradients are divided by how often an id is in the batch.
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
    _names: tuple[str, ...]  # of the table's tensors, so that a lookup need not ask the spec

    def hold_table(
        self,
        table: CompressedTable,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> None:
        """Register a table's tensors with the layer, without copying those that are on `device` already.

        Args:
            table: the compressed table.
            device: where to put it; where it is, if None.
            dtype: of the rows; the source's if None.
            requires_grad: whether codebooks and other floating-point tensors are trained.
        """
        self._spec, self._owner, self._names = table.spec, None, tuple(table.spec.tensor_shapes())
        self._buffers.pop(_SEED, None)  # of a table that this one replaces
        for short, tensor in table.tensors.items():
            moved = tensor.to(device)
            if moved.is_floating_point() and moved.numel():
                self.register_parameter(short, nn.Parameter(moved, requires_grad))
            else:
                self.register_buffer(short, moved)
        like = torch.empty(0, dtype=dtype or table.spec.torch_dtype, device=device)
        self.register_buffer(_LIKE, like, persistent=False)

    def tie_to(self, owner: TableLayer) -> None:
        """Read the tensors of `owner`, which is not registered as a submodule, from here on."""
        object.__setattr__(self, "_owner", owner)

    @property
    def owner(self) -> TableLayer:
        """The layer that holds the tensors: this one, or the one it is tied to."""
        return self._owner or self

    @property
    def spec(self) -> AnySpec:
        """What the table's tensors mean."""
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
        """The table's tensors by short name, as they are in memory."""
        parameters, buffers = self.owner._parameters, self.owner._buffers
        return {n: cast(Tensor, parameters[n] if n in parameters else buffers[n]) for n in self.owner._names}

    def table(self) -> CompressedTable:
        """The table as it is in memory; its tensors are shared, not copied."""
        tensors = {short: tensor.detach() for short, tensor in self.table_tensors().items()}
        if isinstance(self.spec, CodebookSpec):
            dtypes = {"codebook_dtype": dtype_name(tensors["codebooks"].dtype)}
        else:
            dtypes = {"scale_dtype": dtype_name(tensors["row_scale"].dtype)}
        if "kept_rows" in tensors:
            tensors["kept_rows"] = tensors["kept_rows"].to(self.dtype)
        spec = replace(self.spec, dtype=dtype_name(self.dtype), **dtypes)  # type: ignore[arg-type]
        return CompressedTable(spec, tensors)

    def lookup(self, ids: Tensor) -> Tensor:
        """Compute the rows of some ids; differentiable.

        Args:
            ids: (B,) int32 or int64 in [0, N).

        Returns:
            (B, D) in the layer's dtype.

        Raises:
            RowIndexError: an id outside [0, N) (an IndexError); on CUDA the device asserts, as for nn.Embedding.
        """
        rows = self._lookup_unobserved(ids)
        observer = self.owner.observer
        return rows if observer is None else observer.on_lookup(ids, rows)

    def _lookup_unobserved(self, ids: Tensor) -> Tensor:
        tensors = self.table_tensors()
        rows = lookup_cpu(self.spec, tensors, ids)
        if rows is not None:
            rows = rotated(tensors, rows).to(self.dtype)
            return with_exact_rows(self.spec, tensors, ids, rows) if "kept_ids" in tensors else rows
        if "codes" not in tensors and not is_tracing():
            self._check_range(ids)
        if "codes" in tensors and tensors["codes"].dtype != torch.uint8:
            raise ShapeError(
                f"codes of {tensors['codes'].dtype} do not make a table: they are packed in torch.uint8"
            )
        here = {
            short: _gather(self, tensor, ids) if short in PER_ROW else tensor for short, tensor in tensors.items()
        }
        return decode(self.spec, here, ids, self.dtype)

    @torch.no_grad()
    def lookup_unrotated(self, ids: Tensor) -> Tensor:
        """Evaluate the codebook formula alone, before rotation and without rows that are kept apart.

        Args:
            ids: (B,) int64 in [0, N).

        Returns:
            (B, width) float32.
        """
        tensors = {short: t for short, t in self.table_tensors().items() if short in ("codes", "codebooks")}
        rows = lookup_cpu(self.spec, tensors, ids)
        if rows is None:
            here = {short: t[ids] if short in PER_ROW else t for short, t in tensors.items()}
            rows = decode_rows(self.spec, here, ids)
        return rows.float()

    def reseed(self, seed: int) -> None:
        """Draw the hashes of the table anew; where it has hashed codes, its state_dict then holds the seed.

        Args:
            seed: at least 0; it replaces that of the spec.
        """
        owner = self.owner
        spec = owner._spec = replace(cast(CodebookSpec, owner._spec), seed=seed)
        if HASHED in spec.code_sources:
            held = torch.tensor(seed, dtype=torch.int64, device=self.device)
            owner.register_buffer(_SEED, held)

    def decode(self) -> Tensor:
        """Compute all rows, (N, D) in the layer's dtype; differentiable.

        Without gradients the work is done in row blocks: memory beside the result is bounded.
        """
        if is_tracing():
            return self.lookup(torch.arange(self.num_embeddings, device=self.device))
        blocks = (self.lookup(torch.arange(a, b, device=self.device)) for a, b in self._row_blocks())
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.table_tensors().values()):
            return torch.cat(list(blocks))
        out = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.device)
        for (a, b), block in zip(self._row_blocks(), blocks, strict=True):
            out[a:b] = block
        return out

    @property
    def weight(self) -> Any:
        """The rows as a tensor (N, D), decoded when an operation needs their values; differentiable.

        Without gradients `h @ layer.weight.T` and `F.linear(h, layer.weight)`, and always `layer.weight[ids]` and
        `F.embedding(ids, layer.weight)`, work without decoding the whole table; anything else decodes it.
        Writing to it is refused.
        """
        return self.decode() if is_tracing() else TableWeight.from_layer(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._set_weight(value)

    def _set_weight(self, value: Any) -> None:
        """Accept the layer's own weight, which code that ties weights assigns again, and nothing else."""
        if not (isinstance(value, TableWeight) and value.layer.owner is self.owner):
            raise WeightWriteError(
                f"cannot set the weight of {type(self).__name__}: its rows are compressed. "
                "Call cqr_compress.decompress_(model) first."
            )

    def scores(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        """Compute the inner products of queries with some rows, or all, without decoding the table as a whole.

        See `search.search_scores` for how, and for what memory it takes.

        Args:
            h: (..., D) floating-point queries.
            ids: (V,) rows to multiply with, such as drawn negatives; all if None.

        Returns:
            (..., N) or (..., V) in the dtype of `h`; equal to `h @ weight.T` to rounding. Differentiable.
        """
        observer = self.owner.observer if torch.is_grad_enabled() else None
        if ids is None and observer is None:
            return search_scores(self.spec, self.table_tensors(), h)
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
            `values` (..., k) in the dtype of `h` and `indices` (..., k) int64, largest first. Not differentiable.
        """
        return search_topk(self.spec, self.table_tensors(), h, k)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of ids of any shape, with what the arguments of nn.Embedding ask of them.

        Args:
            ids: (...) int32 or int64 in [0, N).

        Returns:
            (..., D) in the layer's dtype.
        """
        flat = ids.reshape(-1)
        rows = self.lookup(flat)
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
            rows = short + (rows - constant) if trains else short  # gradients are not shortened
        return rows if ids.ndim == 1 else rows.view(*ids.shape, self.embedding_dim)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the seed of the hashes with the tensors that were trained under it."""
        seed = state_dict.get(prefix + _SEED)
        if seed is not None and self.owner is self:
            self.reseed(int(seed))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # before nn.Module registers a Parameter
            self._set_weight(value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The arguments of the dense layer, the method and the layout."""
        tied = "" if self.owner is self else ", tied"
        return f"{super().extra_repr()}, {self.spec.method} {self.spec.layout}{tied}"

    def _is_half(self) -> bool:
        """Whether parameters have less precision than the rows, so that an optimizer would lose its steps."""
        half, parameters = (torch.float16, torch.bfloat16), self.owner.parameters(recurse=False)
        return self.dtype not in half and any(p.dtype in half for p in parameters)

    def _row_blocks(self) -> Iterator[tuple[int, int]]:
        return row_blocks(self.num_embeddings, self.spec.work_width)

    def _check_range(self, ids: Tensor) -> None:
        """Refuse ids outside the table.

        Raises:
            RowIndexError: names the first such id.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"indices have dtype {ids.dtype}: ids are int32 or int64")
        if is_intercepted():  # values may not be looked at
            return
        if ids.device.type != "cpu":
            torch._assert_async(((ids >= 0) & (ids < self.num_embeddings)).all())
            return
        bad = (ids < 0) | (ids >= self.num_embeddings)
        if bad.any():
            raise RowIndexError(
                f"id {int(ids[bad][0])} is outside the table of {self.num_embeddings} rows: "
                f"ids go from 0 to {self.num_embeddings - 1}"
            )


def _warn_of_half(gradient: Tensor) -> None:
    warnings.warn(
        "gradients of float16 codebooks: Adam's epsilon vanishes in float16. Call model.float() before training.",
        stacklevel=2,
    )


def _gather(layer: TableLayer, tensor: Tensor, ids: Tensor) -> Tensor:
    """Take the entries of `ids`; the bounds are checked by the gather itself."""
    if is_tracing():
        return _take(tensor, ids)
    try:
        return _take(tensor, ids)
    except IndexError:
        layer._check_range(ids)
        raise


def _take(tensor: Tensor, ids: Tensor) -> Tensor:
    return torch.embedding(tensor, ids) if tensor.ndim == 2 else tensor.index_select(0, ids)
