"""Kill conversions and fine-tuning runs at random moments; what is left must be the old output, the new one, or none.

    python tests/benchmarks/interruptions.py --writes 200 --resumes 100

A write is killed with SIGKILL at a random moment after its first output file exists, an output of one file and one
of several shards in turn; half of the writes replace an existing output. Fine-tuning is killed at a random step and
resumed, until it ends; its output has to be that of a run that was never killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import cqr_compress as cqr
from cqr_compress.errors import CqrCompressError

SERVER = """
import os, sys
import torch
import cqr_compress as cqr
torch.set_num_threads(1)
for line in sys.stdin:
    source, output, method, shard_bytes = line.split()
    child = os.fork()  # a fork of a process that has imported everything: no start-up in the time that is sampled
    if child == 0:
        cqr.convert(source, output, method=method, force=True, shard_bytes=int(shard_bytes) or None)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""

TASK = """
import torch
from torch import nn

metric, mode = "bce", "min"

def model():
    return nn.Sequential(nn.Embedding(400, 8), nn.Flatten(), nn.Linear(16, 1))

def batches(seed, n):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(400, (64, 2), generator=g)
        yield ids, ((ids.sum(1, keepdim=True) % 7) > 3).float()

def train_batches(epoch):
    return batches(epoch, 10)

def loss(model, batch):
    found = nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")
    return found.mean(1)

def evaluate(model):
    losses = [loss(model, batch).mean() for batch in batches(999, 4)]
    return {"bce": float(torch.stack(losses).mean())}
"""


def kill_writes(folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill conversions while they write; return how many ended how."""
    rng, counts = random.Random(seed), Counter[str]()
    torch.manual_seed(0)
    torch.save({f"embedding_{i}.weight": torch.randn(1500, 16) for i in range(4)}, folder / "ckpt.pt")
    whole: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    seconds: dict[int, float] = {}
    for shard_bytes in (0, 20_000):
        for method in ("int8", "int4"):
            out = folder / f"whole-{method}-{shard_bytes}.safetensors"
            began = time.monotonic()
            report = cqr.convert(folder / "ckpt.pt", out, method=method, shard_bytes=shard_bytes or None)
            seconds[shard_bytes] = time.monotonic() - began
            whole[method, shard_bytes] = cqr.load_dense_state_dict(report.file)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        for number in range(count):
            shard_bytes = (0, 20_000)[number % 2]
            place = folder / f"write{number}"
            place.mkdir()
            out = place / "s.safetensors"
            if number % 4 >= 2:
                cqr.convert(folder / "ckpt.pt", out, method="int8", shard_bytes=shard_bytes or None)
            before = set(place.iterdir())
            print(folder / "ckpt.pt", out, "int4", shard_bytes, file=server.stdin, flush=True)
            child = int(server.stdout.readline())
            while set(place.iterdir()) == before and Path(f"/proc/{child}").exists():
                time.sleep(0.0005)
            time.sleep(rng.random() * seconds[shard_bytes])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            server.stdout.readline()
            counts[judge(place, whole, shard_bytes, bool(before))] += 1
            cqr.convert(folder / "ckpt.pt", out, method="int4", shard_bytes=shard_bytes or None, force=True)
            left = [path.name for path in place.iterdir() if path.name.endswith(".partial")]
            files = len(list(place.iterdir()))
            counts["temporary files that the next run left"] += len(left)
            counts["other files too many"] += files - (2 if not shard_bytes else len(set(place.glob("s*"))))
            for path in place.iterdir():
                path.unlink()
            if number % 20 == 19:
                print(f"{number + 1} writes", file=sys.stderr, flush=True)
        server.stdin.close()
    return counts


def judge(
    place: Path, whole: dict[tuple[str, int], dict[str, torch.Tensor]], shard_bytes: int, existed: bool
) -> str:
    """Load what is there, and compare it with the complete outputs."""
    path = place / ("s.safetensors.index.json" if shard_bytes else "s.safetensors")
    if not path.exists():
        return "LOST" if existed else "nothing"
    try:
        found = cqr.load_dense_state_dict(path)
    except CqrCompressError as e:
        return f"REFUSED: {str(e)[:80]}"
    for method in ("int8", "int4"):
        expected = whole[method, shard_bytes]
        if found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found):
            return "the old output" if method == "int8" else "the new output"
    return "A MIX"


def kill_finetuning(folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill fine-tuning and resume it, until `count` runs were killed; return how many ended how."""
    rng, counts = random.Random(seed), Counter[str]()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(400, 8), torch.nn.Flatten(), torch.nn.Linear(16, 1))
    torch.save(model.state_dict(), folder / "tune.pt")
    (folder / "task.py").write_text(TASK)
    cqr.convert(folder / "tune.pt", folder / "small.safetensors", method="pq", tables=["0.weight"], ratio=4)
    command = [
        sys.executable, "-m", "cqr_compress", "finetune", "small.safetensors", "--task", "task.py",
        "--epochs", "6", "--option", "save_every=2", "--seed", "3",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([*command, "-o", "whole.safetensors"], cwd=folder, env=environment, check=True)
    whole, seconds = cqr.load_dense_state_dict(folder / "whole.safetensors"), time.monotonic() - began
    while counts["killed"] < count:
        for path in folder.glob("tuned*"):
            path.unlink()
        while True:
            process = subprocess.Popen(
                [*command, "-o", "tuned.safetensors", "--resume"], cwd=folder, env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            deadline = 0.4 * seconds + rng.random() * 0.6 * seconds
            try:
                _, shown = process.communicate(timeout=deadline)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                counts["killed"] += 1
                if counts["killed"] % 10 == 0:
                    print(f"{counts['killed']} killed", file=sys.stderr, flush=True)
                continue
            found = cqr.load_dense_state_dict(folder / "tuned.safetensors")
            same = all(torch.equal(found[k], whole[k]) for k in whole)
            how = "ended" if process.returncode == 0 else f"refused, {shown.strip()[-60:]}"  # killed when complete
            counts[f"{how}: {'the weights of a run that was not killed' if same else 'OTHER WEIGHTS'}"] += 1
            break
    return counts


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=200)
    parser.add_argument("--resumes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for what, kill, count in (
            ("writes", kill_writes, args.writes),
            ("fine-tuning", kill_finetuning, args.resumes),
        ):
            print(what)
            for result, number in kill(Path(name), count, args.seed).items():
                print(f"  {number:4d}  {result}", flush=True)


if __name__ == "__main__":
    main()
