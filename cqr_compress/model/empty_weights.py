"""Building a model without allocating its parameters."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.normal_, Tensor.uniform_)


@contextlib.contextmanager
def init_empty_weights() -> Iterator[None]:
    """Context manager that creates parameters on the meta device, to be loaded by `load_compressed`.

        with cqr.init_empty_weights():
            model = MyModel()
        cqr.load_compressed(model, "small.safetensors")

    Buffers are created as usual, because non-persistent ones are not in a file. The context affects nn.Module in
    all threads.
    """
    register = nn.Module.register_parameter
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}  # shared parameters stay shared

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta:
            known = moved.get(id(param))
            if known is None or known[0]() is not param:
                on_meta = nn.Parameter(param.detach().to("meta"), param.requires_grad)
                known = moved[id(param)] = weakref.ref(param), on_meta
            param = known[1]
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore
    try:
        with _WithoutDraws():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _WithoutDraws(TorchFunctionMode):
    """Skips initial values of tensors on the meta device, for which torch imports its compiler: three seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if type(tensor) is nn.Parameter and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
