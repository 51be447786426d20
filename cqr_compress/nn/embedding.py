"""Drop-in replacements of nn.Embedding and nn.EmbeddingBag over a compressed table."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from cqr_compress.errors import SpecError
from cqr_compress.nn.bags import reduce_bags
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.table import CompressedTable


class CompressedEmbedding(TableLayer, nn.Embedding):
    """Look up rows of a compressed table, as nn.Embedding looks up rows of its weight.

    Unlike in nn.Embedding, `max_norm` renormalizes the returned rows and does not modify the table, and
    `sparse=True` is refused, because a lookup uses a large part of the small codebooks. torch.compile
    is supported, torch.jit.script is not. From torch 2.7 on, torch exports a model to ONNX with its codes:

        any_size = torch.export.Dim.DYNAMIC
        torch.onnx.export(model.eval(), (ids,), "model.onnx", dynamo=True, dynamic_shapes=({0: any_size},))

    In an exported program `weight` decodes the whole table, `scores` and `topk` do not, and ids are not checked.

    Shapes: N rows, D dimensions; ids (...) of any shape, rows (..., D).
    """

    sparse = False

    def __init__(
        self,
        table: CompressedTable,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create a layer over a table.

        Args:
            table: the compressed table; its tensors are not copied if they are already on `device`.
            padding_idx: row that receives no gradient; negative indices count from the end.
            max_norm: rows with a larger norm are renormalized to this norm.
            norm_type: p of the p-norm for max_norm.
            scale_grad_by_freq: scale gradients by the inverse frequency of the ids in the batch.
            sparse: has to be False.
            device: device of the tensors; unchanged if None.
            dtype: dtype of the rows; that of the source if None.

        Raises:
            SpecError: `sparse=True`, or a padding_idx outside the table.
        """
        nn.Module.__init__(self)
        _set_arguments(self, table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        self.hold_table(table, device, dtype)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: a compressed layer is created from a compressed table.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            f"{cls.__name__} cannot be created from dense rows. Create the dense layer with from_pretrained and "
            "call cqr_compress.compress_ on the model that contains it."
        )

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows (..., D) of `input`, ids (...) int32 or int64 in [0, N).

        Raises:
            RowIndexError: an id outside the table (an IndexError).
        """
        return self.embed_ids(input)


class CompressedEmbeddingBag(TableLayer, nn.EmbeddingBag):
    """Reduce bags of rows of a compressed table, as nn.EmbeddingBag does with rows of its weight.

    Unlike in nn.EmbeddingBag, `max_norm` does not modify the table, and `sparse=True` is refused.
    """

    sparse = False

    def __init__(
        self,
        table: CompressedTable,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create a layer over a table; the arguments are those of `CompressedEmbedding` and nn.EmbeddingBag.

        Raises:
            SpecError: `sparse=True`, an unknown mode, or a padding_idx outside the table.
        """
        nn.Module.__init__(self)
        if mode not in ("sum", "mean", "max"):
            raise SpecError(f"mode {mode!r} is not one of sum, mean, max")
        _set_arguments(self, table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        self.mode, self.include_last_offset = mode, include_last_offset
        self.hold_table(table, device, dtype)

    from_pretrained = CompressedEmbedding.from_pretrained

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Reduce each bag to one row.

        Args:
            input: (B, n) ids, B bags of n; or (T,) ids of all bags, split at `offsets`.
            offsets: (B,) first position of each bag; (B + 1,) with `include_last_offset`.
            per_sample_weights: weights of the rows, with the shape of `input`, in the layer's dtype; only for mode
                sum.

        Returns:
            (B, D); zeros for an empty bag.

        Raises:
            RowIndexError: an id outside the table (an IndexError).
            ValueError: mode max with `scale_grad_by_freq`.
        """
        if self.scale_grad_by_freq and self.mode == "max":
            raise ValueError("max mode does not support scaling the gradient by the frequency")
        return reduce_bags(
            self.embed_ids,
            input,
            offsets,
            self.mode,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


def _set_arguments(
    layer: CompressedEmbedding | CompressedEmbeddingBag,
    table: CompressedTable,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> None:
    N = table.spec.num_embeddings
    if sparse:
        raise SpecError(
            f"{type(layer).__name__} does not support sparse gradients: its codebooks are small. Omit sparse=True."
        )
    if padding_idx is not None and not -N <= padding_idx < N:
        raise SpecError(f"padding_idx {padding_idx} is outside the table of {N} rows")
    layer.num_embeddings, layer.embedding_dim = N, table.spec.embedding_dim
    layer.padding_idx = cast(int, None if padding_idx is None else padding_idx % N)
    layer.max_norm = cast(float, None if max_norm is None else float(max_norm))
    layer.norm_type, layer.scale_grad_by_freq = float(norm_type), scale_grad_by_freq
