"""Evidence about a tensor from the other tensors of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cqr_compress.checkpoint.base import TensorEntry

_RUNNING = re.compile(r"cluster_(?:size|usage)|(?:^|_)ema(?:_|$)|embed_(?:avg|sum)")


@dataclass(frozen=True)
class Neighbours:
    """The tensors of a checkpoint by module and by size.

    Attributes:
        modules: tensors by the path of the module that holds them, "" for the model itself.
        widths: input sizes of layers, each with the shapes of the weights that have it.
        averages: names of running averages, by the module that holds them and their rows.
        has_kernels: whether layers have a `kernel`, as in Flax and Keras, and none has a `weight`.
    """

    modules: Mapping[str, Sequence[TensorEntry]]
    widths: Mapping[int, Collection[tuple[int, ...]]]
    averages: Mapping[tuple[str, int], Sequence[str]]
    has_kernels: bool = False

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> Neighbours:
        """Index the tensors of a checkpoint."""
        modules: dict[str, list[TensorEntry]] = {}
        widths: dict[int, set[tuple[int, ...]]] = {}
        averages: dict[tuple[str, int], list[str]] = {}
        attributes = set[str]()
        for entry in entries:
            path, _, attribute = entry.name.rpartition(".")
            attributes.add(attribute)
            modules.setdefault(path, []).append(entry)
            # positions and masks, (1, N) or integers, say nothing about layers
            if len(entry.shape) >= 2 and entry.shape[0] > 1 and entry.dtype.is_floating_point:
                for size in entry.shape[1:]:
                    widths.setdefault(size, set()).add(entry.shape)
            if entry.shape and _RUNNING.search(attribute):
                averages.setdefault((path, entry.shape[0]), []).append(entry.name)
        return cls(modules, widths, averages, "kernel" in attributes and "weight" not in attributes)

    def in_same_layer(self, entry: TensorEntry) -> str | None:
        """Name a bias, or another tensor with one entry for each row, of the layer whose weight is `entry`.

        An embedding layer holds nothing but its weight. A linear layer has a bias, and a layer for
        quantization-aware training has a copy of its weight in integers.
        """
        path, _, attribute = entry.name.rpartition(".")
        if attribute != "weight":
            return None
        bias = f"{path}.bias" if path else "bias"
        others = [other for other in self.modules[path] if other.name != entry.name]
        for other in others:
            if other.name == bias or (path and other.shape[:1] == entry.shape[:1]):
                return other.name
        return None

    def running_average(self, entry: TensorEntry) -> str | None:
        """Name a running average over the rows of `entry`, which makes it a codebook that is read as a whole.

        It is in the same module, as in SoundStream's quantizer, or in the module above (VQ-VAE with averages).
        """
        path = entry.name.rpartition(".")[0]
        for place in (path, path.rpartition(".")[0]):
            for name in self.averages.get((place, entry.shape[0]), ())[:2]:
                if name != entry.name:
                    return name
        return None

    def is_width(self, entry: TensorEntry) -> bool:
        """Whether a layer of another shape takes vectors of as many values as `entry` has rows.

        The rows of a projection are the inputs of the next layer. Rows of a lookup table are chosen by ids, and no
        layer has as many inputs, but by coincidence.
        """
        return any(shape != entry.shape for shape in self.widths.get(entry.shape[0], ()))
