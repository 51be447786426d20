"""Sizes that are asked for, predicted and measured, and the errors that were predicted.

    python tests/benchmarks/sizes.py CHECKPOINT ... [--ratios 3 6 12 24 48] [--tables PATTERN]

For each checkpoint and ratio of the whole file: the size asked for, the bytes that `--dry-run` predicts and those on
disk, and the largest deviation of a predicted error from the measured one. The plan of the dry run is kept, so that
the conversion follows it without trials.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import cqr_compress as cqr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[3, 6, 12, 24, 48])
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--rest-dtype")
    parser.add_argument("--effort", default="fast")
    args = parser.parse_args()
    print("| checkpoint | asked | predicted | on disk | unused | errors of tables | predicted / measured | s |")
    print("|---|---|---|---|---|---|---|---|")
    for source in args.checkpoints:
        measured: dict[str, Any] = {}
        held = cqr.inspect(source, quick=True)
        assert isinstance(held, cqr.DenseReport)
        model = held.file_bytes - held.optimizer_bytes
        for ratio in args.ratios:
            size = int(model / ratio)
            with tempfile.TemporaryDirectory() as folder:
                output, plan = Path(folder) / "small.safetensors", Path(folder) / "plan.json"
                began = time.monotonic()
                try:
                    dry = cqr.convert(
                        source, output, size=size, plan=plan, dry_run=True, tables=args.tables, measured=measured,
                        effort=args.effort, rest_dtype=args.rest_dtype,
                    )  # fmt: skip
                except cqr.CqrCompressError as e:
                    print(f"| {source.name} | {size:,} | {str(e)[:90]} |||||| ", flush=True)
                    continue
                report = cqr.convert(source, output, plan=plan)
                seconds = time.monotonic() - began
                on_disk = output.stat().st_size
            pairs = [(a.relative_mse, b.relative_mse) for a, b in zip(dry.tables, report.tables, strict=True)]
            ratios = [a / b for a, b in pairs if a and b]
            worst = [f"{min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else f"{ratios[0]:.3f}"]
            errors = ", ".join(f"{b:.3g}" for _, b in pairs[:4]) + (", ..." if len(pairs) > 4 else "")
            print(
                f"| {source.name} | {size:,} | {dry.file_bytes_after:,} | {on_disk:,} | {1 - on_disk / size:.2%} "
                f"| {errors} | {worst[0]} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
