"""Tensors of a file that a model does not load because it computes or ignores them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from torch import nn

from cqr_compress.model.swap import find_slot

_log = logging.getLogger(__name__)


def names_to_skip(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Select the tensors of a file that the model computes itself or ignores.

    These are the model's non-persistent buffers, and names that match the patterns by which models of transformers
    ignore tensors of older files. A buffer of another shape is not skipped: the file belongs to another model.

    Args:
        model: the model.
        shapes: tensors of the file that are not in the model's state_dict, by name, with their shapes.
    """
    ignored = [
        (f"{path}." if path else "", re.compile(pattern))
        for path, module in model.named_modules()
        for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]

    def is_computed(name: str) -> bool:
        slot = find_slot(model, name)
        return slot is not None and tuple(slot.tensor.shape) == shapes[name]

    def is_ignored(name: str) -> bool:
        return any(name.startswith(path) and pattern.search(name[len(path) :]) for path, pattern in ignored)

    return [name for name in shapes if is_computed(name) or is_ignored(name)]


def log_skipped(names: Iterable[str]) -> None:
    """Log the names, one line each."""
    for name in names:
        _log.info("skipped %r of the file, which the model computes itself or ignores", name)
