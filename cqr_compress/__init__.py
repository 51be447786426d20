"""Make trained models small by compressing their embedding tables.

import cqr_compress as cqr
cqr.convert("ckpt.pt", "small.safetensors", cqr.Request(ratio=16))
model.load_state_dict(cqr.load_dense("small.safetensors"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cqr_compress.conversion import convert as convert
    from cqr_compress.dense import export as export
    from cqr_compress.dense import load_dense as load_dense
    from cqr_compress.errors import CqrCompressError as CqrCompressError
    from cqr_compress.inspection import inspect_file as inspect_file
    from cqr_compress.request import Request as Request
    from cqr_compress.table import CompressedTable as CompressedTable

_PUBLIC = {
    "CompressedTable": "table",
    "CqrCompressError": "errors",
    "Request": "request",
    "convert": "conversion",
    "export": "dense",
    "inspect_file": "inspection",
    "load_dense": "dense",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing the package is quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
