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

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry, UnbuiltObject
from cqr_compress.checkpoint.formats.mapped_storage import StridedTensor
from cqr_compress.checkpoint.formats.safe_pickle import Placeholder, describe
from cqr_compress.errors import CheckpointError

_OPTIMIZER_KEY = re.compile(r"(?i)(^|_)(optimizers?|optim|opt_state)(_states?|_state_dict|_dict)?$")
_MAX_REPEATS = 1_000_000
_MAX_DEPTH = 200
_MAX_STRUCTURE_BYTES = 16 * 2**20
_PLAIN = (str, int, float, bool, type(None))
Path_ = tuple[Any, ...]


@dataclass
class _Walk:
    """State and results of a traversal of the objects."""

    tensors: dict[Path_, StridedTensor] = field(default_factory=dict)
    optimizer: dict[Path_, StridedTensor] = field(default_factory=dict)
    unbuilt_objects: list[UnbuiltObject] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    above: set[int] = field(default_factory=set)
    repeats: int = 0


def checkpoint_from_tree(root: Any, path: Path, format: str, close: Callable[[], None]) -> Checkpoint:
    """Flatten unpickled objects to a checkpoint.

    Raises:
        CheckpointError: no tensors, or objects that are nested too deeply.
    """
    walk = _Walk()
    _collect(root, (), False, walk, where=str(path))
    if not walk.tensors:
        met = f" (it holds {walk.unbuilt_objects[0].class_name})" if walk.unbuilt_objects else ""
        raise CheckpointError(f"{str(path)!r} holds no tensors outside an optimizer's state{met}")
    names, model = _names(walk.tensors), _root(walk.tensors)
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for tensor_path, tensor in walk.tensors.items():
        name = names[tensor_path]
        canonical = first_name.setdefault(tensor.identity, name)
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


def _module_state(module: Placeholder, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Iterate over the state_dict of a pickled nn.Module: parameters and persistent buffers by dotted name."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"modules are nested more than {_MAX_DEPTH} deep")
    contents = module.contents
    hidden = contents.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers"):
        values = contents.get(group)
        for name, tensor in dict.items(values) if isinstance(values, dict) else ():
            if isinstance(tensor, StridedTensor) and not (isinstance(hidden, set) and name in hidden):
                yield f"{prefix}{name}", tensor
    children = contents.get("_modules")
    for name, child in dict.items(children) if isinstance(children, dict) else ():
        if _is_module(child):
            yield from _module_state(child, f"{prefix}{name}.", depth + 1)


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a container with their keys; None for a leaf."""
    if isinstance(value, dict):
        return list(dict.items(value))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if _is_module(value):
        return list(_module_state(value))
    if isinstance(value, Placeholder):  # the parts of a sparse or quantized tensor are not tensors of the model
        return None if value.class_name.startswith("torch._utils._rebuild") else list(value.contents.items())
    return None


def _is_optimizer(key: Any, value: Any) -> bool:
    if isinstance(value, StridedTensor):
        return False
    named = isinstance(key, str) and _OPTIMIZER_KEY.search(key) is not None
    return named or (isinstance(value, dict) and {"state", "param_groups"} <= dict.keys(value))


def _collect(value: Any, path: Path_, in_optimizer: bool, walk: _Walk, where: str) -> None:
    if isinstance(value, (dict, list, tuple, Placeholder)):
        if id(value) in walk.seen:  # shared containers can expand exponentially
            walk.repeats += 1 + (0 if isinstance(value, Placeholder) else len(value))
        walk.seen.add(id(value))
    if walk.repeats > _MAX_REPEATS or len(path) > _MAX_DEPTH:
        raise CheckpointError(f"the objects in {where!r} are nested too deeply to be a checkpoint")
    if isinstance(value, StridedTensor):
        (walk.optimizer if in_optimizer else walk.tensors)[path] = value
        return
    if isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder)):
        walk.unbuilt_objects.append(UnbuiltObject(".".join(map(str, path)), describe(value)))
    if id(value) in walk.above:  # a cyclic reference, such as a config with a link to its parent
        return
    walk.above.add(id(value))
    for key, child in _children(value) or ():
        _collect(child, (*path, key), in_optimizer or _is_optimizer(key, child), walk, where)
    walk.above.discard(id(value))


def _names(tensors: Mapping[Path_, StridedTensor]) -> dict[Path_, str]:
    """Name tensors relative to the dict that contains the model, and others by their full path."""
    root = _root(tensors)
    names: dict[Path_, str] = {}
    taken: set[str] = set()
    for path in sorted(tensors, key=lambda p: p[: len(root)] != root):  # names of the model take precedence
        relative = path[len(root) :] if path[: len(root)] == root and len(path) > len(root) else path
        name = ".".join(str(k) if isinstance(k, _PLAIN) else describe(k) for k in relative) or "tensor"
        while name in taken:
            name += "_"
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
    structure = _encode(root, (), names, plain=True, above=frozenset())
    if len(json.dumps(structure)) > _MAX_STRUCTURE_BYTES + 200 * len(names):
        walk.unbuilt_objects.append(UnbuiltObject("", "plain values of more than 16 MiB"))
        structure = _encode(root, (), names, plain=False, above=frozenset())
    return structure


_LEFT_OUT = object()


def _encode(value: Any, path: Path_, names: Mapping[Path_, str], plain: bool, above: frozenset[int]) -> Any:
    if isinstance(value, StridedTensor):
        return {"t": names[path]} if path in names else _LEFT_OUT
    if isinstance(value, bool | int | float | str | None):
        huge = isinstance(value, int) and abs(value) >= 2**63
        return value if plain and is_text(value) and not huge else _LEFT_OUT
    children = _children(value)
    if children is None or id(value) in above:
        return _LEFT_OUT
    above |= {id(value)}
    nodes = [
        (key, _encode(child, (*path, key), names, plain, above))
        for key, child in children
        if not _is_optimizer(key, child)
    ]
    kept = [(key, node) for key, node in nodes if node is not _LEFT_OUT]
    if isinstance(value, (list, tuple)):
        if len(kept) < len(value) and not kept:
            return _LEFT_OUT
        items = [None if node is _LEFT_OUT else node for _, node in nodes]
        return {"l" if isinstance(value, list) else "u": items}
    if isinstance(value, Placeholder) and not _holds_tensor(kept):
        return _LEFT_OUT
    pairs = [[_key_to_json(key), node] for key, node in kept if isinstance(key, (*_PLAIN, tuple))]
    return {"o" if isinstance(value, OrderedDict) or _is_module(value) else "d": pairs}


def _holds_tensor(nodes: list[tuple[Any, Any]]) -> bool:
    return any('{"t":' in json.dumps(node, separators=(",", ":")) for _, node in nodes)


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
