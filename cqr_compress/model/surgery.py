"""Change the class of a live module, so that it computes tensors instead of holding them, and change it back.

The object is preserved: `module.__class__` is set to a subclass of the module's own class.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

from torch import Tensor, nn

from cqr_compress.errors import CqrCompressWarning
from cqr_compress.nn.embedding import CompressedEmbedding, CompressedEmbeddingBag
from cqr_compress.nn.table_layer import TableLayer

DENSE_LAYERS: tuple[tuple[type[nn.Module], type[TableLayer]], ...] = (
    (nn.Embedding, CompressedEmbedding),
    (nn.EmbeddingBag, CompressedEmbeddingBag),
)


def to_compressed_class(module: nn.Module) -> TableLayer:
    """Set the class of a dense embedding layer to the compressed class, and remove its weight."""
    cls: Any = type(module)
    dense, compressed = next(pair for pair in DENSE_LAYERS if isinstance(module, pair[0]))
    if getattr(module, "sparse", False):
        message = f"{cls.__name__}: sparse=True has no effect, gradients are dense"
        warnings.warn(message, CqrCompressWarning, stacklevel=5)
    drop_tensor(module, "weight")
    module.__class__ = compressed if cls is dense else _extended(cls, cast(Any, compressed))
    return cast(TableLayer, module)


def to_dense_class(layer: TableLayer) -> None:
    """Restore the dense class of a compressed layer, without a weight."""
    for short in (*layer.__dict__.get("_names", ()), "_like", "_values"):
        drop_tensor(layer, short)
    layer._non_persistent_buffers_set -= {"_like", "_values"}
    for attribute in ("_spec", "_owner", "_names"):
        layer.__dict__.pop(attribute, None)
    cls: Any = type(layer)
    dense: Any = getattr(cls, "_dense_class", None) or next(d for d, c in DENSE_LAYERS if cls is c)
    layer.__class__ = dense


def attach_table(module: nn.Module, attribute: str, owner: TableLayer) -> None:
    """Replace a tensor of a module by a property that decodes a compressed layer."""
    drop_tensor(module, attribute)
    sources = {**module.__dict__.get("_cqr_sources", {}), attribute: owner}
    module.__dict__["_cqr_sources"] = sources
    module.__class__ = _computing(cast(Any, _plain_class(type(module))), tuple(sorted(sources)))


def detach_table(module: nn.Module, attribute: str) -> None:
    """Undo `attach_table`, without restoring the tensor."""
    sources = {name: layer for name, layer in module.__dict__["_cqr_sources"].items() if name != attribute}
    module._modules.pop(hidden_name(attribute), None)
    plain: Any = _plain_class(type(module))
    if sources:
        module.__dict__["_cqr_sources"] = sources
        module.__class__ = _computing(plain, tuple(sorted(sources)))
    else:
        del module.__dict__["_cqr_sources"]
        module.__class__ = plain


def table_attributes(module: nn.Module) -> dict[str, TableLayer]:
    """Return the attributes that a module computes, with the layers that they are decoded from."""
    sources = cast("dict[str, TableLayer]", module.__dict__.get("_cqr_sources", {}))
    return {"weight": module, **sources} if isinstance(module, TableLayer) else sources


def hidden_name(attribute: str) -> str:
    """Return the name of the submodule from which a computed attribute is decoded."""
    return f"{attribute}_compressed"


def drop_tensor(module: nn.Module, attribute: str) -> None:
    """Remove a parameter or buffer, if it exists."""
    module._parameters.pop(attribute, None)
    module._buffers.pop(attribute, None)


def _plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", vars(cls).get("_computed_from", cls))


@functools.cache
def _extended(cls: Any, compressed: Any) -> type[TableLayer]:
    """Create a subclass of the user's layer class, whose `super()` calls resolve to the compressed layer."""
    body = {"_dense_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce}
    made = type(f"Compressed{cls.__name__}", (cls, compressed), body)
    made._made_by = (_extended, (cls, compressed))  # type: ignore[attr-defined]
    return made


@functools.cache
def _computing(cls: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    """Create a subclass of a module's class in which some tensors are decoded from compressed layers."""

    def reader(attribute: str) -> property:  # not a functools.partial, which torch 2.6 cannot compile
        return property(lambda module: cast(Tensor, table_attributes(module)[attribute].weight))

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if name in attributes:
            table_attributes(module)[name].weight = value  # raises unless it is that layer's weight
        else:
            cls.__setattr__(module, name, value)

    body: dict[str, Any] = {name: reader(name) for name in attributes}
    body |= {"_computed_from": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    body |= {"__reduce_ex__": _reduce, "__setattr__": assign}
    made = type(f"Compressed{cls.__name__}", (cls,), body)
    made._made_by = (_computing, (cls, attributes))  # type: ignore[attr-defined]
    return made


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Pickle a layer whose class was created at run time."""
    state = getattr(module, "__getstate__", lambda: module.__dict__)()
    return _remake, type(module)._made_by, state  # type: ignore[attr-defined]


def _remake(make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    cls = make(*arguments)
    return cast(nn.Module, cls.__new__(cls))
