"""Detect whether torch traces, exports or intercepts operations."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_tracing() -> bool:
    """Return whether torch traces a graph, which must not depend on the values of this call."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_exporting() -> bool:
    """Return whether torch.export or torch.onnx.export records a program, which other runtimes have to understand.

    The graph should consist of common operations on operands of one dtype: ONNX promotes no dtypes, and has no
    searchsorted and no embedding_bag except as a loop over the bags. torch.compile is not an export: it has fast
    kernels for these.
    """
    if hasattr(torch.compiler, "is_exporting"):  # since torch 2.7
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_intercepted() -> bool:
    """Return whether operations are intercepted (by a dispatch mode, functorch, or forward-mode autograd)."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )
