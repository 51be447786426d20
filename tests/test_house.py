"""The rule of ranks: a file imports its own folder, or a folder of a strictly lower rank."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cqr_compress

ROOT = Path(cqr_compress.__file__).parent
RANKS = {
    "_version": 0, "errors": 0, "progress": 0, "distributed": 0, "option_fields": 0,
    "table": 1,
    "kernel": 2,
    "quantize": 3, "checkpoint": 3, "nn": 3, "vectors": 3,
    "planning": 4, "clustering": 4, "pages": 4,
    "model": 5,
    "finetuning": 6, "integrations": 6,
    "commands": 7, "tasks": 7,
    "cli": 8, "__init__": 8,
    "__main__": 9,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))
HOMES = {
    "faiss": {"quantize"},
    "safetensors": {"checkpoint", "vectors"},
    "typer": {"cli"},
    "rich": {"cli", "progress"},
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms(source: str) -> set[str]:
    """The parts of the package that a source text imports."""
    names = [name.split(".") for name in imported(ast.parse(source)) if name.split(".")[0] == "cqr_compress"]
    return {name[1] if len(name) > 1 and name[1] in RANKS else "__init__" for name in names}


def against_the_rule(room: str, source: str) -> set[str]:
    """What a file of a room must not import."""
    return {other for other in rooms(source) if other != room and RANKS[other] >= max(1, RANKS[room])}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_its_own_folder_or_a_strictly_lower_rank(path: Path) -> None:
    assert not against_the_rule(room_of(path), path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "from cqr_compress.model.load import load_compressed",  # upwards
        "from cqr_compress.nn.embedding import CompressedEmbedding",  # sideways, in one rank
        "from cqr_compress import model",
        "import cqr_compress.model.load",
        "import cqr_compress as cqr",
        "def f():\n    from cqr_compress.planning import find",
    ],
)
def test_the_rule_sees_an_import_that_is_turned_round(line: str) -> None:
    assert against_the_rule("quantize", line)


def test_every_part_has_a_rank() -> None:
    assert {room_of(path) for path in FILES} == set(RANKS)


def test_public_names_and_subpackages_are_disjoint() -> None:
    subpackages = {module.name for module in pkgutil.iter_modules(cqr_compress.__path__)}
    assert not subpackages & set(cqr_compress.__all__)


def test_dir_lists_the_public_names_and_every_one_is_there() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import cqr_compress; print(*dir(cqr_compress))"], capture_output=True, text=True
    )
    assert listed.stdout.split() == sorted(cqr_compress.__all__)
    for name in cqr_compress.__all__:
        assert getattr(cqr_compress, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        cqr_compress.nonsense  # noqa: B018


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_own_place_only(library: str) -> None:
    users = {
        room_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(ast.parse(path.read_text())))
    }
    assert users == HOMES[library]


CREATORS = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
OF_THE_DEFAULT_DTYPE = {"empty", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_tensor_is_created_with_the_default_device_or_dtype_of_the_process(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CREATORS:
            stated = {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func.value) != "torch" or None in stated:  # **CPU_FLOAT
                continue
            needed = {"device", "dtype"} if node.func.attr in OF_THE_DEFAULT_DTYPE else {"device"}
            assert needed <= stated, f"line {node.lineno}: {ast.unparse(node)}"


def test_loading_needs_neither_faiss_nor_rich_nor_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch, cqr_compress as cqr; cqr.load_compressed, cqr.decompress_, cqr.CompressedEmbedding\n"
        "with cqr.init_empty_weights(): model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))\n"
        "assert all(parameter.is_meta for parameter in model.parameters())\n"
        "sys.exit(bool({'faiss', 'rich', 'typer', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_can_be_imported_first() -> None:
    for module in pkgutil.walk_packages(cqr_compress.__path__, "cqr_compress."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as e:  # of a library that is not installed
            of_kernels = module.name.endswith(".gpu_kernels") and e.name == "triton"
            of_frameworks = ".integrations." in module.name and e.name in ("lightning", "transformers")
            assert of_kernels or of_frameworks, module.name
