"""Detect whether torch traces or intercepts operations."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_tracing() -> bool:
    """Return whether torch traces a graph, which must not depend on the values of this call."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_intercepted() -> bool:
    """Return whether operations are intercepted (by a dispatch mode, functorch, or forward-mode autograd)."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )
