"""A tensor subclass for the weight of a compressed layer, which decodes only if an operation needs values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cqr_compress.errors import WeightWriteError
from cqr_compress.nn.bags import reduce_bags

if TYPE_CHECKING:
    from cqr_compress.nn.table_layer import TableLayer


def _getter(name: str) -> Callable[..., Any]:
    """Return the function that __torch_function__ receives when an attribute of a tensor is read."""
    return cast(Callable[..., Any], getattr(Tensor, name).__get__)


def _setter(name: str) -> Callable[..., Any]:
    """Return the function that __torch_function__ receives when an attribute of a tensor is assigned."""
    return cast(Callable[..., Any], getattr(Tensor, name).__set__)


_ABOUT = frozenset(
    {
        *map(_getter, ["shape", "dtype", "ndim", "layout", "itemsize", "is_sparse", "is_quantized"]),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
        *(Tensor.element_size, Tensor.__len__, Tensor.ndimension, Tensor.nelement),
    }
)
"""Functions of a tensor's metadata, which need none of its values."""
_WHERE = frozenset({*map(_getter, ("device", "is_cpu", "is_cuda", "is_meta")), Tensor.get_device})
"""Functions of the device, which is that of the layer: the subclass itself is on the meta device."""
_TRANSPOSES = frozenset({Tensor.t, torch.t, _getter("T"), _getter("mT")})
_TRANSPOSED = frozenset({Tensor.transpose, torch.transpose})
_PRODUCTS = frozenset({Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.mm, Tensor.mm})
_DETACHED = frozenset({Tensor.detach, _getter("data")})


_REQUIRES_GRAD, _IS_LEAF = _getter("requires_grad"), _getter("is_leaf")


_GRAD, _GRAD_FN = _getter("grad"), _getter("grad_fn")


_SET_GRAD, _SET_REQUIRES_GRAD = _setter("grad"), _setter("requires_grad")


_SELECTED = frozenset({Tensor.index_select, torch.index_select})


