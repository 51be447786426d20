"""The record of tensors outside the compressed tables that a file stores in a narrower dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cqr_compress.checkpoint.base import DTYPES
from cqr_compress.errors import brief

FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in DTYPES.values()
    if dtype.is_floating_point and dtype.itemsize > 1
}
"""Floating-point dtypes of files by their names in torch, without those of 8 bits."""


@dataclass(frozen=True, kw_only=True)
class RestRecord:
    """Tensors that are stored in a narrower dtype, and those that keep theirs.

    Attributes:
        dtype: dtype that was asked for, such as "float16".
        narrowed: names of the tensors stored in it, by their dtypes in the source.
        kept: names of the tensors that keep their dtype, each with the reason.
        bytes_before: bytes in the source of all tensors outside the compressed tables.
        bytes_after: bytes of these tensors in the file.
    """

    dtype: str
    narrowed: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def source_dtypes(self) -> dict[str, torch.dtype]:
        """Return the source's dtype of each tensor that is stored in a narrower one."""
        return {name: FLOATS[dtype] for dtype, names in self.narrowed.items() for name in names}

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype in the file of each of these tensors."""
        return dict.fromkeys(self.source_dtypes(), FLOATS[self.dtype])

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RestRecord:
        """Restore a record from its JSON object.

        Raises:
            TypeError: a field of the wrong type.
            KeyError: a missing field.
        """
        narrowed, kept, sizes = values["narrowed"], values["kept"], (values["bytes_before"], values["bytes_after"])
        for dtype in (values["dtype"], *narrowed.keys()):
            if dtype not in FLOATS:
                raise TypeError(f"{brief(dtype)} is no floating-point dtype of 16 bits or more")
        for names in narrowed.values():
            if not isinstance(names, (list, tuple)):
                raise TypeError(f"it has {brief(names)} in place of names")
        for text in (*(name for names in narrowed.values() for name in names), *kept.keys(), *kept.values()):
            if not isinstance(text, str):
                raise TypeError(f"it has {brief(text)} in place of a name")
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
                raise TypeError(f"it has {brief(size)} in place of a number of bytes")
        return cls(
            dtype=values["dtype"],
            narrowed={dtype: tuple(names) for dtype, names in narrowed.items()},
            kept=dict(kept),
            bytes_before=sizes[0],
            bytes_after=sizes[1],
        )
