"""Imports go downwards only, and heavy libraries stay where they belong."""

import ast
from pathlib import Path

import pytest

import cqr_compress

ROOT = Path(cqr_compress.__file__).parent
LAYERS = {
    "errors": 0, "bitpack": 0, "hashing": 0, "progress": 0, "processes": 0,
    "spec": 1, "table": 1, "native": 1,
    "quantize": 2, "checkpoint": 2, "nn": 2, "sketches": 2,
    "families": 3, "rows": 3, "frequencies": 3, "request": 3, "layouts": 3, "plan": 3, "quality": 3, "report": 3, "discover": 3, "swap": 3, "encode": 3, "clustering": 3, "least_squares": 3,
    "conversion": 4, "dense": 4, "inspection": 4, "loading": 4, "live": 4, "saving": 4, "refitting": 4, "evaluation": 4, "tuning": 4, "tasks": 4,
    "cli": 5, "__init__": 5, "__main__": 5,
}  # fmt: skip
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "cqr_compress" and len(pieces) > 1:
            assert LAYERS[pieces[1]] <= LAYERS[part(path)], f"{part(path)} imports {name}"


@pytest.mark.parametrize(
    ("library", "home"), [("faiss", "quantize"), ("safetensors", "checkpoint"), ("typer", "cli"), ("rich", "cli")]
)
def test_a_library_is_imported_in_its_own_place_only(library: str, home: str) -> None:
    users = {part(path) for path in MODULES if any(name.split(".")[0] == library for name in imports(path))}
    assert users == {home}


def test_decoding_needs_no_faiss() -> None:
    import subprocess
    import sys

    code = "import sys, cqr_compress; cqr_compress.load_dense, cqr_compress.load_compressed, cqr_compress.decompress_; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
