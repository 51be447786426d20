"""Read the structure of a torch pickle without executing code that the file refers to.

A pickle is a program that can call any function by name. Here every name is resolved either to one of a few
rebuild functions of this module, which only describe tensors, or to an inert placeholder class, which has no
effect when it is called, subclassed, given state or filled. A file cannot cause the import of a module.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import torch

from cqr_compress.checkpoint.formats.mapped_storage import LazyStorage, StridedTensor
from cqr_compress.errors import CheckpointError

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class Placeholder:
    """Inert substitute of an object of any other class, which keeps the content that the file gives it."""

    class_name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        self = super().__new__(cls)
        self.__dict__["_items"] = []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_args"] = args

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return placeholder_class(f"{self.class_name}()")(*args)

    def __setstate__(self, state: Any) -> None:
        self.__dict__["_state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["_items"].append((key, value))

    def append(self, item: Any) -> None:
        """Add an element of a list subclass."""
        self.__dict__["_items"].append((len(self.__dict__["_items"]), item))

    def extend(self, items: Any) -> None:
        """Add elements of a list subclass."""
        for item in items:
            self.append(item)

    def add(self, item: Any) -> None:
        """Add an element of a set subclass."""
        self.append(item)

    @property
    def contents(self) -> dict[Any, Any]:
        """Content of the object in the file: its state if that is a dict, and its items; else its arguments."""
        values = self.__dict__
        state = values.get("_state")
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, __slots__)
            state = (
                {**(state[0] or {}), **(state[1] or {})}
                if all(part is None or isinstance(part, dict) for part in state)
                else None
            )
        found: dict[Any, Any] = {}
        for key, value in [*(dict.items(state) if isinstance(state, dict) else ()), *values["_items"]]:
            try:
                found[key] = value
            except TypeError:  # an unhashable key
                found[str(type(key).__name__)] = value
        if not found:
            found.update(enumerate(values.get("_args", ())))
        return found


def placeholder_class(class_name: str) -> type[Placeholder]:
    """Create the inert substitute of the class `class_name` (module and qualified name)."""
    return type("Placeholder", (Placeholder,), {"class_name": class_name})


class StructureUnpickler(pickle.Unpickler):
    """Unpickler of containers, plain values and descriptions of tensors; other objects become placeholders.

    Args:
        file: the pickle.
        load_storage: maps a persistent id (a tuple) to its LazyStorage.
    """

    def __init__(self, file: IO[bytes], load_storage: Callable[[tuple[Any, ...]], LazyStorage]) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._load_storage = load_storage
        self._dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name from tables only, without imports."""
        if known := _KNOWN.get((module, name)):
            return known
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return StorageType(_STORAGE_DTYPES[name])
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return placeholder_class(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Convert torch's ('storage', type, key, location, num_elements, ...) to a lazy storage."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise CheckpointError(f"the pickle refers to {str(pid)[:80]!r}, which is not a torch storage")
        if not isinstance(pid[1], StorageType):
            return placeholder_class(describe(pid[1]))()
        return TypedStorage(pid[1].dtype, self._load_storage(pid))


class Sealed:
    """Base class of objects that a pickle can use, but not modify: the BUILD opcode is refused."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle attempts to modify an object of the reader")


class KnownFunction(Sealed):
    """A function that a pickle can call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class StorageType(Sealed):
    """A storage class such as torch.FloatStorage, represented by its dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class TypedStorage(Sealed):
    """A lazy storage with the dtype of its class."""

    def __init__(self, dtype: torch.dtype, storage: LazyStorage) -> None:
        self.dtype = dtype
        self.storage = storage


def describe(value: Any) -> str:
    """Return the class name of a value; for a placeholder, the name in the file."""
    if isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder)):
        return value.class_name
    return type(value).__name__


def load_structure(file: IO[bytes], load_storage: Callable[[tuple[Any, ...]], LazyStorage], where: str) -> Any:
    """Unpickle the next object of `file` safely.

    Raises:
        CheckpointError: the bytes are not a pickle, or the pickle describes invalid objects.
    """
    try:
        return StructureUnpickler(file, load_storage).load()
    except CheckpointError:
        raise
    except RecursionError as e:
        raise CheckpointError(f"the pickle in {where!r} is nested too deeply to be a checkpoint") from e
    except MemoryError as e:
        raise CheckpointError(f"the pickle in {where!r} requires more memory than available") from e
    except Exception as e:  # a malicious or damaged pickle can raise any exception
        raise CheckpointError(f"the pickle in {where!r} cannot be read: {type(e).__name__}: {e}") from e


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    if len(rest) > 2 and isinstance(rest[2], dict) and rest[2]:
        raise CheckpointError(
            f"a tensor of shape {tuple(shape)} is stored conjugated or negated ({sorted(map(str, rest[2]))}): "
            "save it again with .resolve_conj().resolve_neg()"
        )
    if not isinstance(storage, TypedStorage):
        return placeholder_class("torch._utils._rebuild_tensor_v2")(storage)
    tensor = StridedTensor(storage.storage, storage.dtype, offset, tuple(shape), tuple(stride))
    tensor.check()
    return tensor


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    dtype = rest[2] if len(rest) > 2 else None
    if isinstance(storage, TypedStorage) and isinstance(dtype, torch.dtype):
        storage = TypedStorage(dtype, storage.storage)
    return _rebuild_tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any = None) -> Any:
    if isinstance(function, KnownFunction) and isinstance(args, tuple):
        return function(*args)
    return placeholder_class(describe(_type))(function, args)


def _inert_getattr(owner: Any, name: Any, *_: Any) -> type[Placeholder]:
    """Return a placeholder class for a nested class, which pickle protocol 2 resolves with getattr."""
    return placeholder_class(f"{describe(owner)}.{name}")


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Return a dict in place of a collections.defaultdict, whose factory could execute code."""
    return {}


def _tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else ()


def _set(values: Any = ()) -> Any:
    return set(values) if isinstance(values, (list, tuple)) else set()


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): KnownFunction(_plain_dict),
    ("torch", "Size"): KnownFunction(_tuple),
    ("torch._utils", "_rebuild_tensor"): KnownFunction(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): KnownFunction(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): KnownFunction(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): KnownFunction(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): KnownFunction(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): KnownFunction(_rebuild_from_type),
}


for _builtins in ("builtins", "__builtin__"):
    _KNOWN[_builtins, "getattr"] = KnownFunction(_inert_getattr)
    _KNOWN[_builtins, "set"] = KnownFunction(_set)
    _KNOWN[_builtins, "frozenset"] = KnownFunction(_set)
    _KNOWN[_builtins, "tuple"] = KnownFunction(_tuple)
