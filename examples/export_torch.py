"""Serve a compressed table without Python: a program of torch.export, and a library compiled by AOTInductor.

    python examples/export_torch.py small.safetensors [--table emb.weight] [--folder exported] [--no-compile]

Writes rows.pt2 (torch.export.save; load it with torch.export.load) and rows_compiled.pt2 (load it in C++ with
AOTIModelPackageLoader, in Python with torch._inductor.aoti_load_package), both with the codes: ids (n,) int64
in, rows (n, D) out. AOTInductor needs a C++ compiler. Both are compared with the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cqr_compress as cqr


def layer_of(file: Path, name: str | None) -> cqr.CompressedEmbedding:
    """The table of a compressed file as a layer, in a model of its own."""
    tables = {table.name: table.shape for table in cqr.inspect(file).tables}
    name = name or next(iter(tables))
    *path, attribute = name.split(".")
    model = torch.nn.Module()
    inner = model
    for part in path[:-1]:
        inner.add_module(part, torch.nn.Module())
        inner = inner.get_submodule(part)
    assert attribute == "weight" and path, f"{name} is no weight of a layer"
    with torch.device("meta"):
        inner.add_module(path[-1], torch.nn.Embedding(*tables[name]))
    cqr.load_compressed(model, file, strict=False, device="cpu")
    layer = inner.get_submodule(path[-1])
    assert isinstance(layer, cqr.CompressedEmbedding)
    return layer.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a compressed table by torch.export and AOTInductor.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--table")
    parser.add_argument("--folder", type=Path, default=Path("exported"))
    parser.add_argument("--no-compile", action="store_true", help="write the program of torch.export only")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    layer = layer_of(args.file, args.table)
    ids = torch.randint(layer.num_embeddings, (100,))
    wanted = layer(ids)
    with torch.no_grad():
        program = torch.export.export(layer, (ids,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.export.save(program, args.folder / "rows.pt2")
    loaded = torch.export.load(args.folder / "rows.pt2").module()
    report(args.folder / "rows.pt2", loaded(ids[:7]), wanted[:7], layer)
    if not args.no_compile:
        package = str((args.folder / "rows_compiled.pt2").resolve())
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        report(Path(package), torch._inductor.aoti_load_package(package)(ids), wanted, layer)


def report(path: Path, found: torch.Tensor, wanted: torch.Tensor, layer: cqr.CompressedEmbedding) -> None:
    """Print the size of a file and the largest difference to the layer's rows."""
    difference = float((found - wanted).abs().max())
    dense = 4 * layer.num_embeddings * layer.embedding_dim
    print(f"{path.name}: {path.stat().st_size:,} bytes (dense {dense:,}), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
