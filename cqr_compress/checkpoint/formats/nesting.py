"""Flatten the nested objects of a torch pickle to a checkpoint, and restore them.

Training scripts save a state_dict inside other objects, such as `{"epoch": 3, "model": {...}, "optimizer": ...}`.
The names of a checkpoint are relative to the dict that contains the model's tensors; the nesting around it is
stored as a *structure*, a JSON tree in which

    {"t": name}         is a tensor,
    {"d": [[k, v]...]}  a dict ("o" instead of "d": an OrderedDict),
    {"l": [v...]}       a list ("u": a tuple),

and anything else a plain value. Optimizer state and objects that were not instantiated are omitted.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry, UnbuiltObject
from cqr_compress.checkpoint.formats.budget import MAX_DEPTH, Meter
from cqr_compress.checkpoint.formats.budgeted_unpickler import PART_COST, KeyCheck, num_parts
from cqr_compress.checkpoint.formats.mapped_storage import StridedTensor
from cqr_compress.checkpoint.formats.safe_pickle import Placeholder, describe
from cqr_compress.errors import CheckpointError, FormatError, brief

_OPTIMIZER_KEY = re.compile(r"(?i)(^|_)(optimizers?|optim|opt_state)(_states?|_state_dict|_dict)?$")
_PLAIN = (str, int, float, bool, type(None))
_PLAIN_TYPES = frozenset(_PLAIN)
_VISIT = 64
"""Cost of visiting a container, in bytes of the budget of memory."""
Path_ = tuple[Any, ...]


@dataclass
class _Walk:
    """State and results of a traversal of the objects."""

    meter: Meter
    tensors: dict[Path_, StridedTensor] = field(default_factory=dict)
    optimizer: dict[Path_, StridedTensor] = field(default_factory=dict)
    unbuilt_objects: list[UnbuiltObject] = field(default_factory=list)
    above: set[int] = field(default_factory=set)


def checkpoint_from_tree(
    root: Any, path: Path, format: str, close: Callable[[], None], meter: Meter
) -> Checkpoint:
    """Flatten unpickled objects to a checkpoint.

    Raises:
        CheckpointError: no tensors, objects that are nested too deeply, or more than the file's budget.
    """
    walk = _Walk(meter)
    _collect(root, (), False, walk)
    if not walk.tensors:
        met = f" (it holds {walk.unbuilt_objects[0].class_name})" if walk.unbuilt_objects else ""
        raise CheckpointError(f"{str(path)!r} holds no tensors outside an optimizer's state{met}")
    names, model = _names(walk.tensors, meter), _root(walk.tensors)
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for tensor_path, tensor in walk.tensors.items():
        name = names[tensor_path]
        canonical = first_name.setdefault(tensor.identity, name)
        if canonical == name:
            meter.spend_tensor(TensorEntry(name, tensor).nbytes)
        if canonical != name and 0 not in tensor.shape:
            aliases[name] = canonical
        else:
            entries[name] = TensorEntry(name, tensor)
    optimizer_storages = {tensor.identity: TensorEntry("", tensor).nbytes for tensor in walk.optimizer.values()}
    return Checkpoint(
        path=path,
        format=format,
        entries=entries,
        aliases=aliases,
        outside_model=frozenset(names[p] for p in walk.tensors if p[: len(model)] != model),
        structure=_structure(root, names, walk),
        unbuilt_objects=tuple(walk.unbuilt_objects),
        optimizer_bytes=sum(optimizer_storages.values()),
        files=(path,),
        close_files=close,
    )


def restore_tree(structure: Any, tensors: Callable[[str], Tensor]) -> Any:
    """Restore nested objects from a structure.

    Args:
        structure: the JSON tree.
        tensors: returns the tensor of a name; called once for each occurrence.
    """
    if not isinstance(structure, dict):
        return structure
    kind, value = next(iter(structure.items()))
    if kind == "t":
        return tensors(value)
    if kind in ("d", "o"):
        pairs = [(_key_from_json(key), restore_tree(node, tensors)) for key, node in value]
        return OrderedDict(pairs) if kind == "o" else dict(pairs)
    items = [restore_tree(node, tensors) for node in value]
    return tuple(items) if kind == "u" else items


def flat_structure(names: list[str]) -> Any:
    """Return the structure of a plain state_dict."""
    return {"o": [[name, {"t": name}] for name in names]}


def _is_module(value: Any) -> bool:
    return isinstance(value, Placeholder) and {"_parameters", "_modules"} <= value.contents.keys()


def _module_state(
    module: Placeholder, meter: Meter, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Iterate over the state_dict of a pickled nn.Module: parameters and persistent buffers by dotted name."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"modules are nested more than {MAX_DEPTH} deep")
    contents = module.contents
    meter.spend(_VISIT + 8 * len(contents) + len(prefix))
    hidden = contents.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers"):
        values = contents.get(group)
        for name, tensor in dict.items(values) if isinstance(values, dict) else ():
            if isinstance(tensor, StridedTensor) and not (isinstance(hidden, set) and name in hidden):
                meter.spend(len(prefix))
                yield f"{prefix}{_text(name)}", tensor
    children = contents.get("_modules")
    for name, child in dict.items(children) if isinstance(children, dict) else ():
        if _is_module(child):
            yield from _module_state(child, meter, f"{prefix}{_text(name)}.", depth + 1)


def _children(value: Any, meter: Meter) -> list[tuple[Any, Any]]:
    """Return the children of a container with their keys; none for a leaf.

    A container in several places is visited, and paid for, in each.
    """
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found = list(dict.items(value))
    elif isinstance(value, (list, tuple)):
        found = list(enumerate(value))
    elif _is_module(value):
        found = list(_module_state(value, meter))
    # the parts of a sparse or quantized tensor are not tensors of the model
    elif isinstance(value, Placeholder) and not value.class_name.startswith("torch._utils._rebuild"):
        found = list(value.contents.items())
    meter.spend(_VISIT + 8 * len(found) + PART_COST * _num_parts((key for key, _ in found), meter))
    return found


def _num_parts(keys: Iterable[Any], meter: Meter) -> int:
    """Count the parts of keys that are no strings, which every hash of a path visits."""
    return sum(num_parts(key, meter.where) for key in keys if type(key) is not str)


def _is_optimizer(key: Any, value: Any) -> bool:
    if isinstance(value, StridedTensor):
        return False
    named = isinstance(key, str) and _OPTIMIZER_KEY.search(key) is not None
    return named or (isinstance(value, dict) and {"state", "param_groups"} <= dict.keys(value))


def _collect(value: Any, path: Path_, in_optimizer: bool, walk: _Walk) -> None:
    if len(path) > MAX_DEPTH:
        raise CheckpointError(f"the objects in {walk.meter.where!r} are nested too deeply to be a checkpoint")
    if isinstance(value, StridedTensor):
        walk.meter.spend(_VISIT + 8 * len(path) + PART_COST * _num_parts(path, walk.meter))
        (walk.optimizer if in_optimizer else walk.tensors)[path] = value
        return
    if isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder)):
        walk.meter.spend(8 * _VISIT)
        walk.unbuilt_objects.append(UnbuiltObject(_dotted(path, walk.meter), describe(value)))
    if id(value) in walk.above:  # a cyclic reference, such as a config with a link to its parent
        return
    walk.above.add(id(value))
    for key, child in _children(value, walk.meter):
        if type(child) not in _PLAIN_TYPES:
            _collect(child, (*path, key), in_optimizer or _is_optimizer(key, child), walk)
    walk.above.discard(id(value))


def _text(key: Any) -> str:
    """Return a key as a part of a name."""
    if isinstance(key, str):
        return key
    return brief(key) if isinstance(key, _PLAIN) else describe(key)


def _dotted(path: Path_, meter: Meter) -> str:
    """Join keys with dots."""
    meter.spend(sum(32 + (len(key) if isinstance(key, str) else 0) for key in path))
    return ".".join(map(_text, path))


def _names(tensors: Mapping[Path_, StridedTensor], meter: Meter) -> dict[Path_, str]:
    """Name tensors relative to the dict that contains the model, and others by their full path."""
    root = _root(tensors)
    names: dict[Path_, str] = {}
    taken: set[str] = set()
    repeated: Counter[str] = Counter()
    for path in sorted(tensors, key=lambda p: p[: len(root)] != root):  # names of the model take precedence
        relative = path[len(root) :] if path[: len(root)] == root and len(path) > len(root) else path
        name = given = _dotted(relative, meter) or "tensor"
        while name in taken:
            repeated[given] += 1
            name = f"{given}_" if repeated[given] == 1 else f"{given}_{repeated[given]}"
        taken.add(name)
        names[path] = name
    return {path: names[path] for path in tensors}


def _root(tensors: Mapping[Path_, StridedTensor]) -> Path_:
    """Find the deepest path above all dicts that contain at least 1% of the values of all matrices."""
    sizes: dict[Path_, int] = {}
    for path, tensor in tensors.items():
        size = math.prod(tensor.shape) if len(tensor.shape) >= 2 else 0
        sizes[path[:-1]] = sizes.get(path[:-1], 0) + size
    least = 0.01 * sum(sizes.values())
    holders = [holder for holder, size in sizes.items() if size >= least]
    root = holders[0]
    for holder in holders[1:]:
        shared = 0
        while shared < min(len(root), len(holder)) and root[shared] == holder[shared]:
            shared += 1
        root = root[:shared]
    return root


def _structure(root: Any, names: Mapping[Path_, str], walk: _Walk) -> Any:
    try:
        return _Encoder(names, walk.meter, plain=True).encode(root, (), frozenset())
    except _TooLongError:
        walk.unbuilt_objects.append(UnbuiltObject("", "plain values of more than 16 MiB"))
        return _Encoder(names, walk.meter, plain=False).encode(root, (), frozenset())


_LEFT_OUT = object()


class _TooLongError(Exception):
    """The structure has more bytes than a compressed file may store."""


class _Encoder:
    """Encodes objects as a structure.

    Args:
        names: names of the tensors.
        meter: what is left of the file's budget.
        plain: whether plain values are kept; then the length of the JSON is limited.
    """

    def __init__(self, names: Mapping[Path_, str], meter: Meter, plain: bool) -> None:
        self._names, self._meter, self._plain = names, meter, plain
        self._left = meter.budget.structure_bytes + 200 * len(names)
        self._num_tensors = 0

    def encode(self, value: Any, path: Path_, above: frozenset[int]) -> Any:
        """Encode a value; raises _TooLongError."""
        if isinstance(value, StridedTensor):
            if path not in self._names:
                return _LEFT_OUT
            self._num_tensors += 1
            self._count(self._names[path])
            return {"t": self._names[path]}
        if isinstance(value, _PLAIN):
            if not self._plain or not _is_storable(value):
                return _LEFT_OUT
            self._count(value)
            return value
        if id(value) in above or not isinstance(value, (dict, list, tuple, Placeholder)):
            return _LEFT_OUT
        above |= {id(value)}
        before = self._num_tensors
        nodes = [
            (key, self.encode(child, (*path, key), above))
            for key, child in _children(value, self._meter)
            if not _is_optimizer(key, child)
        ]
        kept = [(key, node) for key, node in nodes if node is not _LEFT_OUT]
        if isinstance(value, (list, tuple)):
            if len(kept) < len(value) and not kept:
                return _LEFT_OUT
            items = [None if node is _LEFT_OUT else node for _, node in nodes]
            return {"l" if isinstance(value, list) else "u": items}
        if isinstance(value, Placeholder) and self._num_tensors == before:
            return _LEFT_OUT
        pairs = [[_key_to_json(key), node] for key, node in kept if _is_storable_key(key)]
        for key, _ in pairs:
            self._count(key)
        return {"o" if isinstance(value, OrderedDict) or _is_module(value) else "d": pairs}

    def _count(self, value: Any) -> None:
        self._left -= 10 + (len(value) if isinstance(value, (str, tuple)) else 10)
        if self._plain and self._left < 0:
            raise _TooLongError


def _is_storable(value: Any) -> bool:
    return not (isinstance(value, int) and abs(value) >= 2**63) and is_text(value)


def _is_storable_key(key: Any, depth: int = 0) -> bool:
    if isinstance(key, tuple):
        return depth < MAX_DEPTH and all(_is_storable_key(part, depth + 1) for part in key)
    return isinstance(key, _PLAIN) and _is_storable(key)


def check_structure(structure: Any, names: Container[str], where: str) -> None:
    """Check a structure that was read from a file.

    Args:
        structure: the JSON tree.
        names: names of the tensors that it can refer to.
        where: path of the file, for messages.

    Raises:
        FormatError: not a structure, a reference to another tensor, more than 200 levels, or keys that `KeyCheck`
            refuses.
    """
    if isinstance(structure, _PLAIN):
        raise FormatError(f"the nesting in the metadata is damaged: {brief(structure)} holds no tensors")
    stack, keys = [(structure, 0)], KeyCheck(where)
    while stack:
        node, depth = stack.pop()
        if isinstance(node, _PLAIN):
            continue
        if depth > MAX_DEPTH + 1 or not isinstance(node, dict) or len(node) != 1:
            raise FormatError(f"the nesting in the metadata is damaged: {brief(node)} at level {depth}")
        kind, value = next(iter(node.items()))
        if kind == "t" and isinstance(value, str) and value in names:
            continue
        if kind in ("l", "u") and isinstance(value, list):
            stack.extend((child, depth + 1) for child in value)
        elif kind in ("d", "o") and isinstance(value, list):
            for pair in value:
                if not isinstance(pair, list) or len(pair) != 2 or not _is_json_key(pair[0]):
                    raise FormatError(f"the nesting in the metadata is damaged: a {kind!r} without keys")
                keys.check((_key_from_json(pair[0]),))
                stack.append((pair[1], depth + 1))
        else:
            raise FormatError(f"the nesting in the metadata is damaged: {brief(kind)} of {brief(value)}")


def _is_json_key(key: Any, depth: int = 0) -> bool:
    if isinstance(key, dict):
        parts = key.get("u")
        return (
            depth < MAX_DEPTH and isinstance(parts, list) and all(_is_json_key(part, depth + 1) for part in parts)
        )
    return isinstance(key, _PLAIN)


def is_text(value: Any) -> bool:
    """Return whether a value is not a string, or a string that UTF-8 can encode."""
    if not isinstance(value, str):
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _key_to_json(key: Any) -> Any:
    return {"u": [_key_to_json(part) for part in key]} if isinstance(key, tuple) else key


def _key_from_json(key: Any) -> Any:
    return tuple(_key_from_json(part) for part in key["u"]) if isinstance(key, dict) else key
