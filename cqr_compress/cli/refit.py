"""`cqr-compress refit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cqr_compress.cli.finetune import tuned_name
from cqr_compress.cli.options import (
    CompressedArgument,
    DebugOption,
    ForceOption,
    FrequenciesOption,
    JsonOption,
    RequiredOriginalOption,
    output_option,
    print_json,
    run,
)
from cqr_compress.quantize.options import REFIT_ROUNDS


def refit(
    compressed: CompressedArgument,
    original: RequiredOriginalOption,
    refine_rounds: Annotated[
        int, typer.Option(help="Rounds of least squares and re-encoding, over all rows.")
    ] = REFIT_ROUNDS,
    frequencies: FrequenciesOption = None,
    output: Annotated[Path | None, output_option("COMPRESSED with .refitted.safetensors")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Refit codes and codebooks to the original, without training data.

    A conversion fits codebooks to a sample; a refit uses all rows in every round.

    Example:
    cqr-compress refit small.safetensors --original ckpt.pt -o refitted.safetensors
    """

    def work() -> None:
        from cqr_compress.cli.render import print_load_hint, print_size_report
        from cqr_compress.commands.refit import refit as refit_file
        from cqr_compress.progress import ProgressBars

        target = output or tuned_name(compressed, "refitted")
        with ProgressBars() as progress:
            report = refit_file(
                compressed, target, original=original, refine_rounds=refine_rounds, frequencies=frequencies or (),
                force=force, progress=progress,
            )  # fmt: skip
        if as_json:
            print_json(report.to_json())
            return
        print_size_report(report)
        print_load_hint(report)

    run(work, debug)