class TableWeight(torch.Tensor):
    """The (N, D) weight of a compressed layer, or its transpose, as a tensor without values.

    Shape, dtype and device are those of the weight. Lookups of ids and products of queries with the transpose are
    computed by the layer; every other operation decodes the whole table first. In-place operations are refused,
    because the rows are computed from codes.

    Attributes:
        layer: the compressed layer.
        transposed: whether this is the transpose.
        detached: whether it is detached from the autograd graph.
    """

    layer: TableLayer
    transposed: bool
    detached: bool
    _is_param = True  # nn.Module.get_parameter and tie_weights of transformers require a Parameter

    @staticmethod
    def from_layer(layer: TableLayer, transposed: bool = False, detached: bool = False) -> Tensor:
        """Create the weight of a layer; inside a tensor mode that does not support the subclass, decode it."""
        shape = (layer.num_embeddings, layer.embedding_dim)
        value = torch.empty(shape, dtype=layer.dtype, device="meta")
        if type(value) is not Tensor:
            return layer.decode().t() if transposed else layer.decode()
        weight = (value.t() if transposed else value).as_subclass(TableWeight)
        weight.layer, weight.transposed, weight.detached = layer, transposed, detached
        return weight

    def decode(self) -> Tensor:
        """Decode to a plain tensor, with gradients unless detached."""
        if self.detached:
            with torch.no_grad():
                rows = self.layer.decode()
        else:
            rows = self.layer.decode()
        return rows.t() if self.transposed else rows

    def has_row(self, row: int | None) -> bool:
        """Return whether a row index, which may be negative, is in range; True for None."""
        return row is None or -self.layer.num_embeddings <= row < self.layer.num_embeddings

    def lookup(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Look up ids (...) without decoding the table; the padding row receives no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            rows = self.layer.lookup_rows(ids.reshape(-1)).view(*ids.shape, self.layer.embedding_dim)
        if padding_idx is None or not rows.requires_grad:
            return rows
        is_padding = ids == padding_idx % self.layer.num_embeddings
        return torch.where(is_padding[..., None], rows.detach(), rows)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute an operation on the weight."""
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, TableWeight):
            if func in _ABOUT:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _WHERE:
                return func(torch.empty(0, dtype=first.layer.dtype, device=first.layer.device))
            if func in (Tensor.requires_grad_, _SET_REQUIRES_GRAD):
                if first.detached:  # a detached weight is a copy: the table keeps its setting
                    return func(first.decode(), *args[1:], **kwargs)
                for tensor in first.layer.owner.parameters(recurse=False):
                    tensor.requires_grad_(next(iter((*args[1:], *kwargs.values())), True))
                return None if func == _SET_REQUIRES_GRAD else first
            if func == _SET_GRAD and args[1] is None:
                return first.layer.owner.zero_grad()
            if func == _GRAD_FN:  # as of a non-leaf tensor, which nn.Module does not register as a Parameter
                return first.layer
            if func == _REQUIRES_GRAD:
                return not first.detached and any(t.requires_grad for t in first.layer.table_tensors().values())
            if func == _IS_LEAF:
                return False
            if func == _GRAD:
                return None
            if func in _DETACHED:
                return TableWeight.from_layer(first.layer, first.transposed, detached=True)
            if func in _TRANSPOSES or (func in _TRANSPOSED and _swaps_both(args[1:], kwargs)):
                return TableWeight.from_layer(first.layer, not first.transposed, first.detached)
        if _holds_one(kwargs.get("out")) or (_holds_one(first) and _writes(func)):
            raise WeightWriteError(
                f"{func.__name__} would write to the weight of a compressed layer, whose rows are computed "
                "from codes. Call cqr_compress.decompress_(model) first."
            )
        fast = _through_layer(func, args, kwargs)
        if fast is not None:
            return fast
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_decoded(args), **_decoded(kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = "x".join(str(n) for n in self.shape)
        return f"TableWeight({shape}, {self.dtype}, of {self.layer})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.decode().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decode().detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _swaps_both(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dims = {*args, *kwargs.values()}
    return bool(dims) and {d % 2 for d in dims} == {0, 1}


def _writes(func: Callable[..., Any]) -> bool:
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return name in ("__setitem__", "__set__") or in_place


def _holds_one(value: Any) -> bool:
    return isinstance(value, TableWeight) or (isinstance(value, (tuple, list)) and any(map(_holds_one, value)))


def _through_layer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Compute a lookup or a product with all rows with the layer; None for other operations."""
    if func in _PRODUCTS and len(args) == 2 and not kwargs:
        h, weight = args
        if isinstance(weight, TableWeight) and weight.transposed and not isinstance(h, TableWeight) and h.ndim:
            return _scores(weight, h)
    if func is F.linear and len(args) >= 2:
        h, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
        if isinstance(weight, TableWeight) and not weight.transposed and not isinstance(h, TableWeight):
            scores = _scores(weight, h)
            return scores if scores is None or bias is None else scores + bias
    if func is Tensor.__getitem__ and isinstance(args[0], TableWeight) and not args[0].transposed:
        return _rows_at(*args)
    if func in _SELECTED and len(args) == 3 and isinstance(args[0], TableWeight) and not args[0].transposed:
        return args[0].lookup(args[2], None) if args[1] == 0 else None
    if func is F.embedding:
        return _lookup(*args, **kwargs)
    if func is F.embedding_bag:
        return _bags(*args, **kwargs)
    return None


def _rows_at(weight: TableWeight, index: Any) -> Tensor | None:
    """Look up rows by an index, a slice or a tensor of ids, which may be negative; None for other indices."""
    N, device = weight.layer.num_embeddings, weight.device
    if isinstance(index, slice):
        return weight.lookup(torch.arange(N, device=device)[index], None)
    if isinstance(index, int) and not isinstance(index, bool) and -N <= index < N:
        return weight.lookup(torch.tensor(index % N, device=device), None)
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        ids = index.to(device)
        return weight.lookup(torch.where(ids < 0, ids + N, ids), None)
    return None


def _lookup(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Compute F.embedding without decoding the weight, with dense gradients; None if unsupported."""
    if not isinstance(weight, TableWeight) or weight.transposed or max_norm is not None or scale_grad_by_freq:
        return None
    return weight.lookup(input, padding_idx) if weight.has_row(padding_idx) else None


def _bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Compute F.embedding_bag without decoding the weight, with dense gradients; None if unsupported."""
    if not isinstance(weight, TableWeight) or weight.transposed or max_norm is not None or scale_grad_by_freq:
        return None
    if not weight.has_row(padding_idx):
        return None
    padding_idx = None if padding_idx is None else padding_idx % weight.layer.num_embeddings

    def lookup(ids: Tensor) -> Tensor:
        return weight.lookup(ids, padding_idx)

    return reduce_bags(lookup, input, offsets, mode, per_sample_weights, include_last_offset, padding_idx)


def _scores(weight: TableWeight, h: Tensor) -> Tensor | None:
    """Compute products with the codebooks if no gradient is required; training decodes the table once instead.

    An observer of the layer receives the products in training, too.
    """
    layer = weight.layer
    trains = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    seen = trains and layer.owner.observer is not None and not weight.detached
    if (trains and not seen) or h.dtype != layer.dtype or torch.is_autocast_enabled(h.device.type):
        return None
    return layer.scores(h)


def _decoded(value: Any) -> Any:
    if isinstance(value, TableWeight):
        return value.decode()
    if isinstance(value, (tuple, list)):
        return type(value)(_decoded(v) for v in value)
    if isinstance(value, dict):
        return {k: _decoded(v) for k, v in value.items()}
    return cast(Any, value)
