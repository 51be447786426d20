"""Peak memory of a process that loads a sentence encoder and answers a query: compressed beside dense.

    python tests/benchmarks/load_memory.py FOLDER [--ratio 16] [--method pq]

FOLDER holds config.json, tokenizer.json and model.safetensors of a BERT-like encoder. It needs transformers. Each
figure is the peak resident memory of a process of its own, median of three. "nothing" imports the same modules;
"dense, read" builds the model and calls load_state_dict; "dense, mapped" lets the parameters map the file, of which
a query touches only the rows of its words.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIDES = ("nothing", "dense, read", "dense, mapped", "compressed")


def peak_kib() -> int:
    """Peak resident memory of this process alone (getrusage counts what it was forked from)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def load(side: str, folder: Path, file: Path) -> None:
    """Load one side, answer a query, and print the peak in KiB and the vector's first values."""
    import torch
    import transformers
    from safetensors.torch import load_file

    import cqr_compress as cqr

    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    build, answer = transformers.AutoModel.from_config, []
    if side == "dense, read":
        model = build(config).eval()
        model.load_state_dict(load_file(file), strict=False)
    else:
        with cqr.init_empty_weights():
            model = build(config).eval()
    if side == "dense, mapped":
        model.load_state_dict(load_file(file), strict=False, assign=True)
    elif side == "compressed":
        cqr.load_compressed(model, file, strict=False)
    if side != "nothing":
        with torch.no_grad():
            batch = tokenizer("How large is this model?", return_tensors="pt")
            answer = model(**batch).last_hidden_state.mean(1)[0, :3].tolist()
    print(peak_kib(), [round(value, 4) for value in answer])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of loading an encoder, compressed and dense.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--method", default="pq")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        load(args.child[0], args.folder, Path(args.child[1]))
        return
    import cqr_compress as cqr

    with tempfile.TemporaryDirectory() as work:
        small, dense = Path(work, "small.safetensors"), Path(work, "dense.safetensors")
        cqr.convert(
            args.folder / "model.safetensors", small, cqr.ConvertOptions(method=args.method, ratio=args.ratio)
        )
        cqr.export(small, dense)
        for side in SIDES:
            file = small if side == "compressed" else dense
            command = [sys.executable, __file__, str(args.folder), "--child", side, str(file)]
            lines = [
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
                for _ in range(3)
            ]
            peak = statistics.median(int(line[0]) for line in lines)
            print(f"{side:14} {peak / 1024:7.1f} MiB  file {file.stat().st_size:,} bytes  {lines[0][1].strip()}")


if __name__ == "__main__":
    main()
