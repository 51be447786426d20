"""Read the structure of a torch pickle without executing code that the file refers to.

A pickle is a program that can call any function by name. Here every name is resolved either to one of a few
rebuild functions of this module, which only describe tensors, or to an inert placeholder class, which has no
effect when it is called, subclassed, given state or filled. A file cannot cause the import of a module. What the
objects may cost is limited, see `budget`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from cqr_compress.checkpoint.formats.budget import MAX_DIMENSIONS, MAX_NAME, Meter
from cqr_compress.checkpoint.formats.budgeted_unpickler import BudgetedUnpickler, KeyCheck, Readable
from cqr_compress.checkpoint.formats.mapped_storage import LazyStorage, StridedTensor
from cqr_compress.errors import CheckpointError, FormatError, brief

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
_QUANTIZED_STORAGE_DTYPES = {
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
"""Storages of quantized tensors: their bytes are skipped, and the tensors become placeholders."""
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    )
}  # fmt: skip
"""Dtypes that a pickle can name; getattr(torch, name) of a name in a file can import a part of torch."""


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
        return placeholder_class(f"{self.class_name.removesuffix('()')}()")(*args)

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


@lru_cache(maxsize=1024)
def placeholder_class(class_name: str) -> type[Placeholder]:
    """Return the inert substitute of the class `class_name` (module and qualified name).

    Raises:
        FormatError: a name of more than 1,000 letters.
    """
    if len(class_name) > MAX_NAME:
        raise FormatError(f"the pickle names a class of {len(class_name)} letters: {brief(class_name)}")
    return type("Placeholder", (Placeholder,), {"class_name": class_name})


class StructureUnpickler(BudgetedUnpickler):
    """Unpickler of containers, plain values and descriptions of tensors; other objects become placeholders.

    Args:
        file: the pickle.
        load_storage: maps a persistent id (a tuple with a string at 2 and an integer at 4) to its LazyStorage.
        meter: what is left of the file's budget.
    """

    def __init__(
        self, file: Readable, load_storage: Callable[[tuple[Any, ...]], LazyStorage], meter: Meter
    ) -> None:
        super().__init__(file, meter)
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name from tables only, without imports."""
        if known := _KNOWN.get((module, name)):
            return known
        if makes_keys := _MAKE_KEYS.get((module, name)):
            return KnownFunction(partial(makes_keys, self.keys))
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return StorageType(_STORAGE_DTYPES[name])
        if module in ("torch", "torch.storage") and name in _QUANTIZED_STORAGE_DTYPES:
            return StorageType(_QUANTIZED_STORAGE_DTYPES[name], quantized=name)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return placeholder_class(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Convert torch's ('storage', type, key, location, num_elements, ...) to a lazy storage.

        In a legacy file, a class of a module is ('module', class, source file, source).
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], type):
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise CheckpointError(f"the pickle refers to {brief(pid)}, which is not a torch storage")
        if not isinstance(pid[1], StorageType):
            return placeholder_class(describe(pid[1]))()
        _, _, key, _, num_elements, *_ = pid
        if not isinstance(key, str) or len(key) > MAX_NAME:
            raise FormatError(f"a storage has the key {brief(key)}")
        if not isinstance(num_elements, int) or isinstance(num_elements, bool) or not 0 <= num_elements < 2**63:
            raise FormatError(f"storage {brief(key)} declares {brief(num_elements)} elements")
        storage = self._load_storage(pid)
        if pid[1].quantized is not None:
            return placeholder_class(f"torch.{pid[1].quantized}")()
        return TypedStorage(pid[1].dtype, storage)


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
    """A storage class such as torch.FloatStorage: its dtype, and its name if it is of quantized tensors."""

    def __init__(self, dtype: torch.dtype, quantized: str | None = None) -> None:
        self.dtype = dtype
        self.quantized = quantized


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


def load_structure(file: Readable, load_storage: Callable[[tuple[Any, ...]], LazyStorage], meter: Meter) -> Any:
    """Unpickle the next object of `file` safely.

    Args:
        file: the pickle.
        load_storage: see `StructureUnpickler`.
        meter: what is left of the file's budget.

    Raises:
        CheckpointError: not a pickle, a pickle that describes invalid objects, or one that exceeds the budget.
    """
    where = meter.where
    try:
        return StructureUnpickler(file, load_storage, meter).load()
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
            f"a tensor is stored conjugated or negated ({', '.join(map(brief, list(rest[2])[:4]))}): "
            "save it again with .resolve_conj().resolve_neg()"
        )
    if not isinstance(storage, TypedStorage):
        return placeholder_class("torch._utils._rebuild_tensor_v2")(storage)
    for sizes in (shape, stride):
        if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
            raise FormatError(f"a tensor has {brief(sizes)} of sizes, or more than {MAX_DIMENSIONS} dimensions")
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


_REBUILDERS = (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter)
"""What a tensor of a subclass is rebuilt with; other functions copy arguments, whose cost is not counted here."""


def _rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any = None) -> Any:
    if isinstance(function, KnownFunction) and function.function in _REBUILDERS and isinstance(args, tuple):
        return function(*args)
    return placeholder_class(describe(_type))(function, args)


def _inert_getattr(owner: Any, name: Any, *_: Any) -> type[Placeholder]:
    """Return a placeholder class for a nested class, which pickle protocol 2 resolves with getattr."""
    if not isinstance(name, str):
        raise FormatError(f"the pickle looks up an attribute by {brief(name)}")
    return placeholder_class(f"{describe(owner)}.{name}")


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Return a dict in place of a collections.defaultdict, whose factory could execute code."""
    return {}


def _tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else ()


def _set(check: KeyCheck, values: Any = ()) -> Any:
    if not isinstance(values, (list, tuple)):
        return set()
    check.check(values)
    return set(values)


def _ordered_dict(check: KeyCheck, pairs: Any = ()) -> OrderedDict[Any, Any]:
    pairs = [pair for pair in pairs if isinstance(pair, (list, tuple))] if isinstance(pairs, (list, tuple)) else []
    check.check(pair[0] for pair in pairs if pair)
    return OrderedDict(pairs)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "defaultdict"): KnownFunction(_plain_dict),
    ("torch", "Size"): KnownFunction(_tuple),
    ("torch._utils", "_rebuild_tensor"): KnownFunction(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): KnownFunction(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): KnownFunction(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): KnownFunction(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): KnownFunction(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): KnownFunction(_rebuild_from_type),
}
_MAKE_KEYS: dict[tuple[str, str], Callable[..., Any]] = {("collections", "OrderedDict"): _ordered_dict}
"""Functions that make keys of values; the first argument is the check of the file's keys."""
for _builtins in ("builtins", "__builtin__"):
    _KNOWN[_builtins, "getattr"] = KnownFunction(_inert_getattr)
    _KNOWN[_builtins, "tuple"] = KnownFunction(_tuple)
    _MAKE_KEYS[_builtins, "set"] = _MAKE_KEYS[_builtins, "frozenset"] = _set
