"""The compressed table: a spec and its tensors, decoded by the codebook formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.errors import FormatError, ShapeError
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.decode import decode, gather_rows
from cqr_compress.table.spec import AnySpec


@dataclass(frozen=True)
class CompressedTable:
    """A table of N rows of D dimensions, stored as codes and codebooks (or row-wise integers).

    Attributes:
        spec: spec of the table.
        tensors: tensors by short name (`codes`, `codebooks`, ...), with the shapes of `spec.tensor_shapes()`.
    """

    spec: AnySpec
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, expected in self.spec.tensor_shapes().items():
            found = self.tensors.get(name)
            if found is None:
                raise FormatError(f"the table has no tensor {name!r} of shape {expected.shape}")
            if tuple(found.shape) != expected.shape or found.dtype != expected.dtype:
                raise FormatError(
                    f"tensor {name!r} is {tuple(found.shape)} {found.dtype}, "
                    f"but the spec requires {expected.shape} {expected.dtype}"
                )

    @property
    def exact_ids(self) -> Tensor:
        """Ids of the rows stored verbatim, ascending; in `kept_ids` those of all-zero rows follow them."""
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return self.tensors.get("kept_ids", none)[: self.spec.num_kept_rows]

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Decode rows start..stop in blocks, on the device of the tensors; the whole table by default."""
        stop = self.spec.num_embeddings if stop is None else stop
        device = next(iter(self.tensors.values())).device
        out = torch.empty(stop - start, self.spec.embedding_dim, dtype=self.spec.torch_dtype, device=device)
        for a, b in row_blocks(stop - start, self.spec.work_width):
            out[a:b] = self.lookup(torch.arange(start + a, start + b, device=device))
        return out

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows of `ids`, computed in float32 and in one block.

        Args:
            ids: (B,) integers in [0, N), on the device of the tensors.

        Returns:
            (B, D) in the source's dtype.

        Raises:
            ShapeError: an id outside [0, N).
        """
        N = self.spec.num_embeddings
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= N):
            raise ShapeError(f"ids from {int(ids.min())} to {int(ids.max())} are outside a table of {N} rows")
        return decode(self.spec, gather_rows(self.spec, self.tensors, ids), ids)
