"""`auto` beside each single method at the same budget: it may not be more than 1% worse than the best of them.

    python tests/benchmarks/auto_vs_methods.py CHECKPOINT[:TENSOR] ... [--ratios 4 8 16 32 64] [--effort normal]

For each table and ratio a line with the relative squared error of `auto`, its layout, the share of the budget that
it uses, and the CPU seconds of its search and of its fit; then the best of the single methods, and the ratio of the
two errors. Without a TENSOR the largest tensor of the file is taken.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from torch import Tensor

from cqr_compress.checkpoint.base import TensorEntry
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import BudgetError
from cqr_compress.planning.choose import plan_table
from cqr_compress.planning.encode import encode_table
from cqr_compress.planning.scan import scan_table
from cqr_compress.progress import NoProgress
from cqr_compress.quantize.layouts import budget_bytes
from cqr_compress.quantize.options import ConvertOptions

METHODS = ["pq", "pq:opq", "rq", "prq", "cqr", "trellis"]


@dataclass(frozen=True)
class Result:
    """A fitted table: its error, layout, share of the budget, and CPU seconds of the search and the fit."""

    error: float
    layout: str
    used: float
    search: float
    fit: float


def fitted(entry: TensorEntry, method: str, ratio: float, effort: str) -> Result | None:
    """Fit a table; None where no layout of the method fits the budget."""
    name, _, rotation = method.partition(":")
    options = ConvertOptions(method=name, rotation=rotation or None, ratio=ratio, effort=effort)
    scan = scan_table(entry, (), "error", options.seed, options.max_sample)
    began = time.process_time()
    try:
        plan = plan_table(scan, options)
    except BudgetError:
        return None
    planned = time.process_time()
    spec = plan.spec
    budget = budget_bytes(scan.facts, options)
    assert spec is not None and budget is not None

    def drop(short: str, tensor: Tensor) -> None:
        pass

    quality = encode_table(scan, plan, options.seed, drop, NoProgress()).result()
    return Result(
        quality.relative_mse,
        f"{spec.method} {spec.layout}",
        spec.nbytes / budget,
        planned - began,
        time.process_time() - planned,
    )


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--effort", default="normal")
    args = parser.parse_args()
    worst = 0.0
    for table in args.tables:
        path, _, tensor = table.partition(":")
        with open_checkpoint(path) as checkpoint:
            entries = checkpoint.entries
            entry = entries[tensor or max(entries, key=lambda name: entries[name].nbytes)]
            print(f"{path} {entry.name} {entry.shape[0]} x {entry.shape[1]}", flush=True)
            for ratio in args.ratios:
                auto = fitted(entry, "auto", ratio, args.effort)
                found = {method: fitted(entry, method, ratio, args.effort) for method in args.methods}
                errors = {method: result.error for method, result in found.items() if result is not None}
                if auto is None or not errors:
                    print(f"  {ratio:3g}x  no layout fits")
                    continue
                best = min(errors, key=errors.__getitem__)
                worst = max(worst, auto.error / errors[best])
                print(
                    f"  {ratio:3g}x  auto {auto.error:.5f} ({auto.layout}, {auto.used:.1%} of the budget, search "
                    f"{auto.search:.0f} s, fit {auto.fit:.0f} s); best of the others {best} {errors[best]:.5f}; "
                    f"{auto.error / errors[best]:.3f}",
                    flush=True,
                )
    print(f"largest quotient of errors: {worst:.3f}")


if __name__ == "__main__":
    main()
