"""Build the models of built-in tasks from the shapes in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from cqr_compress.checkpoint.compressed_file import CompressedFile, is_compressed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import TaskError
from cqr_compress.planning.find import with_table_names

Shapes = Mapping[str, tuple[int, ...]]


def model_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the dense model of a checkpoint, or of a compressed file, by name."""
    with open_checkpoint(path) as checkpoint:
        if not is_compressed(checkpoint):
            named = with_table_names(checkpoint).entries.items()
            return {n: tuple(entry.shape) for n, entry in named if n not in checkpoint.outside_model}
        opened = CompressedFile.from_checkpoint(checkpoint)
        outside_model = opened.header.outside_model
        tables = {name: (spec.num_embeddings, spec.embedding_dim) for name, spec in opened.specs.items()}
        dense = {name: tuple(entry.shape) for name, entry in opened.dense_entries.items()}
        return {name: shape for name, shape in (tables | dense).items() if name not in outside_model}


def find_table(shapes: Shapes, word: str, named: str | None) -> str:
    """Find a table by its name if given, else by a word in its name.

    Raises:
        TaskError: no table or several tables match.
    """
    if named is not None:
        if len(shapes.get(named, ())) != 2:
            raise TaskError(f"the file has no table {named!r}: it has {', '.join(shapes)}")
        return named
    found = [name for name, shape in shapes.items() if word in name.lower() and len(shape) == 2 and shape[1] > 1]
    found = [name for name in found if f"{name.removesuffix('.weight')}.bias" not in shapes]  # a linear layer
    tables = [name for name in found if shapes[name][0] > shapes[name][1]] or found
    if len(tables) != 1:
        many = (
            f"{len(tables)} tables with {word!r} in their name"
            if tables
            else f"no table with {word!r} in its name"
        )
        raise TaskError(f"the file has {many} ({', '.join(tables or shapes)}): set {word}_table")
    return tables[0]


def add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module at a dotted path below a root, creating the modules in between."""
    *above, last = path.split(".")
    for part in above:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path."""
    return root.get_submodule(path)


def add_linears(root: nn.Module, shapes: Shapes, names: Iterable[str]) -> list[str]:
    """Add a linear layer for each 2-D weight, with a bias if the file has one.

    Returns:
        Paths of the layers, in the order of the names.
    """
    paths = []
    for name in names:
        path = name.removesuffix(".weight")
        out, width = shapes[name]
        add_module(root, path, nn.Linear(width, out, bias=f"{path}.bias" in shapes))
        paths.append(path)
    return paths


def refuse_rest(root: nn.Module, shapes: Shapes, task: str) -> None:
    """Refuse tensors of the file that the built model does not have.

    Raises:
        TaskError: there are such tensors, which the message lists.
    """
    state = root.state_dict()
    if unknown := [name for name in shapes if name not in state]:
        raise TaskError(
            f"task {task} does not support {', '.join(unknown[:10])} of the file. "
            "Write a task file: `cqr-compress finetune --init-task my_task.py`."
        )
