"""What hostile files cost, and whether damaged ones are noticed; run by hand.

    python tests/benchmarks/hostile_files.py worst
    python tests/benchmarks/hostile_files.py compressed --mutants 20000
    python tests/benchmarks/hostile_files.py torch --mutants 5000

`worst` runs `inspect` and `convert` on each file of tests/hostile_pickles.py in a process of its own, and prints the
outcome, the seconds and the peak memory above that of a process that only imports the package. The others change
files at random and read every tensor: a mutant is refused by a CqrCompressError, gives the right values, or gives
other values (a change inside the values of a tensor, or one that describes another valid tensor); anything else is
a defect, and is printed with the seed of its mutant.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.cli.render import print_dense_report, print_size_report
from cqr_compress.errors import CqrCompressError

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile_pickles import PICKLES, save, save_legacy

Bytes = dict[str, bytes]
_SECONDS = 10
_MEMORY = 4 * 2**30


def run_limited(arguments: list[str], seconds: int = 60) -> tuple[str, float, float]:
    """Run a Python process; return its outcome, its CPU seconds and its peak memory in MB."""
    code = (
        "import resource, subprocess, sys; ran = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); lines = (ran.stdout + ran.stderr).strip().split('\\n');"
        "print(ran.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, lines[-1][:150], sep='\\t')"
    )
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code, sys.executable, *arguments],
            capture_output=True, text=True, timeout=seconds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"hangs for {seconds} s", float(seconds), 0.0
    status, used, peak, line = ran.stdout.rstrip("\n").split("\t")
    return f"exit {status}: {line}", float(used), float(peak)


def worst(folder: Path) -> None:
    """Print the cost of each hostile pickle."""
    torch.save({"emb.weight": torch.zeros(4, 2)}, folder / "harmless.pt")
    _, seconds, peak = run_limited(["-m", "cqr_compress", "inspect", str(folder / "harmless.pt")])
    print(f"a harmless file: {seconds:.1f} s, {peak:.0f} MB; the others relative to it")
    for name, pickled in PICKLES.items():
        for kind, saver in (("zip", save), ("legacy", save_legacy)):
            path = folder / "m.pt"
            saver(path, pickled)
            if path.stat().st_size > 10 * 10**6:
                continue
            commands = {"inspect": [], "convert": ["-o", str(folder / "out.safetensors"), "--force"]}
            for command, options in commands.items():
                outcome, used, memory = run_limited(["-m", "cqr_compress", command, str(path), *options])
                print(
                    f"{name}, {kind} ({path.stat().st_size:,} bytes), {command}: {used - seconds:+.1f} s, "
                    f"{memory - peak:+.0f} MB, {outcome.replace(str(folder), '')}",
                    flush=True,
                )


def flipped(content: bytes, draw: random.Random) -> bytes:
    """Change, remove, double or overwrite a few bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, other = draw.randrange(len(changed)), draw.randrange(len(changed))
        size = draw.choice((1, 1, 2, 4, 8, 64))
        kind = draw.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f")) * size
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = changed[other : other + size]
        else:
            changed[at : at + size] = changed[other : other + size]
        changed = changed or bytearray(1)
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.05 else changed)


STRANGE = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 10**15, 10**300, 1e308, float("nan"), "", "a" * 5000, "\udc80",
    "[/]", "\x1b[2J", [], [[1]], {}, {"t": "emb.weight"}, "emb.weight", "stored", "hashed", "digit", [2**40, 2**40],
]  # fmt: skip


def strange_json(value: Any, draw: random.Random) -> Any:
    """Replace one value anywhere in a JSON tree, or a key."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(STRANGE)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [strange_json(item, draw) if i == at else item for i, item in enumerate(value)]
    name = draw.choice(list(value))
    changed = {k: strange_json(v, draw) if k == name else v for k, v in value.items()}
    if draw.random() < 0.1:
        changed[str(draw.choice(STRANGE))] = changed.pop(name)
    return changed


def compressed_files(folder: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Small compressed files of several methods, with what they decode to."""
    torch.manual_seed(0)
    rows = torch.randn(2000, 16)
    rows[[3, 9]] = 0
    layers = {"model": {"emb.weight": rows, "head.weight": rows, "out.weight": torch.randn(3, 4)}, "epoch": 3}
    torch.save(layers, folder / "m.pt")
    found = []
    for method in ("pq", "rq", "hash", "qr", "cqr", "int8", "int4", "auto"):
        path = folder / f"{method}.safetensors"
        cqr.convert(folder / "m.pt", path, method=method, ratio=3)
        found.append((path, cqr.load_dense_state_dict(path)))
    return found


def mutate_compressed(original: Path, path: Path, draw: random.Random) -> str:
    """Write a mutant of a compressed file; return the place of the change."""
    content = original.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    kind = draw.choice(("metadata", "metadata", "header", "values"))
    if kind == "metadata":
        with open_checkpoint(original) as opened:
            header = json.loads(opened.metadata["cqr_compress"])
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            header = strange_json(header, draw)
        save_file(load_file(original), path, {"format": "pt", "cqr_compress": json.dumps(header)})
    elif kind == "header":
        path.write_bytes(flipped(content[:start], draw) + content[start:])
    else:
        path.write_bytes(content[:start] + flipped(content[start:], draw))
    return kind


def torch_files(folder: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Small torch files of both formats, with their tensors."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"emb": torch.nn.Embedding(300, 8), "out": torch.nn.Linear(8, 2)})
    optimizer = torch.optim.Adam(layer.parameters())
    layer["out"](layer["emb"](torch.arange(9))).sum().backward()
    optimizer.step()
    state = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "vocabulary": ["a", "b"],
        "epoch": 3,
    }
    found = []
    for i, content in enumerate(
        (state, layer, {"x": torch.randn(40, 6).T, "y": {1: torch.zeros(3, 2), (2, "a"): None}})
    ):
        for legacy in (False, True):
            path = folder / f"{i}{legacy}.pt"
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            found.append((path, values_of(path)))
    return found


def mutate_torch(original: Path, path: Path, draw: random.Random) -> str:
    """Write a mutant of a torch file; return the place of the change."""
    content = original.read_bytes()
    if zipfile.is_zipfile(original) and draw.random() < 0.6:
        with zipfile.ZipFile(original) as archive, zipfile.ZipFile(path, "w") as out:
            for info in archive.infolist():
                member = archive.read(info)
                out.writestr(
                    info.filename, flipped(member, draw) if info.filename.endswith("data.pkl") else member
                )
        return "pickle"
    pickles = len(content) if zipfile.is_zipfile(original) else 2000
    if draw.random() < 0.6:
        path.write_bytes(flipped(content[:pickles], draw) + content[pickles:])
        return "container" if zipfile.is_zipfile(original) else "pickle"
    path.write_bytes(flipped(content, draw))
    return "anywhere"


def values_of(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a file."""
    with open_checkpoint(path) as opened:
        found = {name: entry.stored.read() for name, entry in opened.entries.items()}
        return found | {alias: found[name] for alias, name in opened.aliases.items()}


def read_compressed(path: Path) -> dict[str, torch.Tensor]:
    """Inspect a compressed file, then decode it."""
    with contextlib.redirect_stdout(io.StringIO()):
        report = cqr.inspect(path)
        (print_size_report if isinstance(report, cqr.SizeReport) else print_dense_report)(report)  # type: ignore[operator]
    return cqr.load_dense_state_dict(path)


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """Inspect a torch file, then read it."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print_dense_report(cqr.inspect(path, quick=True))  # type: ignore[arg-type]
    return values_of(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and bits are equal."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].nan_to_num(), other[name].nan_to_num())
        for name in one
    )


def fuzz(
    originals: list[tuple[Path, dict[str, torch.Tensor]]],
    mutate: Callable[[Path, Path, random.Random], str],
    read: Callable[[Path], dict[str, torch.Tensor]],
    count: int,
    first: int,
) -> None:
    """Read mutants, and print how many end in which way."""
    found: Counter[tuple[str, str]] = Counter()
    slowest, kinds = 0.0, Counter[str]()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("more than 10 s")))
    path = originals[0][0].with_name("mutant.safetensors" if mutate is mutate_compressed else "mutant.pt")
    for seed in range(first, first + count):
        draw = random.Random(seed)
        original, values = draw.choice(originals)
        place = mutate(original, path, draw)
        began = time.process_time()
        signal.alarm(_SECONDS)
        try:
            outcome = "right values" if same(read(path), values) else "other values"
        except CqrCompressError as e:
            outcome = "refused"
            kinds[type(e).__name__] += 1
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            outcome = "DEFECT"
            where = traceback.extract_tb(e.__traceback__)[-1]
            print(
                f"seed {seed} ({original.name}, {place}): {type(e).__name__}: {str(e)[:150]} at {where.filename}:{where.lineno}"
            )
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.process_time() - began)
        found[place, outcome] += 1
    for (place, outcome), number in sorted(found.items()):
        print(f"{place}: {number} {outcome}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} mutants, slowest {slowest:.2f} s, peak memory {peak:.0f} MB, refusals: {dict(kinds)}")


def main() -> None:
    """Run one of the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("worst", "compressed", "torch"))
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mutant")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "worst":
            worst(folder)
            return
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        if options.what == "compressed":
            fuzz(compressed_files(folder), mutate_compressed, read_compressed, options.mutants, options.seed)
        else:
            fuzz(torch_files(folder), mutate_torch, read_torch, options.mutants, options.seed)


if __name__ == "__main__":
    main()
